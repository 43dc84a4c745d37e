"""A client in a process of its own: runs sequences one after another and journals what it gets.

    python -m tests.chaos.client FOLDER

FOLDER has the Task and gets a journal for each sequence. Killed and started again, it goes on.
"""

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

from sluice_client import (
    AsyncClient,
    AsyncSequence,
    Client,
    Mode,
    ReplayNeeded,
    SequenceClosed,
    SequenceNotFound,
    SluiceError,
    Ticket,
    Unavailable,
)
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
            await _follow(client, assignment, journal, task)
        except SluiceError as error:
            journal.end(f"{type(error).__name__}: {error}")
            return
        journal.end(DONE)


async def _follow(
    client: AsyncClient, assignment: Assignment, journal: Journal, task: Task
) -> None:
    """Bring one sequence to its end, from wherever its journal stands."""
    while True:
        sequence = take_up(client, assignment, journal, task)
        try:
            await sequence.open()
        except (SequenceClosed, SequenceNotFound):
            # Its predecessor was killed between the end and the note of it.
            if journal.received == assignment.steps:
                return
            raise
        except Unavailable:
            # A client that has never met a server does not wait for one.
            await asyncio.sleep(0.1)
            continue
        journal.put_identity(json.loads(sequence.ticket().to_json()))
        try:
            await _catch_up(sequence, assignment, journal)
            await _feed(sequence, assignment, journal, task.pause_seconds)
            await sequence.close()
        except ReplayNeeded:
            continue
        return


def take_up(
    client: AsyncClient | Client, assignment: Assignment, journal: Journal, task: Task
) -> Any:
    """The handle that goes on with what the journal has."""
    if journal.identity is not None:
        ticket = Ticket.from_json(json.dumps(journal.identity))
        return client.resume(ticket, received=journal.received)
    # Nothing was given to a handle that has left no ticket.
    mode = Mode.RESTART if journal.has_begun else Mode.START
    journal.begin()
    return client.sequence(
        assignment.model,
        assignment.sequence_id,
        mode=mode,
        holds_outputs=task.holds_outputs,
    )


async def _catch_up(sequence: AsyncSequence, assignment: Assignment, journal: Journal) -> None:
    """Give the server what it has lost, and take what it has held."""
    start = sequence.replays_from
    if start is not None:
        sequence.replay(assignment.inputs()[start : journal.received])
    for outputs in await sequence.settle():
        journal.append(outputs)
        sequence.confirm(journal.received)


async def _feed(
    sequence: AsyncSequence, assignment: Assignment, journal: Journal, pause_seconds: float
) -> None:
    """All steps from where the journal stands."""
    x, size, start = assignment.inputs(), assignment.size, journal.received
    draw = random.Random(assignment.sequence_id)
    if assignment.manner == "stream":
        async for y in sequence.stream(x[start:], ahead=size):
            journal.append(y)
            sequence.confirm(journal.received)
        return
    size = 1 if assignment.manner == "step" else size
    while start < len(x):
        journal.append(await sequence.step(x[start : start + size]))
        sequence.confirm(journal.received)
        start += size
        if pause_seconds:
            await asyncio.sleep(draw.expovariate(1 / pause_seconds))


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
