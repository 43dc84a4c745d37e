"""A client in a process of its own: runs sequences one after another and journals what it gets.

    python -m tests.chaos.client FOLDER

FOLDER has the Task and gets a journal for each sequence. Killed and started again, it goes on.
"""

import asyncio
import random
import sys
from pathlib import Path

from sluice_client import AsyncClient, AsyncSequence, SluiceError
from tests.chaos.journal import Journal
from tests.chaos.task import Task
from tests.chaos.verdict import DONE
from tests.chaos.workload import OUTPUT_SIZES, Assignment, make_id, read_id

# Longer than any fault lasts.
RECONNECT_SECONDS_MAX = 600.0


async def run(folder: Path) -> None:
    """Work until told to stop."""
    task = Task.read(folder)
    async with (
        AsyncClient(task.addresses, reconnect_seconds_max=RECONNECT_SECONDS_MAX) as client,
        asyncio.TaskGroup() as workers,
    ):
        for worker in range(task.workers):
            workers.create_task(_work(client, task, worker, folder))


async def _work(client: AsyncClient, task: Task, worker: int, folder: Path) -> None:
    number = 0
    while True:
        sequence_id = make_id(task.seed, task.client, worker, number, task.steps_max)
        assignment = read_id(sequence_id)
        journal = Journal(folder, sequence_id, OUTPUT_SIZES[assignment.model])
        number += 1
        if journal.ending is not None:
            continue
        if (folder / "stop").exists() and not journal.has_begun:
            return
        try:
            await _follow(client, assignment, journal, task.pause_seconds)
        except SluiceError as error:
            journal.end(f"{type(error).__name__}: {error}")
        else:
            journal.end(DONE)


async def _follow(
    client: AsyncClient, assignment: Assignment, journal: Journal, pause_seconds: float
) -> None:
    """Bring one sequence to its end, from wherever its journal stands."""
    journal.begin()
    x = assignment.inputs()
    async with client.sequence(assignment.model, assignment.sequence_id) as sequence:
        await _feed(sequence, assignment, journal, pause_seconds)
    assert journal.received == len(x)


async def _feed(
    sequence: AsyncSequence, assignment: Assignment, journal: Journal, pause_seconds: float
) -> None:
    x, size = assignment.inputs(), assignment.size
    draw = random.Random(assignment.sequence_id)
    start = journal.received
    if assignment.manner == "stream":
        async for y in sequence.stream(x[start:], ahead=size):
            journal.append(y)
        return
    if assignment.manner == "step":
        size = 1
    while start < len(x):
        journal.append(await sequence.step(x[start : start + size]))
        start += size
        if pause_seconds:
            await asyncio.sleep(draw.expovariate(1 / pause_seconds))


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
