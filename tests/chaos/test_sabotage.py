"""A server that lacks one of the rules is found out: the harness can fail."""

from pathlib import Path

import pytest

from tests.chaos import moments
from tests.chaos.world import PLAIN, Models, Setting, World


@pytest.mark.parametrize("rule", ["duplicates", "outputs"])
def test_a_server_without_a_rule_of_the_stream_is_found_out(
    rule: str, models: Models, tmp_path: Path
) -> None:
    setting = Setting("memory", "off", workers=4, clients=(PLAIN,))
    with World(setting, models, tmp_path, seed=1, without=rule) as world:
        moments.lose_responses(world, world.servers[0])
        # Outputs that are missing at the end of a sequence are waited for in vain.
        verdict = world.finish(seconds_max=30)
    assert verdict.wrongs != []


def test_a_strict_server_that_answers_before_its_store_is_found_out(
    models: Models, tmp_path: Path
) -> None:
    setting = Setting("sqlite", "strict", workers=4, clients=(PLAIN,))
    with World(setting, models, tmp_path, seed=1, without="durability") as world:
        moments.kill_before_the_store(world, world.servers[0])
        verdict = world.finish()
    assert verdict.wrongs != []
