"""One round: a world, faults drawn from a seed until time is up, then the verdict."""

import random
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import faults, moments
from tests.chaos.faults import Fault, Ledger, Scene
from tests.chaos.instants import Instant
from tests.chaos.verdict import Verdict
from tests.chaos.world import Models, Setting, World

# A fault that takes longer is worth a line.
_LONG_SECONDS = 10.0

_NETWORK: list[Fault] = [
    faults.cut_connections,
    faults.cut_connections,
    faults.truncate_messages,
    faults.truncate_messages,
    faults.strand_connections,
    faults.hold_bytes,
    faults.hold_bytes,
    faults.delay_bytes,
    faults.refuse_connections,
    faults.pause_client,
]
_DEATHS: list[Fault] = [
    faults.kill_server,
    faults.kill_server,
    faults.trap_server,
    faults.trap_server,
    faults.trap_server,
    faults.pause_server,
    faults.kill_client,
    faults.roll_servers,
    faults.jump_clock,
]
_WORKERS: list[Fault] = [
    faults.kill_worker,
    faults.kill_worker,
    faults.pause_worker,
    faults.kill_server,
    faults.kill_client,
    faults.roll_servers,
]
_STORE: list[Fault] = [faults.slow_store, faults.refuse_store]
_SQLITE: list[Fault] = [faults.fill_disk, faults.lock_database]
_REDIS: list[Fault] = [
    faults.kill_redis,
    faults.pause_redis,
    faults.fill_disk,
    faults.break_redis_link,
    faults.break_redis_link,
]


def sources(setting: Setting) -> list[list[Fault]]:
    """The faults of a setting, in groups; faults of different groups happen at once."""
    if not setting.is_durable:
        return [[*_NETWORK, faults.pause_server, faults.kill_client]]
    if setting.processes > 1:
        return [
            _NETWORK,
            _WORKERS,
            {"sqlite": [faults.lock_database], "redis": _REDIS}[setting.store],
        ]
    stores = _STORE + {"sqlite": _SQLITE, "redis": _REDIS, "none": []}[setting.store]
    return [_NETWORK, _DEATHS, stores]


@dataclass
class Result:
    """What one or more rounds have found."""

    seconds: float = 0
    rounds: Counter[str] = field(default_factory=Counter)  # by setting
    faults: Counter[str] = field(default_factory=Counter)
    landings: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)

    def take(self, other: "Result") -> None:
        """Add another result to this one."""
        self.seconds += other.seconds
        self.rounds += other.rounds
        self.faults += other.faults
        self.landings += other.landings
        self.verdict.take(other.verdict)


def play(setting: Setting, models: Models, folder: Path, *, seed: int, seconds: float) -> Result:
    """One round of `seconds` of faults. What is wrong is in the verdict, with the seed."""
    ledger = Ledger(setting.is_durable)
    began = time.monotonic()
    with World(setting, models, folder, seed) as world:
        until = time.monotonic() + seconds
        (_march if setting.is_march else _disturb)(world, ledger, seed, until)
        verdict = world.finish()
        for words in ledger.wrongs:
            verdict.add("error", words)
        story = [
            f"seed {seed}, {setting.name}",
            *verdict.wrongs,
            "--- faults",
            *ledger.diary,
            world.tails(),
        ]
        (folder / "story.txt").write_text("\n".join(story))
        if verdict.wrongs:
            verdict.wrongs[0] = (
                f"seed {seed}, {setting.name}: {verdict.wrongs[0]} (all of it: {folder}/story.txt)"
            )
    spent = time.monotonic() - began
    return Result(spent, Counter([setting.name]), ledger.faults, ledger.landings, verdict)


def _disturb(world: World, ledger: Ledger, seed: int, until: float) -> None:
    """Faults of all sources at once."""
    injectors = [
        threading.Thread(
            target=_inject,
            args=(Scene(world, ledger, random.Random(f"{seed} {number}")), group, until),
        )
        for number, group in enumerate(sources(world.setting))
    ]
    for injector in injectors:
        injector.start()
    for injector in injectors:
        injector.join()


def _march(world: World, ledger: Ledger, seed: int, until: float) -> None:
    """Everything moves to and fro between two servers, one of which wakes when it is too late."""
    draw = random.Random(seed)
    turn = 0
    try:
        while time.monotonic() < until:
            instant = draw.choice([each for each in Instant if each is not Instant.CLOSED])
            gaps = moments.swap(world, instant, turn)
            ledger.note("server asleep during a move", where=instant.name.lower(), gaps=gaps)
            turn += 1
    except AssertionError as error:
        ledger.complain(f"turn {turn}: {error}")


def _inject(scene: Scene, group: list[Fault], until: float) -> None:
    while time.monotonic() < until:
        scene.last(0.4)
        began = time.monotonic()
        fault = scene.draw.choice(group)
        try:
            fault(scene)
        except Exception:
            scene.ledger.complain(f"the harness has failed: {traceback.format_exc()}")
            return
        if (seconds := time.monotonic() - began) > _LONG_SECONDS:
            scene.ledger.remark(f"{fault.__name__} has taken {seconds:.1f} s")
        for number, server in enumerate(scene.world.servers):
            with server.lock:
                if not server.process.is_running:
                    scene.ledger.complain(f"server {number} ended by itself: {server.process.code}")
                    return
