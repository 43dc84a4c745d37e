"""`sluice` in a process that keeps a trace of its work, and may lack one of the rules.

    CHAOS_TRACE=FILE [CHAOS_WITHOUT=RULE] python -m tests.chaos.launcher serve …

Nothing of the product knows of it: some functions are wrapped before the server begins.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from sluice_service import store
from sluice_service.store import Granted, StoreError, Verdict, urls
from tests.chaos.instants import Instant, Refusal, Trace
from tests.chaos.sabotage import RULES

Call = Callable[[Sequence[Any]], Awaitable[list[Any]]]


def trace_work(trace: Trace) -> None:
    """Note what is applied and what leaves, and close the traps at these instants."""
    from sluice_service.rpc.native.session import Session
    from sluice_service.sequences.table import SequenceTable
    from sluice_service.serving.landing import Landing
    from sluice_service.serving.outputs import OutputBuffer

    apply, note_sent, write = Landing.apply, OutputBuffer.note_sent, Session._write_next
    forget = SequenceTable.forget
    leaving: dict[int, list[tuple[str, int]]] = {}
    names: dict[tuple[int, int], str] = {}

    def apply_traced(self: Any, run: Any, outcome: Any) -> None:
        apply(self, run, outcome)
        for slot in run.slots.tolist():
            name, step = self._table.at(slot).sequence_id, int(self._table.step[slot])
            names[id(self._outputs), slot] = name
            trace.enter(name, step - 1)
            trace.put(name, Instant.APPLIED, step)
        spring(trace, Instant.APPLIED)

    def note_sent_traced(self: Any, stream: Any, outputs: Any, responses: int) -> None:
        note_sent(self, stream, outputs, responses)
        ends = outputs.first + outputs.lengths
        for slot, end in zip(outputs.slots.tolist(), ends.tolist(), strict=True):
            name = names.get((id(self), slot), "")
            leaving.setdefault(id(stream), []).append((name, end))

    async def write_traced(self: Any) -> None:
        await write(self)
        left = leaving.pop(id(self._stream), [])
        for name, end in left:
            trace.put(name, Instant.RESPONDED, end)
        if left:
            spring(trace, Instant.RESPONDED)

    def forget_traced(self: Any, sequence: Any) -> None:
        forget(self, sequence)
        trace.leave(sequence.sequence_id)

    Landing.apply = apply_traced
    SequenceTable.forget = forget_traced
    OutputBuffer.note_sent = note_sent_traced
    Session._write_next = write_traced


class TracedStore:
    """A store that notes what it is asked and answers, and is slow or fails on demand."""

    def __init__(self, store: Any, trace: Trace) -> None:
        self._store = store
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        """All that is not traced."""
        return getattr(self._store, name)

    async def claim(self, requests: Sequence[Any]) -> list[Any]:
        """See Store."""
        spring(self._trace, Instant.CLAIMING)
        answers = await self._ask(self._store.claim, requests)
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Granted) and not answer.is_held:
                self._trace.leave(request.key.sequence_id)
                self._trace.enter(request.key.sequence_id, answer.checkpoint.step)
        return await self._answer(Instant.CLAIMED, answers)

    async def write(self, writes: Sequence[Any]) -> list[Any]:
        """See Store."""
        for write in writes:
            name, step = write.key.sequence_id, write.checkpoint.step
            self._trace.put(name, Instant.CHECKPOINTED, step)
        spring(self._trace, Instant.CHECKPOINTED)
        answers = await self._ask(self._store.write, writes)
        # An armed trap is before the note: what the server has not learned is not durable to it.
        answers = await self._answer(Instant.DURABLE, answers)
        for write, verdict in zip(writes, answers, strict=True):
            if verdict is Verdict.DONE:
                self._trace.put(write.key.sequence_id, Instant.DURABLE, write.checkpoint.step)
        return answers

    async def close(self, closings: Sequence[Any]) -> list[Any]:
        """See Store."""
        answers = await self._ask(self._store.close, closings)
        return await self._answer(Instant.CLOSED, answers)

    async def _ask(self, call: Call, items: Sequence[Any]) -> list[Any]:
        await asyncio.sleep(self._trace.store_seconds)
        if self._trace.store_refusal is Refusal.BEFORE:
            raise StoreError("the store refuses (by the harness)")
        return await call(items)

    async def _answer(self, instant: Instant, answers: list[Any]) -> list[Any]:
        spring(self._trace, instant)
        await asyncio.sleep(self._trace.store_seconds)
        if self._trace.store_refusal is Refusal.AFTER:
            raise StoreError("the store does not answer (by the harness)")
        return answers


def trace_stores(trace: Trace) -> None:
    """Trace whichever store the server opens; before anything that opens one is imported."""
    open_store = urls.open_store

    def open_traced(*arguments: Any, **options: Any) -> Any:
        return TracedStore(open_store(*arguments, **options), trace)

    urls.open_store = open_traced
    store.open_store = open_traced


def spring(trace: Trace, instant: Instant) -> None:
    """Signal this very process where a trap was set for this instant."""
    signal = trace.pass_by(instant)
    if signal:
        os.kill(os.getpid(), signal)


def skew_clock(trace: Trace) -> None:
    """Let the wall clock jump on demand."""
    clock = time.time
    time.time = lambda: clock() + trace.clock_offset_seconds


def main() -> None:
    """Wrap, then be `sluice`."""
    from sluice_cli.main import main as run_sluice

    trace = Trace(Path(os.environ["CHAOS_TRACE"]))
    trace.begin()
    trace_stores(trace)
    trace_work(trace)
    skew_clock(trace)
    if rule := os.environ.get("CHAOS_WITHOUT"):
        RULES[rule]()
    run_sluice()


if __name__ == "__main__":
    main()
