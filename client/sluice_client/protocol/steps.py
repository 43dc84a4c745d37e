"""Which steps of which lane were given by callers, sent, and answered: the client's memory of data.

Pure bookkeeping on arrays, for thousands of lanes at once: no protocol, no I/O, no
clock. A lane's steps, as counts:

    durable ≤ received ≤ end
    durable ≤ sent     ≤ end
    │         │          └ given by callers
    │         └ received: answered; sent: sent on the present stream, or applied before it
    └ the inputs from here on are kept, so that they can be sent again

`durable` follows `received` by itself where no server goes back behind what it has
answered. Where one may, the lane *trails*: its answered chunks stay until `secure`
tells that they are durable. A server that has gone back applies them again, and as
long as `behind` of its answers are still to come, they are dropped.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sluice_client.errors import SluiceError, StepDiscarded
from sluice_client.protocol.acknowledgements import Acknowledgements
from sluice_client.protocol.calls import Call
from sluice_client.protocol.frames import Frame, gather, join
from sluice_client.protocol.replay_buffer import Bounds, Kept
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import NONE, Numbers, Table, expand, first_occurrences, groups

_ENDLESS: Final = 2**62

_LANE = {
    "received": np.int64,
    "sent": np.int64,
    "end": np.int64,
    "head": np.int64,  # the chunk that holds step `received`
    "cursor": np.int64,  # the chunk that holds step `sent`
    "tail": np.int64,  # the last chunk
    "unacknowledged": np.int64,  # outputs the server may forget and was not yet told of
    "is_attached": np.bool_,  # chunks may be sent
    "has_ended": np.bool_,  # no step will ever be answered
}
# Of the same lanes: what a step of a sequence that keeps nothing never touches.
_LANE_RARE = {
    "durable": np.int64,
    "behind": np.int64,  # answers below `received` that are still to come
    "inputs_from": np.int64,  # the first step whose input was given here
    "oldest": np.int64,  # the first answered chunk that is kept, if any
    "newest": np.int64,  # the last of them
    "confirmed": np.int64,  # of a lane that holds: outputs that are safe with the caller
    "keeps": np.bool_,  # the server says what is durable
    "trails": np.bool_,  # answered inputs are kept, from `durable` on
    "holds": np.bool_,  # outputs are acknowledged when the caller confirms them
}
_CHUNK = {
    "first": np.int64,  # steps before it
    "stop": np.int64,  # steps after it
    "call": np.int64,  # Call.number
    "position": np.int64,  # in the call
    "row": np.int64,  # in the call's arrays
    "next": np.int64,  # of the same lane
}


class Ledger:
    """All lanes of one connection with the steps that are under way."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.lanes = Table(_LANE, _LANE_RARE)
        self._chunks = Table(_CHUNK)
        self.acknowledgements = Acknowledgements(self.lanes)
        self.kept = Kept(self.lanes, self._chunks)
        self._bounds = bounds or Bounds()
        self._calls: dict[int, Call] = {}
        self._given: list[Call] = []
        self._ready: list[Numbers] = []
        # Lanes that may send no more until something is durable.
        self._stalled: list[Numbers] = []
        self._ends: dict[int, SluiceError] = {}
        # Steps that were sent and not answered.
        self.in_flight = 0
        # Outputs that have arrived, ever.
        self.rows_received = 0
        # How many lanes keep, and trail; the sum of `behind` over attached lanes.
        self._keeping = self._trailing = self._behind = 0

    # -- lanes ----------------------------------------------------------------

    def take(self, count: int) -> Numbers:
        """Lanes that nobody uses."""
        lanes = self.lanes.take(count)
        rows, rare = np.zeros(count, self.lanes.rows.dtype), np.zeros(count, self.lanes.rare.dtype)
        rows["head"] = rows["cursor"] = rows["tail"] = NONE
        rare["oldest"] = rare["newest"] = NONE
        self.lanes.rows[lanes], self.lanes.rare[lanes] = rows, rare
        return lanes

    def give(self, lane: int) -> None:
        """The inverse of `take`, for a lane without steps under way."""
        self._ends.pop(lane, None)
        self.lanes["is_attached"][lane] = False
        self.lanes.give(np.array([lane]))

    def begin(self, lane: int, step: int, durable: int, inputs_from: int) -> None:
        """A new lane's sequence has `step` outputs already; its inputs are given from a step on."""
        row, rare = self.lanes.rows[lane], self.lanes.rare[lane]
        row["received"] = row["sent"] = row["end"] = rare["confirmed"] = step
        rare["durable"], rare["inputs_from"] = durable, inputs_from

    def keep(self, lane: int, *, is_keeping: bool) -> None:
        """Say whether the server tells this lane what is durable, and may go back to that."""
        row = self.lanes.rare[lane]
        self._keeping += int(is_keeping) - int(row["keeps"])
        row["keeps"] = is_keeping

    def attach(self, lane: int, applied: int, durable: int) -> None:
        """Go on sending from step `applied`; outputs that have not arrived are on their way."""
        self.admit()
        row, rare = self.lanes.rows[lane], self.lanes.rare[lane]
        received = int(row["received"])
        behind = received - min(self.acknowledgements.told(lane), applied)
        if rare["keeps"]:
            rare["durable"] = max(int(rare["durable"]), min(durable, applied))
        else:
            rare["durable"] = min(received, applied)
        rare["behind"], row["sent"], row["is_attached"] = behind, applied, True
        self._behind += behind
        self.in_flight += applied - received + behind
        self._set_trailing(lane, trails=bool(rare["keeps"]) or behind > 0)
        self.kept.forget(np.array([lane]))
        row["cursor"] = self._find(lane, applied)
        self._ready.append(np.array([lane]))

    def detach(self, lane: int) -> None:
        """Send nothing more: what was under way may be lost."""
        row, behind = self.lanes.rows[lane], int(self.lanes.rare["behind"][lane])
        if row["is_attached"]:
            self.in_flight -= int(row["sent"] - row["received"]) + behind
            self._behind -= behind
            row["sent"], row["is_attached"] = row["received"], False

    def safe(self, lane: int) -> int:
        """The step that no server may go back behind: the inputs before it are not kept."""
        rare = self.lanes.rare[lane]
        return int(rare["durable"]) if rare["trails"] or rare["keeps"] else self.received(lane)

    def is_safe(self, lane: int) -> bool:
        """No server goes back behind what this lane's caller has."""
        return self.safe(lane) >= self.received(lane)

    def _find(self, lane: int, step: int) -> int:
        """The chunk that holds this step."""
        stop, after = self._chunks["stop"], self._chunks["next"]
        chunk = int(self.lanes.rare["oldest"][lane])
        if chunk == NONE:
            chunk = int(self.lanes["head"][lane])
        while chunk != NONE and stop[chunk] <= step:
            chunk = int(after[chunk])
        return chunk

    def _set_trailing(self, lane: int, *, trails: bool) -> None:
        row = self.lanes.rare[lane]
        self._trailing += int(trails) - int(row["trails"])
        row["trails"] = trails

    def lacks_inputs(self, lane: int, step: int) -> bool:
        """Inputs from this step on were given to another handle, not to this one."""
        return bool(step < self.lanes.rare["inputs_from"][lane])

    def is_fresh(self, lane: int) -> bool:
        """Nothing was given to this lane yet."""
        self.admit()
        row = self.lanes.rows[lane]
        return bool(self.lanes.rare["inputs_from"][lane] == row["received"] == row["end"])

    def is_idle(self, lane: int) -> bool:
        """Everything that was given has been answered, and is applied at this server."""
        self.admit()
        row = self.lanes.rows[lane]
        is_caught_up = not self.lanes.rare["behind"][lane]
        return bool(row["received"] == row["sent"] == row["end"] and is_caught_up)

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
        mine["head"] = np.where(mine["head"] == NONE, chunk, mine["head"])
        mine["cursor"] = np.where(mine["cursor"] == NONE, chunk, mine["cursor"])
        mine["tail"], mine["end"] = chunk, first + counts
        table[lanes] = mine
        self._ready.append(lanes)

    def pick(self, rows_max: int, chunk_steps_max: int, step_bytes: int = 0) -> Frame | None:
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
            stop = self._chunks["stop"][chunk]
            if self._keeping:
                lanes, chunk, stop = self._stall(lanes, chunk, stop, step_bytes)
                if not lanes.size:
                    break
            first = table["sent"][lanes]
            counts = np.minimum(stop - first, chunk_steps_max)
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
            mine = self._chunks.rows[chunk]
            picked.append(gather(lanes, mine, first, counts, self._calls, self.kept.sources))
            table["sent"][lanes] = sent = first + counts
            finished = sent == self._chunks["stop"][chunk]
            table["cursor"][lanes] = np.where(finished, self._chunks["next"][chunk], chunk)
            rows_max -= int(counts.sum())
            lanes = lanes[table["cursor"][lanes] != NONE]
        waiting.append(lanes)
        self._ready = [lanes for lanes in waiting if lanes.size]
        frame = join(picked)
        if frame is not None:
            self.in_flight += int(frame.counts.sum())
        return frame

    def _stall(
        self, lanes: Numbers, chunk: Numbers, stop: Numbers, step_bytes: int
    ) -> tuple[Numbers, Numbers, Numbers]:
        """Leave out the lanes that keep too much, and cut what the others may send."""
        mine, rare = self.lanes.rows[lanes], self.lanes.rare[lanes]
        # What has been answered is sent again whatever is kept: it is kept already.
        limit = mine["received"]
        if self.kept.bytes(step_bytes) < self._bounds.bytes_max:
            limit = np.maximum(limit, rare["durable"] + self._bounds.steps_max)
        limit = np.where(rare["keeps"], limit, _ENDLESS)
        goes_on = mine["sent"] < limit
        if not goes_on.all():
            self._stalled.append(lanes[~goes_on])
        return lanes[goes_on], chunk[goes_on], np.minimum(stop, limit)[goes_on]

    def _may_send(self, lanes: Numbers) -> NDArray[np.bool_]:
        mine = self.lanes.rows[lanes]
        result: NDArray[np.bool_] = mine["is_attached"] & (mine["cursor"] != NONE)
        return result

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
            if self._behind:
                self._catch_up(mine[is_right], (start + number)[is_right])
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
        self.rows_received += total
        self.acknowledgements.note(lanes, counts, total)
        everybody = lanes
        while lanes.size:
            chunk = table["head"][lanes]
            mine = chunks[chunk]
            received = table["received"][lanes]
            piece = np.minimum(counts, mine["stop"] - received)
            table["received"][lanes] = received + piece
            finished = received + piece == mine["stop"]
            owners, done, after = lanes[finished], chunk[finished], mine["next"][finished]
            table["head"][owners] = after
            if self._trailing:
                rare = self.lanes.rare[owners]
                # Whoever was not given the inputs has nothing to keep.
                stays = rare["trails"] & (mine["first"][finished] >= rare["inputs_from"])
                self.kept.keep(owners[stays], done[stays], self._calls)
                owners, done, after = owners[~stays], done[~stays], after[~stays]
            table["tail"][owners[after == NONE]] = NONE
            self._hand_over(mine, mine["row"] + received - mine["first"], piece, source, outputs)
            self._chunks.give(done)
            more = counts > piece
            lanes, counts, source = lanes[more], (counts - piece)[more], (source + piece)[more]
        if self._trailing:
            self.kept.forget(everybody)

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

    # -- what is kept to be sent again -----------------------------------------------

    def secure(self, lanes: Numbers, steps: Numbers) -> Numbers:
        """The server says that so many steps of these lanes are durable: [lanes], [lanes].

        Returns the lanes where that cannot be right: so many were never sent.
        """
        known = lanes < len(self.lanes)
        known[known] = (self.lanes["is_attached"] & self.lanes.rare["keeps"])[lanes[known]]
        lanes, steps = lanes[known], steps[known]
        is_right = steps <= self.lanes["sent"][lanes]
        np.maximum.at(self.lanes.rare["durable"], lanes[is_right], steps[is_right])
        self.kept.forget(np.unique(lanes[is_right]))
        self._unstall()
        return lanes[~is_right]

    def _unstall(self) -> None:
        self._ready += self._stalled
        self._stalled.clear()

    def restore(self, lane: int, call: Call) -> None:
        """Keep the inputs of a call as if they had been given and answered just before now."""
        row, count = self.lanes.rows[lane], int(call.counts[0])
        chunk = self._chunks.take(1)
        fresh = np.zeros(1, self._chunks.rows.dtype)
        first = row["received"] - count
        fresh["first"], fresh["stop"], fresh["next"] = first, row["received"], NONE
        fresh["call"] = call.number
        self._chunks.rows[chunk] = fresh
        self.kept.keep(np.array([lane]), chunk, {call.number: call})
        row["tail"], self.lanes.rare["inputs_from"][lane] = chunk[0], first
        if row["is_attached"]:
            row["cursor"] = self._find(lane, int(row["sent"]))
            self._ready.append(np.array([lane]))

    def _catch_up(self, lanes: Numbers, stops: Numbers) -> None:
        """Answers have come up to these steps, of lanes that may have them already."""
        mine = self.lanes.rare[lanes]
        received = self.lanes["received"][lanes]
        still = np.clip(received - stops, 0, mine["behind"])
        gained = int((mine["behind"] - still).sum())
        self.acknowledgements.note_again(lanes, received - mine["behind"], received - still)
        self.in_flight -= gained
        self._behind -= gained
        self.lanes.rare["behind"][lanes] = still
        for lane in lanes[(still == 0) & mine["trails"] & ~mine["keeps"]].tolist():
            self._set_trailing(lane, trails=False)
            self.kept.forget(np.array([lane]))

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
        self.keep(lane, is_keeping=False)
        self._cut(lane, error, error)
        self.detach(lane)
        self.acknowledgements.hold(lane, is_holding=False)
        self.lanes["has_ended"][lane] = True
        self._ends[lane] = error
        self._unstall()

    def _cut(self, lane: int, error: SluiceError, later: SluiceError) -> None:
        """Forget what has not been answered: `error` for the first call, `later` for the rest."""
        self.admit()
        row, rare, chunks = self.lanes.rows[lane], self.lanes.rare[lane], self._chunks.rows
        step, chunk = int(row["received"]), int(row["head"])
        if row["is_attached"]:
            self.in_flight -= int(row["sent"]) - step + int(rare["behind"])
            self._behind -= int(rare["behind"])
        rare["behind"] = 0
        row["sent"] = row["end"] = step
        row["head"] = row["cursor"] = NONE
        dropped: list[int] = []
        while chunk != NONE:
            mine = chunks[chunk]
            begin, stop = max(step, int(mine["first"])), int(mine["stop"])
            number, position, after = int(mine["call"]), int(mine["position"]), int(mine["next"])
            if rare["trails"] and int(mine["first"]) < step:
                # Its first steps have been applied, and may have to be again.
                mine["stop"] = step
                self.kept.keep(np.array([lane]), np.array([chunk]), self._calls)
            else:
                dropped.append(chunk)
            self._fail(number, position, stop - begin, error.at(error.sequence_id, begin))
            chunk, error = after, later
        self._chunks.give(np.array(dropped, np.int64))
        row["tail"] = rare["newest"] if rare["oldest"] != NONE else NONE
        if row["tail"] != NONE:
            chunks["next"][row["tail"]] = NONE
        self._set_trailing(lane, trails=bool(rare["keeps"]))
        self.kept.forget(np.array([lane]))

    def _fail(self, number: int, position: int, rows: int, error: SluiceError) -> None:
        call = self._calls[number]
        call.errors[position] = error
        self._count_down(call, rows)

    def _count_down(self, call: Call, rows: int) -> None:
        call.rows_left -= rows
        if not call.rows_left:
            del self._calls[call.number]
            call.finish()
