"""Servers, stores and clients end at the worst moments: every output still arrives once."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos import moments
from tests.chaos.faults import GAPS
from tests.chaos.instants import Instant
from tests.chaos.world import RIVAL, Models, Setting, World

APPLIED_ONLY, RESPONDED_ONLY, UNDURABLE = GAPS

SMALL: dict[str, Any] = {"workers": 4, "steps_max": 150}


@pytest.mark.parametrize(
    ("durability", "instants", "gaps"),
    [
        (
            "periodic",
            [Instant.RESPONDED, Instant.CHECKPOINTED, Instant.DURABLE],
            {RESPONDED_ONLY, UNDURABLE},
        ),
        (
            "strict",
            [Instant.APPLIED, Instant.CHECKPOINTED, Instant.CLOSED],
            {APPLIED_ONLY, UNDURABLE},
        ),
    ],
)
def test_a_server_may_be_killed_at_any_instant(
    durability: str, instants: list[Instant], gaps: set[str], models: Models, tmp_path: Path
) -> None:
    landed = set()
    with World(Setting("sqlite", durability, **SMALL), models, tmp_path, seed=1) as world:
        (server,) = world.servers
        for instant in instants:
            moments.await_progress(world)
            landed |= moments.kill_at(world, server, instant, count=3)
            server.process.start()
        moments.await_progress(world)
        moments.replace_clients(world)
        moments.await_progress(world)
        verdict = world.finish()
    assert verdict.wrongs == []
    assert landed >= gaps


def test_sequences_move_between_two_servers_that_sleep_and_wake(
    models: Models, tmp_path: Path
) -> None:
    with World(Setting("redis", "strict", **SMALL, servers=2), models, tmp_path, seed=2) as world:
        for turn, instant in enumerate(
            [
                Instant.APPLIED,
                Instant.CLAIMING,
                Instant.CHECKPOINTED,
                Instant.CLAIMED,
                Instant.DURABLE,
            ]
        ):
            moments.swap(world, instant, turn)
        verdict = world.finish()
    assert verdict.wrongs == []


def test_a_rollout_and_a_dead_redis_lose_nothing(models: Models, tmp_path: Path) -> None:
    with World(Setting("redis", "periodic", **SMALL, servers=2), models, tmp_path, seed=3) as world:
        for server in world.servers:
            moments.await_progress(world)
            moments.restart(world, server)
        moments.await_progress(world)
        moments.lose_redis(world)
        moments.await_progress(world)
        verdict = world.finish()
    assert verdict.wrongs == []


@pytest.mark.parametrize("rule", ["", "claims"])
def test_two_clients_that_claim_one_sequence_never_fork_it(
    rule: str, models: Models, tmp_path: Path
) -> None:
    """Or else, where the store writes for whoever asks, the harness sees it."""
    setting = Setting(
        "sqlite", "strict", **SMALL, servers=2, clients=(RIVAL, RIVAL), pause_seconds=0.02
    )
    with World(setting, models, tmp_path, seed=4, without=rule) as world:
        moments.await_progress(world)
        for server in world.servers:
            moments.sleep_through_a_claim(world, server)
        verdict = world.finish()
    assert (verdict.wrongs == []) == (rule == "")
