"""Sends the chunks of one stream and notes their latencies.

It uses the client's stream directly, below the handles, because a generator that costs more
than the server would measure itself.
"""

import asyncio
import contextlib
import itertools
import time
from array import array
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from sluice_cli.bench.inputs import Inputs, Integers
from sluice_cli.bench.plan import Plan
from sluice_cli.bench.tally import Tally
from sluice_client.errors import SluiceError
from sluice_client.load import Call, LoadStream

# How long to wait for answers after the end.
_PATIENCE_SECONDS = 10.0
_DRAWN_AT_ONCE = 4096
_KEPT_ROWS_MAX = 64


class Rotation:
    """The rows of a stream in a random order that repeats; `give` returns rows to it."""

    def __init__(self, generator: np.random.Generator, rows: int) -> None:
        self._rows = generator.permutation(rows)
        self._start, self._stop = 0, rows

    def take(self, count: int) -> Integers:
        """The next rows: [count]."""
        index = np.arange(self._start, self._start + count)
        self._start += count
        return self._rows.take(index, mode="wrap")

    def give(self, rows: Integers) -> None:
        """Put rows [n] at the end; the inverse of `take`."""
        index = np.arange(self._stop, self._stop + len(rows))
        self._stop += len(rows)
        self._rows.put(index, rows, mode="wrap")


class Kept:
    """The first outputs of some sequences of one stream, for the verification."""

    def __init__(self, stream: LoadStream, offsets: Integers, steps_max: int) -> None:
        rows = min(len(offsets), steps_max, _KEPT_ROWS_MAX)
        self._steps_max = steps_max // rows if rows else 0
        self.offsets = offsets[:rows]
        self.counts = np.zeros(rows, np.int64)
        fields = stream.signature.outputs
        self.outputs = {
            field.name: np.zeros((rows, self._steps_max, *field.shape), field.dtype)
            for field in fields
        }
        self._is_full = not rows

    def add(self, rows: Integers, steps: int, outputs: list[NDArray[Any]]) -> None:
        """Record the next `steps` outputs of `rows` [n] while there is room: [n × steps, …]."""
        if self._is_full:
            return
        chosen = np.flatnonzero(rows < len(self.counts))
        mine = rows[chosen]
        number = np.minimum(steps, self._steps_max - self.counts[mine])
        for position, row, count in zip(
            chosen.tolist(), mine.tolist(), number.tolist(), strict=True
        ):
            start = int(self.counts[row])
            for kept, output in zip(self.outputs.values(), outputs, strict=True):
                kept[row, start : start + count] = output[
                    position * steps : position * steps + count
                ]
        self.counts[mine] += number
        self._is_full = bool((self.counts == self._steps_max).all())


class Traffic:
    """Sends chunks for the sequences of one stream and measures their answers."""

    def __init__(self, plan: Plan, number: int, stream: LoadStream, inputs: Inputs) -> None:
        self._plan = plan
        self._stream = stream
        self._inputs = inputs
        self._generator = np.random.default_rng((plan.seed, number))
        self._count = plan.share(plan.sequences, number)
        self._in_flight = max(1, min(self._count, plan.share(plan.in_flight, number)))
        self._offsets = inputs.offsets(self._generator, self._count)
        self.kept = Kept(stream, self._offsets, plan.share(plan.kept_steps, number))
        self._sent = np.zeros(self._count, np.int64)
        self._rotation = Rotation(self._generator, self._count)
        self._lanes = np.zeros(0, np.int64)
        self._pending: dict[int, tuple[Integers, int, NDArray[np.float64]]] = {}
        self._done: list[tuple[Integers, int]] = []
        self._all_done = asyncio.Event()
        self._is_over = False
        self.steps_done = 0
        self.error: SluiceError | None = None
        # Only chunks due between these instants of the monotonic clock are measured.
        self._begin = self._end = float("inf")
        self._steps_measured = 0
        self._entries = array("d")
        self._lateness = array("d")

    async def open(self) -> None:
        """Open all sequences. Raises SluiceError."""
        prefix = f"bench-{uuid4().hex[:8]}"
        names = [f"{prefix}-{row}" for row in range(self._count)]
        self._lanes = await self._stream.open(names)

    async def close(self) -> None:
        """Drop all sequences at the server."""
        if len(self._lanes):
            await self._stream.drop(self._lanes, _PATIENCE_SECONDS)

    async def flow(self, start: float, begin: float, end: float) -> None:
        """Send from `start`, measure from `begin`, stop at `end`; return when all is answered."""
        self._begin, self._end = begin, end
        if self._plan.rate is None:
            await _sleep_until(start)
            self._send_first()
            await _sleep_until(end)
        else:
            await self._send_at_rate(self._plan.rate / self._plan.streams, start, end)
        self._is_over = True
        if self._pending and not self.error:
            self._all_done.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await self._all_done.wait()

    def tally(self) -> Tally:
        """What was measured."""
        now = time.monotonic()
        unanswered = 0
        for rows, steps, intended in self._pending.values():
            unanswered += len(rows)
            self._note(now, len(rows), steps, intended)
        entries = np.array(self._entries).reshape(-1, 3)
        return Tally(
            entries[:, 0],
            entries[:, 1],
            entries[:, 2],
            np.array(self._lateness),
            self._steps_measured,
            unanswered,
        )

    def _send_first(self) -> None:
        """Send a chunk for as many sequences as may be in flight. Each answer triggers the next."""
        now = time.monotonic()
        if self._plan.sizes.is_fixed:
            # Sequences in lockstep share messages. Independent callers end up in lockstep, too.
            self._send(self._rotation.take(self._in_flight), self._plan.sizes.steps[0], now)
        else:
            for steps in self._draw(self._in_flight):
                self._send(self._rotation.take(1), steps, now)

    async def _send_at_rate(self, rate: float, start: float, end: float) -> None:
        """Send chunks when they are due, answered or not, with Poisson arrivals.

        Chunks that are due at the same time and have the same size are sent together. Latency
        counts from when a chunk was due, not from when it was sent (Tene, "How NOT to
        Measure Latency": coordinated omission).
        """
        sizes = self._plan.sizes
        at = start
        while at < end and self.error is None:
            gaps = self._generator.exponential(sizes.mean / rate, _DRAWN_AT_ONCE)
            dues = at + np.cumsum(gaps)
            steps = sizes.draw(self._generator, len(dues))
            at = float(dues[-1])
            dues = dues[dues < end]
            position = 0
            while position < len(dues) and self.error is None:
                await _sleep_until(dues[position])
                stop = int(np.searchsorted(dues, time.monotonic(), "right"))
                # A sequence may be in a call only once.
                stop = max(position + 1, min(stop, position + self._count))
                self._send_due(dues[position:stop], steps[position:stop])
                position = stop
                await asyncio.sleep(0)

    def _send_due(self, dues: NDArray[np.float64], steps: Integers) -> None:
        now = time.monotonic()
        self._lateness.extend((now - dues[dues >= self._begin]).tolist())
        rows = self._rotation.take(len(dues))
        self._rotation.give(rows)
        for size in np.unique(steps).tolist():
            chosen = steps == size
            self._send(rows[chosen], size, dues[chosen])

    def _draw(self, count: int) -> list[int]:
        drawn: list[int] = self._plan.sizes.draw(self._generator, count).tolist()
        return drawn

    def _send(self, rows: Integers, steps: int, intended: float | NDArray[np.float64]) -> None:
        """Send the next chunk of each of `rows`."""
        inputs = self._inputs.take(self._offsets[rows] + self._sent[rows], steps)
        self._sent[rows] += steps
        call = self._stream.submit(self._lanes[rows], steps, inputs, self._answered)
        self._pending[call.number] = (rows, steps, np.atleast_1d(intended))

    def _answered(self, call: Call) -> None:
        """Note an answer. The client calls this while it handles a message, so send later."""
        rows, steps, intended = self._pending.pop(call.number)
        if call.errors:
            self.error = self.error or call.errors[min(call.errors)]
            self._all_done.set()
            return
        now = time.monotonic()
        self._note(now, len(rows), steps, intended)
        self.steps_done += len(rows) * steps
        if self._begin <= now < self._end:
            self._steps_measured += len(rows) * steps
        self.kept.add(rows, steps, call.outputs)
        if self._plan.rate is None and not self._is_over:
            if not self._done:
                asyncio.get_running_loop().call_soon(self._go_on)
            self._done.append((rows, steps))
        elif not self._pending:
            self._all_done.set()

    def _note(self, now: float, chunks: int, steps: int, intended: NDArray[np.float64]) -> None:
        """Note the latency of chunks: all due at one time, or each at its own time."""
        measured = intended[(self._begin <= intended) & (intended < self._end)]
        for due in measured.tolist():
            self._entries.extend((now - due, chunks / len(intended), steps))

    def _go_on(self) -> None:
        """The closed loop: send one chunk for each that was answered."""
        done, self._done = self._done, []
        if time.monotonic() >= self._end:
            self._is_over = True
        if self._is_over:
            if not self._pending:
                self._all_done.set()
            return
        for rows, _ in done:
            self._rotation.give(rows)
        sizes = (
            itertools.repeat(self._plan.sizes.steps[0])
            if self._plan.sizes.is_fixed
            else self._draw(len(done))
        )
        now = time.monotonic()
        for (rows, _), steps in zip(done, sizes, strict=False):
            self._send(self._rotation.take(len(rows)), steps, now)


async def _sleep_until(instant: float) -> None:
    seconds = instant - time.monotonic()
    if seconds > 0:
        await asyncio.sleep(seconds)
