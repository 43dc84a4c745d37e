"""The client of `tests.chaos.client`, with threads.

python -m tests.chaos.thread_client FOLDER
"""

import json
import random
import sys
import threading
import time
from pathlib import Path

from sluice_client import (
    Client,
    ReplayNeeded,
    Sequence,
    SequenceClosed,
    SequenceNotFound,
    SluiceError,
    Unavailable,
)
from tests.chaos.client import RECONNECT_SECONDS_MAX, take_up
from tests.chaos.journal import Journal
from tests.chaos.task import Task
from tests.chaos.verdict import DONE
from tests.chaos.workload import OUTPUT_SIZES, Assignment, make_id, read_id


def main(folder: Path) -> None:
    """Work until told to stop."""
    task = Task.read(folder)
    with Client(task.addresses, reconnect_seconds_max=RECONNECT_SECONDS_MAX) as client:
        workers = [
            threading.Thread(target=_work, args=(client, task, worker, folder))
            for worker in range(task.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def _work(client: Client, task: Task, worker: int, folder: Path) -> None:
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
            _follow(client, assignment, journal, task)
        except SluiceError as error:
            journal.end(f"{type(error).__name__}: {error}")
            return
        journal.end(DONE)


def _follow(client: Client, assignment: Assignment, journal: Journal, task: Task) -> None:
    """Bring one sequence to its end, from wherever its journal stands."""
    while True:
        sequence: Sequence = take_up(client, assignment, journal, task)
        try:
            sequence.open()
        except (SequenceClosed, SequenceNotFound):
            # Its predecessor was killed between the end and the note of it.
            if journal.received == assignment.steps:
                return
            raise
        except Unavailable:
            # A client that has never met a server does not wait for one.
            time.sleep(0.1)
            continue
        journal.put_identity(json.loads(sequence.ticket().to_json()))
        try:
            start = sequence.replays_from
            if start is not None:
                sequence.replay(assignment.inputs()[start : journal.received])
            for outputs in sequence.settle():
                journal.append(outputs)
                sequence.confirm(journal.received)
            _feed(sequence, assignment, journal, task.pause_seconds)
            sequence.close()
        except ReplayNeeded:
            continue
        return


def _feed(
    sequence: Sequence, assignment: Assignment, journal: Journal, pause_seconds: float
) -> None:
    """All steps from where the journal stands."""
    x, size, start = assignment.inputs(), assignment.size, journal.received
    draw = random.Random(assignment.sequence_id)
    if assignment.manner == "stream":
        for y in sequence.stream(x[start:], ahead=size):
            journal.append(y)
            sequence.confirm(journal.received)
        return
    size = 1 if assignment.manner == "step" else size
    while start < len(x):
        journal.append(sequence.step(x[start : start + size]))
        sequence.confirm(journal.received)
        start += size
        if pause_seconds:
            time.sleep(draw.expovariate(1 / pause_seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
