"""Freed memory is used again, and goes back to the system once nothing happens any more."""

import asyncio
import subprocess
import sys

from sluice_service.runtime.memory import give_back_when_quiet
from tests.service.wire import eventually

# Of a megabyte in many small pieces a few stay, so that no page range at the end is free.
BURST = """
from pathlib import Path
from sluice_service.runtime.memory import give_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
pieces = [bytes(1024) for _ in range(100_000)]
kept = pieces[::100]
del pieces
after = resident()
give_back()
print(before, after, resident())
"""

# Pages that are touched for the first time while a message of ten megabytes comes and goes.
BIG_MESSAGES = """
import resource
from sluice_service.runtime.memory import settle

def pages_touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"".join([b"x" * 10_000_000, b"y"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

settle()
print(*[pages_touched() for _ in range(5)])
"""


def test_what_a_burst_has_freed_goes_back() -> None:
    shown = subprocess.run([sys.executable, "-c", BURST], capture_output=True, check=True).stdout
    before, after, given = map(int, shown.split())
    assert after - before > 50e6  # the C library keeps it
    assert given - before < 30e6


def test_memory_of_a_big_message_is_used_again_by_the_next_one() -> None:
    command = [sys.executable, "-c", BIG_MESSAGES]
    shown = subprocess.run(command, capture_output=True, check=True).stdout
    first, *later = map(int, shown.split())
    assert first > 2000  # twice 10 MB are 4,900 pages of 4 KiB
    assert min(later) < 100  # the system may take some pages away for reasons of its own


async def test_memory_is_given_back_once_after_each_time_of_activity(monkeypatch) -> None:
    monkeypatch.setattr("sluice_service.runtime.memory._QUIET_SECONDS", 0.0)
    activity, given, looks = [0], list[int](), 0

    def look() -> int:
        nonlocal looks
        looks += 1
        return activity[0]

    async def look_twice() -> None:
        seen = looks
        await eventually(lambda: looks >= seen + 3)

    task = asyncio.ensure_future(give_back_when_quiet(look, lambda: given.append(activity[0])))
    await look_twice()
    assert given == []  # nothing has happened yet
    for number in (1, 2):
        activity[0] = number
        await look_twice()
        await look_twice()
        assert given == list(range(1, number + 1))
    task.cancel()
