"""Which steps of which lane were given by callers, sent, and answered: the client's memory of data.

Pure bookkeeping on arrays, for thousands of lanes at once: no protocol, no I/O, no
clock. A lane's steps, as counts:

    received ≤ sent ≤ end
    │          │      └ given by callers
    │          └ sent on the present stream (or applied before it)
    └ answered; the inputs from here on are kept, so that they can be sent again
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sluice_client.calls import Call
from sluice_client.errors import SluiceError, StepDiscarded
from sluice_client.signature import Array
from sluice_client.tables import Numbers, Table, expand, first_occurrences, groups

NONE: Final = -1

_LANE = {
    "received": np.int64,
    "sent": np.int64,
    "end": np.int64,
    "head": np.int64,  # the chunk that holds step `received`
    "cursor": np.int64,  # the chunk that holds step `sent`
    "tail": np.int64,  # the last chunk
    "unacknowledged": np.int64,  # outputs the server was not yet told of
    "is_attached": np.bool_,  # chunks may be sent
    "has_ended": np.bool_,  # no step will ever be answered
}
_CHUNK = {
    "first": np.int64,  # steps before it
    "stop": np.int64,  # steps after it
    "call": np.int64,  # Call.number
    "position": np.int64,  # in the call
    "row": np.int64,  # in the call's arrays
    "next": np.int64,  # of the same lane
}


@dataclass(frozen=True, slots=True)
class Frame:
    """Chunks that leave together: lanes, first steps and counts [chunks], arrays [rows, …]."""

    lanes: Numbers
    first_steps: Numbers
    counts: Numbers
    inputs: list[Array]


class Ledger:
    """All lanes of one connection with the steps that are under way."""

    def __init__(self) -> None:
        self.lanes = Table(_LANE)
        self._chunks = Table(_CHUNK)
        self._calls: dict[int, Call] = {}
        self._given: list[Call] = []
        self._ready: list[Numbers] = []
        self._touched: list[Numbers] = []
        self._ends: dict[int, SluiceError] = {}
        # Steps that were sent and not answered.
        self.in_flight = 0
        # Outputs that have arrived since the last acknowledgement, of all lanes.
        self.unacknowledged = 0
        # Outputs that have arrived, ever.
        self.rows_received = 0

    # -- lanes ----------------------------------------------------------------

    def take(self, count: int) -> Numbers:
        """Lanes that nobody uses."""
        lanes = self.lanes.take(count)
        rows = np.zeros(count, self.lanes.rows.dtype)
        rows["head"] = rows["cursor"] = rows["tail"] = NONE
        self.lanes.rows[lanes] = rows
        return lanes

    def give(self, lane: int) -> None:
        """The inverse of `take`, for a lane without steps under way."""
        self._ends.pop(lane, None)
        self.lanes["is_attached"][lane] = False
        self.lanes.give(np.array([lane]))

    def begin(self, lane: int, step: int) -> None:
        """A new lane's sequence has `step` steps already."""
        for column in ("received", "sent", "end"):
            self.lanes[column][lane] = step

    def attach(self, lane: int, applied: int) -> None:
        """Go on sending from step `applied`; the outputs below it are on their way."""
        self.admit()
        row = self.lanes.rows[lane]
        chunk = int(row["head"])
        while chunk != NONE and self._chunks["stop"][chunk] <= applied:
            chunk = int(self._chunks["next"][chunk])
        row["sent"], row["cursor"], row["is_attached"] = applied, chunk, True
        self.in_flight += applied - int(row["received"])
        self._ready.append(np.array([lane]))

    def detach(self, lane: int) -> None:
        """Send nothing more: what was under way may be lost."""
        row = self.lanes.rows[lane]
        if row["is_attached"]:
            self.in_flight -= int(row["sent"] - row["received"])
            row["sent"], row["is_attached"] = row["received"], False

    def is_idle(self, lane: int) -> bool:
        """Everything that was given has been answered."""
        self.admit()
        row = self.lanes.rows[lane]
        return bool(row["received"] == row["end"])

    def received(self, lane: int) -> int:
        """The outputs that have arrived, as a count from the sequence's start."""
        return int(self.lanes["received"][lane])

    # -- from the caller to the wire --------------------------------------------

    def submit(self, call: Call) -> None:
        """Take what a caller gives; its steps follow those given before."""
        self._given.append(call)

    def admit(self) -> None:
        """Number the steps of all calls given since the last time, together."""
        if not self._given:
            return
        calls, self._given = self._given, []
        lanes = np.concatenate([call.lanes for call in calls])
        counts = np.concatenate([call.counts for call in calls])
        sizes = np.array([len(call.lanes) for call in calls])
        positions = expand(np.zeros(len(calls), np.int64), sizes)
        if len(calls) == len(lanes):
            rows = positions
        else:
            rows = np.cumsum(counts) - counts
            rows -= np.repeat(rows[np.cumsum(sizes) - sizes], sizes)
        numbers = np.repeat(np.array([call.number for call in calls]), sizes)
        self._calls.update((call.number, call) for call in calls)
        while lanes.size:
            # Each lane once at a time, so that a chunk may follow another of the same lane.
            turn = first_occurrences(lanes)
            self._admit(lanes[turn], counts[turn], numbers[turn], positions[turn], rows[turn])
            if len(turn) == len(lanes):
                return
            later = np.ones(len(lanes), bool)
            later[turn] = False
            lanes, counts, numbers = lanes[later], counts[later], numbers[later]
            positions, rows = positions[later], rows[later]

    def _admit(
        self, lanes: Numbers, counts: Numbers, calls: Numbers, positions: Numbers, rows: Numbers
    ) -> None:
        table, chunks = self.lanes.rows, self._chunks
        first = table["end"][lanes]
        leading = positions == 0
        for number, step in zip(calls[leading].tolist(), first[leading].tolist(), strict=True):
            self._calls[number].first_step = step
        ended = table["has_ended"][lanes]
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                error = self._ends[int(lanes[index])]
                error = error.at(error.sequence_id, error.step)
                self._fail(int(calls[index]), int(positions[index]), int(counts[index]), error)
            alive = ~ended
            lanes, counts, first = lanes[alive], counts[alive], first[alive]
            calls, positions, rows = calls[alive], positions[alive], rows[alive]
        chunk = chunks.take(len(lanes))
        fresh = np.empty(len(lanes), chunks.rows.dtype)
        fresh["first"], fresh["stop"], fresh["next"] = first, first + counts, NONE
        fresh["call"], fresh["position"], fresh["row"] = calls, positions, rows
        chunks.rows[chunk] = fresh
        mine = table[lanes]
        follows = mine["tail"] != NONE
        chunks["next"][mine["tail"][follows]] = chunk[follows]
        mine["head"] = np.where(follows, mine["head"], chunk)
        mine["cursor"] = np.where(mine["cursor"] == NONE, chunk, mine["cursor"])
        mine["tail"], mine["end"] = chunk, first + counts
        table[lanes] = mine
        self._ready.append(lanes)

    def pick(self, rows_max: int, chunk_steps_max: int) -> Frame | None:
        """The next frame of at most `rows_max` steps; what it holds counts as sent.

        Lanes take turns: a long chunk does not hold up another lane's single step.
        """
        self.admit()
        if not self._ready:
            return None
        lanes = np.concatenate(self._ready)
        lanes = lanes[first_occurrences(lanes)]
        lanes = lanes[self._may_send(lanes)]
        table = self.lanes.rows
        picked: list[Frame] = []
        waiting: list[Numbers] = []
        while lanes.size and rows_max > 0:
            chunk = table["cursor"][lanes]
            first = table["sent"][lanes]
            counts = np.minimum(self._chunks["stop"][chunk] - first, chunk_steps_max)
            room = rows_max - (np.cumsum(counts) - counts)
            counts = np.minimum(counts, room)
            if room[-1] <= 0:
                waiting.append(lanes[counts <= 0])
                sends = counts > 0
                lanes, chunk, first, counts = (
                    lanes[sends],
                    chunk[sends],
                    first[sends],
                    counts[sends],
                )
            picked.append(self._gather(lanes, chunk, first, counts))
            table["sent"][lanes] = sent = first + counts
            finished = sent == self._chunks["stop"][chunk]
            table["cursor"][lanes] = np.where(finished, self._chunks["next"][chunk], chunk)
            rows_max -= int(counts.sum())
            lanes = lanes[table["cursor"][lanes] != NONE]
        waiting.append(lanes)
        self._ready = [lanes for lanes in waiting if lanes.size]
        frame = _join(picked)
        if frame is not None:
            self.in_flight += int(frame.counts.sum())
        return frame

    def _may_send(self, lanes: Numbers) -> NDArray[np.bool_]:
        mine = self.lanes.rows[lanes]
        result: NDArray[np.bool_] = mine["is_attached"] & (mine["cursor"] != NONE)
        return result

    def _gather(self, lanes: Numbers, chunk: Numbers, first: Numbers, counts: Numbers) -> Frame:
        """The rows of one piece of each lane, brought together call by call."""
        mine = self._chunks.rows[chunk]
        order, runs = groups(mine["call"])
        rows = mine["row"][order] + (first - mine["first"])[order]
        counts = counts[order]
        pieces: list[list[Array]] = []
        for number, start, stop in runs:
            inputs = self._calls[number].inputs
            if stop - start == 1:
                row = int(rows[start])
                pieces.append([array[row : row + int(counts[start])] for array in inputs])
            else:
                index = expand(rows[start:stop], counts[start:stop])
                pieces.append([array[index] for array in inputs])
        inputs = (
            pieces[0]
            if len(pieces) == 1
            else [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        )
        return Frame(lanes[order], first[order], counts, inputs)

    # -- from the wire to the caller --------------------------------------------

    def deliver(
        self, lanes: Numbers, first: Numbers, counts: Numbers, outputs: list[Array]
    ) -> Numbers:
        """Hand outputs to the calls that wait for them: [chunks], [chunks], [chunks], [rows, …].

        What has arrived before is dropped, and so is what comes for a lane that is
        not attached. Returns the lanes whose outputs cannot be right: they left a
        gap, or answer what was never sent.
        """
        source = np.cumsum(counts) - counts
        keep = lanes < len(self.lanes)
        keep[keep] = self.lanes["is_attached"][lanes[keep]]
        if not keep.all():
            lanes, first, counts, source = lanes[keep], first[keep], counts[keep], source[keep]
        wrong: list[Numbers] = []
        while lanes.size:
            turn = first_occurrences(lanes)
            mine, start, number, origin = lanes[turn], first[turn], counts[turn], source[turn]
            rows = self.lanes.rows[mine]
            skip = np.minimum(np.maximum(rows["received"] - start, 0), number)
            is_right = (start + skip <= rows["received"]) & (start + number <= rows["sent"])
            wrong.append(mine[~is_right])
            news = is_right & (number > skip)
            self._deliver(mine[news], (number - skip)[news], (origin + skip)[news], outputs)
            if len(turn) == len(lanes):
                break
            later = np.ones(len(lanes), bool)
            later[turn] = False
            lanes, first, counts, source = lanes[later], first[later], counts[later], source[later]
        return np.concatenate(wrong) if wrong else lanes

    def _deliver(
        self, lanes: Numbers, counts: Numbers, source: Numbers, outputs: list[Array]
    ) -> None:
        """Hand over what follows `received`, cut where one chunk ends and the next begins."""
        table, chunks = self.lanes.rows, self._chunks.rows
        total = int(counts.sum())
        self.in_flight -= total
        self.unacknowledged += total
        self.rows_received += total
        table["unacknowledged"][lanes] += counts
        self._touched.append(lanes)
        while lanes.size:
            chunk = table["head"][lanes]
            mine = chunks[chunk]
            received = table["received"][lanes]
            piece = np.minimum(counts, mine["stop"] - received)
            table["received"][lanes] = received + piece
            finished = received + piece == mine["stop"]
            after = mine["next"][finished]
            table["head"][lanes[finished]] = after
            table["tail"][lanes[finished][after == NONE]] = NONE
            self._hand_over(mine, mine["row"] + received - mine["first"], piece, source, outputs)
            self._chunks.give(chunk[finished])
            more = counts > piece
            lanes, counts, source = lanes[more], (counts - piece)[more], (source + piece)[more]

    def _hand_over(
        self,
        chunks: NDArray[np.void],
        rows: Numbers,
        counts: Numbers,
        source: Numbers,
        outputs: list[Array],
    ) -> None:
        order, runs = groups(chunks["call"])
        rows, counts, source = rows[order], counts[order], source[order]
        for number, start, stop in runs:
            call = self._calls[number]
            if stop - start == 1:
                size, at, origin = int(counts[start]), int(rows[start]), int(source[start])
                for mine, array in zip(call.outputs, outputs, strict=True):
                    mine[at : at + size] = array[origin : origin + size]
            else:
                index = expand(rows[start:stop], counts[start:stop])
                origins = expand(source[start:stop], counts[start:stop])
                size = len(index)
                for mine, array in zip(call.outputs, outputs, strict=True):
                    mine[index] = array[origins]
            self._count_down(call, size)

    @property
    def has_work(self) -> bool:
        """Some step may be waiting to be sent."""
        return bool(self._given or self._ready)

    def is_acknowledgement_due(self, lanes: Numbers, steps_max: int) -> bool:
        """The server may soon stop running one of `lanes` for want of an acknowledgement."""
        mine = self.lanes.rows[lanes[lanes < len(self.lanes)]]
        waits = mine["sent"] > mine["received"]
        return bool(np.any(waits & (2 * mine["unacknowledged"] >= steps_max)))

    def acknowledge(self) -> None:
        """The server is being told of all outputs that have arrived."""
        for lanes in self._touched:
            self.lanes["unacknowledged"][lanes] = 0
        self._touched.clear()
        self.unacknowledged = 0

    # -- failures -----------------------------------------------------------------

    def refuse(self, lane: int, error: SluiceError) -> None:
        """Step `received` was refused: what was given after it is discarded, the lane rewound."""
        later = StepDiscarded(
            f"step {self.received(lane)} failed before it: {error.message}",
            sequence_id=error.sequence_id,
            reason=error.reason,
        )
        self._cut(lane, error, later)

    def end(self, lane: int, error: SluiceError) -> None:
        """No more outputs will come: fail all that is under way, and all that is given later."""
        self._cut(lane, error, error)
        self.detach(lane)
        self.lanes["has_ended"][lane] = True
        self._ends[lane] = error

    def _cut(self, lane: int, error: SluiceError, later: SluiceError) -> None:
        """Forget what has not been answered: `error` for the first call, `later` for the rest."""
        self.admit()
        row, chunks = self.lanes.rows[lane], self._chunks.rows
        step, chunk = int(row["received"]), int(row["head"])
        if row["is_attached"]:
            self.in_flight -= int(row["sent"]) - step
        row["sent"] = row["end"] = step
        row["head"] = row["cursor"] = row["tail"] = NONE
        dropped: list[int] = []
        while chunk != NONE:
            mine = chunks[chunk]
            begin, stop = max(step, int(mine["first"])), int(mine["stop"])
            number, position = int(mine["call"]), int(mine["position"])
            self._fail(number, position, stop - begin, error.at(error.sequence_id, begin))
            dropped.append(chunk)
            chunk, error = int(mine["next"]), later
        self._chunks.give(np.array(dropped, np.int64))

    def _fail(self, number: int, position: int, rows: int, error: SluiceError) -> None:
        call = self._calls[number]
        call.errors[position] = error
        self._count_down(call, rows)

    def _count_down(self, call: Call, rows: int) -> None:
        call.rows_left -= rows
        if not call.rows_left:
            del self._calls[call.number]
            call.finish()


def _join(frames: list[Frame]) -> Frame | None:
    if len(frames) <= 1:
        return frames[0] if frames else None
    return Frame(
        np.concatenate([frame.lanes for frame in frames]),
        np.concatenate([frame.first_steps for frame in frames]),
        np.concatenate([frame.counts for frame in frames]),
        [
            np.concatenate(arrays)
            for arrays in zip(*(frame.inputs for frame in frames), strict=True)
        ],
    )
