"""A server that lacks one of the rules is found out: the harness can fail.

By a wrong in what was received, not by something that is still to come: that may be the
machine's doing.
"""

from pathlib import Path

import pytest

from tests.chaos import moments
from tests.chaos.world import PLAIN, Models, Setting, World

# A response that is lost at the very end of its sequence shows nothing.
ATTEMPTS_MAX = 50


@pytest.mark.parametrize("rule", ["duplicates", "outputs"])
def test_a_server_without_a_rule_of_the_stream_is_found_out(
    rule: str, models: Models, tmp_path: Path
) -> None:
    setting = Setting("none", "off", workers=4, clients=(PLAIN,))
    with World(setting, models, tmp_path, seed=1, without=rule) as world:
        for _ in range(ATTEMPTS_MAX):
            moments.lose_responses(world, world.servers[0])
            if world.judge_so_far().wrongs:
                return
    pytest.fail("nothing that was received is wrong")


def test_a_strict_server_that_answers_before_its_store_is_found_out(
    models: Models, tmp_path: Path
) -> None:
    setting = Setting("sqlite", "strict", workers=4, clients=(PLAIN,))
    with World(setting, models, tmp_path, seed=1, without="durability") as world:
        moments.kill_before_the_store(world, world.servers[0])
        moments.wait_until(lambda: bool(world.judge_so_far().wrongs), world, "found out")
