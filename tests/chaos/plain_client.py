"""A client written from docs/protocol.md alone: the wire, and nothing of `sluice_client`.

    python -m tests.chaos.plain_client FOLDER

As `tests.chaos.client`, but it sends everything again from what it has received, even
what the server has applied, and sends its first steps together with a START: both are
allowed, and only the server's rules make it right.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np

from sluice_protos.sequences_pb2 import (
    RESUME,
    START,
    STRICT,
    Closed,
    Fault,
    InferRequest,
    InferResponse,
    OpenSequence,
    Received,
    Tensor,
)
from sluice_protos.sequences_pb2_grpc import SequencesStub
from tests.chaos.journal import Journal
from tests.chaos.task import Task
from tests.chaos.verdict import DONE
from tests.chaos.workload import OUTPUT_SIZES, Assignment, make_id, read_id

_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Else two pings are all, and who waits longer never finds out that nobody is there.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)
_PASSING = {Fault.UNAVAILABLE, Fault.DRAINING, Fault.CONFLICT}
_IS_OVER = {Fault.SEQUENCE_CLOSED, Fault.NOT_FOUND}
_AGAIN = {Closed.FENCED, Closed.DRAINING, Closed.PARKED}


class BrokenPromiseError(Exception):
    """The server has done what the protocol does not allow."""


class Sequence:
    """One sequence, over as many streams as it takes."""

    def __init__(self, assignment: Assignment, journal: Journal, pause_seconds: float) -> None:
        self._assignment = assignment
        self._journal = journal
        self._pause_seconds = pause_seconds
        self._x = assignment.inputs()
        self._received = journal.received
        identity = journal.identity or {}
        self._writer = bytes.fromhex(identity.get("writer", "")) or np.random.bytes(16)
        self._attempt: int = identity.get("attempt", 0)
        self._was_opened: bool = identity.get("was_opened", False)
        self._was_closed: bool = identity.get("was_closed", False)
        self._durable = 0
        self._expected_epoch = 0
        # Of the present stream.
        self._sent = self._applied = 0
        self._is_open = False
        self._is_closing = False

    def _remember(self) -> None:
        """Put down what a successor must know, before the server can."""
        self._journal.put_identity(
            {
                "writer": self._writer.hex(),
                "attempt": self._attempt,
                "was_opened": self._was_opened,
                "was_closed": self._was_closed,
            }
        )

    def follow(self, channel: grpc.Channel) -> bool:
        """One stream; True when the sequence has come to its end.

        Raises grpc.RpcError when the stream breaks, BrokenPromiseError.
        """
        outbox: queue.SimpleQueue[InferRequest | None] = queue.SimpleQueue()
        self._is_open = self._is_closing = False
        self._attempt += 1
        self._remember()
        mode = RESUME if self._was_opened else START
        first = InferRequest(model=self._assignment.model)
        first.open.append(
            OpenSequence(
                sequence_id=self._assignment.sequence_id,
                mode=mode,
                received=self._received,
                writer=self._writer,
                attempt=self._attempt,
                expected_epoch=self._expected_epoch,
            )
        )
        self._sent = self._applied = self._received
        if mode == START:
            self._fill(first)
        outbox.put(first)
        call = SequencesStub(channel).Infer(_requests(outbox))
        try:
            for response in call:
                verdict = self._take(response)
                if verdict is not None:
                    return verdict
                request = InferRequest()
                request.received.append(Received(lane=0, step=self._received))
                if self._is_open:
                    self._fill(request)
                outbox.put(request)
        finally:
            outbox.put(None)
            call.cancel()
        return False

    def _fill(self, request: InferRequest) -> None:
        """Put in as many chunks as may be under way, or the end."""
        size = 1 if self._assignment.manner == "step" else self._assignment.size
        window = size * (4 if self._assignment.manner == "stream" else 1)
        rows = []
        # What is applied already is answered from what the server holds.
        end = min(len(self._x), max(self._received, self._applied) + window)
        while self._sent < end:
            rows.append(self._x[self._sent : self._sent + size])
            request.lane.append(0)
            request.steps.append(len(rows[-1]))
            request.first_step.append(self._sent)
            self._sent += len(rows[-1])
        if rows:
            request.inputs.append(Tensor(data=np.concatenate(rows).tobytes()))
            if self._pause_seconds:
                time.sleep(self._pause_seconds)
        if self._received == len(self._x) and not self._is_closing:
            self._is_closing = self._was_closed = True
            self._remember()
            request.close.append(0)

    def _take(self, response: InferResponse) -> bool | None:
        """None to go on; False to try another stream; True when it is over."""
        for opened in response.opened:
            if opened.durability == STRICT:
                # What has arrived was durable.
                self._durable = max(self._durable, self._received)
            if opened.applied < self._durable:
                raise BrokenPromiseError(
                    f"it stands at {opened.applied}, and {self._durable} were durable"
                )
            self._was_opened = self._is_open = True
            self._applied = opened.applied
            self._sent = min(self._received, opened.applied)
            self._remember()
        for durable in response.durable:
            self._durable = max(self._durable, durable.step)
        self._take_outputs(response)
        for fault in response.faults:
            if fault.reason in _IS_OVER and self._was_closed:
                return True
            if fault.reason not in _PASSING:
                raise BrokenPromiseError(f"{Fault.Reason.Name(fault.reason)}: {fault.message}")
            self._expected_epoch = fault.epoch
            time.sleep(0.05)
            return False
        for closed in response.closed:
            if closed.reason == Closed.CLIENT and self._is_closing:
                return True
            if closed.reason in _AGAIN:
                return False
            raise BrokenPromiseError(f"closed: {Closed.Reason.Name(closed.reason)}")
        return None

    def _take_outputs(self, response: InferResponse) -> None:
        if not response.lane:
            return
        width = OUTPUT_SIZES[self._assignment.model]
        rows = np.frombuffer(response.outputs[0].data, "<f4").reshape(-1, width)
        steps = list(response.steps) or [1] * len(response.lane)
        start = 0
        for first, count in zip(response.first_step, steps, strict=True):
            if first > self._received:
                raise BrokenPromiseError(f"output {first} came before output {self._received}")
            if first + count > max(self._sent, self._applied):
                raise BrokenPromiseError(f"an output came to step {first + count}, never sent")
            news = rows[start + self._received - first : start + count]
            start += count
            if first + count > self._received:
                self._journal.append(news)
                self._received += len(news)


def _requests(outbox: "queue.SimpleQueue[InferRequest | None]") -> Iterator[InferRequest]:
    while (request := outbox.get()) is not None:
        yield request


def _work(task: Task, worker: int, folder: Path) -> None:
    """One sequence after another."""
    turn, channel = worker, None
    for number in range(10**9):
        sequence_id = make_id(task.seed, task.client, worker, number, task.steps_max)
        assignment = read_id(sequence_id)
        journal = Journal(folder, sequence_id, OUTPUT_SIZES[assignment.model])
        if journal.ending is not None:
            continue
        if (folder / "stop").exists() and not journal.has_begun:
            return
        journal.begin()
        sequence, words = Sequence(assignment, journal, task.pause_seconds), ""
        while not words:
            address = task.addresses[turn % len(task.addresses)]
            channel = channel or grpc.insecure_channel(address, options=_OPTIONS)
            try:
                if sequence.follow(channel):
                    words = DONE
                    continue
            except grpc.RpcError:
                time.sleep(0.05)
            except BrokenPromiseError as error:
                words = f"{type(error).__name__}: {error}"
            channel.close()
            channel, turn = None, turn + 1
        journal.end(words)


def main(folder: Path) -> None:
    """Work until told to stop."""
    task = Task.read(folder)
    workers = [
        threading.Thread(target=_work, args=(task, worker, folder))
        for worker in range(task.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
