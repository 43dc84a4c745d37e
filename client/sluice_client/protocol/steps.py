"""The steps of all lanes: submitted by callers, sent to the server, and answered.

Works on arrays, for thousands of lanes at once, and knows nothing of messages or
statuses. `columns` explains the counts that are stored for each lane.
"""

import numpy as np

from sluice_client.errors import SluiceError, StepDiscarded
from sluice_client.protocol.acknowledgements import Acknowledgements
from sluice_client.protocol.calls import Call, OutstandingCalls
from sluice_client.protocol.columns import CHUNK, LANE, LANE_RARE
from sluice_client.protocol.frames import Frame
from sluice_client.protocol.replay_buffer import Bounds, ReplayBuffer
from sluice_client.protocol.send_queue import SendQueue
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import NONE, Numbers, Table, passes


class Steps:
    """All lanes of one connection, with the steps that are under way."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.lanes = Table(LANE, LANE_RARE)
        self._chunks = Table(CHUNK)
        self.acknowledgements = Acknowledgements(self.lanes)
        self.replay_buffer = ReplayBuffer(self.lanes, self._chunks, bounds)
        self._calls = OutstandingCalls()
        self.queue = SendQueue(self.lanes, self._chunks, self._calls, self.replay_buffer)
        # Steps that were sent and not answered.
        self.in_flight = 0
        # Outputs that have arrived, ever.
        self.rows_received = 0
        # The sum of `behind` over attached lanes.
        self._behind = 0

    # -- lanes ----------------------------------------------------------------

    def allocate(self, count: int) -> Numbers:
        """The numbers of `count` free lanes."""
        lanes = self.lanes.allocate(count)
        rows, rare = np.zeros(count, self.lanes.rows.dtype), np.zeros(count, self.lanes.rare.dtype)
        rows["head"] = rows["cursor"] = rows["tail"] = NONE
        rare["oldest"] = rare["newest"] = NONE
        self.lanes.rows[lanes], self.lanes.rare[lanes] = rows, rare
        return lanes

    def free(self, lane: int) -> None:
        """The inverse of `allocate`, for a lane without steps under way."""
        self.queue.end_errors.pop(lane, None)
        self.lanes["is_attached"][lane] = False
        self.lanes.free(np.array([lane]))

    def start_at(self, lane: int, step: int, durable: int, inputs_from: int) -> None:
        """A new lane's sequence has `step` outputs already, and inputs from `inputs_from` on."""
        row, rare = self.lanes.rows[lane], self.lanes.rare[lane]
        row["received"] = row["sent"] = row["end"] = rare["confirmed"] = step
        rare["durable"], rare["inputs_from"] = durable, inputs_from

    def attach(self, lane: int, applied: int, durable: int) -> None:
        """Send from step `applied` on; outputs before it that have not arrived will come."""
        self.queue.number_steps()
        row, rare = self.lanes.rows[lane], self.lanes.rare[lane]
        received = int(row["received"])
        behind = received - min(self.acknowledgements.acknowledged(lane), applied)
        if rare["awaits_durable"]:
            rare["durable"] = max(int(rare["durable"]), min(durable, applied))
        else:
            rare["durable"] = min(received, applied)
        rare["behind"], row["sent"], row["is_attached"] = behind, applied, True
        self._behind += behind
        self.in_flight += applied - received + behind
        is_retaining = bool(rare["awaits_durable"]) or behind > 0
        self.replay_buffer.set_retaining(lane, is_retaining=is_retaining)
        self.replay_buffer.release(np.array([lane]))
        row["cursor"] = self.replay_buffer.chunk_at(lane, applied)
        self.queue.add_ready(lane)

    def detach(self, lane: int) -> None:
        """Send nothing more: what was under way may be lost."""
        row, behind = self.lanes.rows[lane], int(self.lanes.rare["behind"][lane])
        if row["is_attached"]:
            self.in_flight -= int(row["sent"] - row["received"]) + behind
            self._behind -= behind
            row["sent"], row["is_attached"] = row["received"], False

    def received(self, lane: int) -> int:
        """The outputs that have arrived, counted from the sequence's start."""
        return int(self.lanes["received"][lane])

    def submitted(self, lane: int) -> int:
        """The steps that callers have submitted, counted from the sequence's start."""
        self.queue.number_steps()
        return int(self.lanes["end"][lane])

    def lacks_inputs(self, lane: int, step: int) -> bool:
        """Inputs from this step on were submitted to another handle, not to this one."""
        return bool(step < self.lanes.rare["inputs_from"][lane])

    def is_fresh(self, lane: int) -> bool:
        """Nothing was submitted to this lane yet."""
        received = self.received(lane)
        return bool(self.lanes.rare["inputs_from"][lane] == received == self.submitted(lane))

    def is_idle(self, lane: int) -> bool:
        """All submitted steps are answered, and are applied at this server."""
        self.queue.number_steps()
        row = self.lanes.rows[lane]
        is_caught_up = not self.lanes.rare["behind"][lane]
        return bool(row["received"] == row["sent"] == row["end"] and is_caught_up)

    # -- from the caller to the server ------------------------------------------

    def next_frame(self, rows_max: int, chunk_steps_max: int, step_bytes: int = 0) -> Frame | None:
        """The next frame of at most `rows_max` steps; its steps count as sent."""
        frame = self.queue.next_frame(rows_max, chunk_steps_max, step_bytes)
        if frame is not None:
            self.in_flight += int(frame.counts.sum())
        return frame

    # -- from the server to the caller ------------------------------------------

    def deliver(
        self, lanes: Numbers, first: Numbers, counts: Numbers, outputs: list[Array]
    ) -> Numbers:
        """Hand outputs to the calls that wait for them: [chunks], [chunks], [chunks], [rows, …].

        Drops outputs that have arrived before, and those of lanes that are not attached.
        Returns the lanes whose outputs are wrong: they left a gap, or answer steps that
        were never sent.
        """
        source = np.cumsum(counts) - counts
        known = lanes < len(self.lanes)
        known[known] = self.lanes["is_attached"][lanes[known]]
        if not known.all():
            lanes, first, counts, source = lanes[known], first[known], counts[known], source[known]
        wrong: list[Numbers] = []
        for index in passes(lanes):
            mine, start, number, origin = lanes[index], first[index], counts[index], source[index]
            rows = self.lanes.rows[mine]
            skip = np.minimum(np.maximum(rows["received"] - start, 0), number)
            is_right = (start + skip <= rows["received"]) & (start + number <= rows["sent"])
            wrong.append(mine[~is_right])
            if self._behind:
                self._catch_up(mine[is_right], (start + number)[is_right])
            is_new = is_right & (number > skip)
            self._deliver(mine[is_new], (number - skip)[is_new], (origin + skip)[is_new], outputs)
        return np.concatenate(wrong) if wrong else lanes

    def _deliver(
        self, lanes: Numbers, counts: Numbers, source: Numbers, outputs: list[Array]
    ) -> None:
        """Hand over the outputs after `received`, cut where one chunk ends and the next begins."""
        table, chunks = self.lanes.rows, self._chunks.rows
        is_retaining = self.replay_buffer.lanes_retaining
        total = int(counts.sum())
        self.in_flight -= total
        self.rows_received += total
        self.acknowledgements.add(lanes, counts, total)
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
            if is_retaining:
                rare = self.lanes.rare[owners]
                # Inherited chunks have no inputs to retain.
                stays = rare["retains"] & (mine["first"][finished] >= rare["inputs_from"])
                self.replay_buffer.retain(owners[stays], done[stays], self._calls)
                owners, done, after = owners[~stays], done[~stays], after[~stays]
            table["tail"][owners[after == NONE]] = NONE
            rows = mine["row"] + received - mine["first"]
            self._calls.deliver(mine, rows, piece, source, outputs)
            self._chunks.free(done)
            more = counts > piece
            lanes, counts, source = lanes[more], (counts - piece)[more], (source + piece)[more]
        if is_retaining:
            self.replay_buffer.release(everybody)

    # -- replay -----------------------------------------------------------------

    def mark_durable(self, lanes: Numbers, steps: Numbers) -> Numbers:
        """The server says that so many steps of these lanes are durable: [lanes], [lanes].

        Returns the lanes for which that is wrong: so many steps were never sent.
        """
        wrong = self.replay_buffer.mark_durable(lanes, steps)
        self.queue.unstall()
        return wrong

    def restore_inputs(self, lane: int, call: Call) -> None:
        """Retain the inputs of a call as if they had been answered just before `received`."""
        self.replay_buffer.insert(lane, call)
        row = self.lanes.rows[lane]
        if row["is_attached"]:
            row["cursor"] = self.replay_buffer.chunk_at(lane, int(row["sent"]))
            self.queue.add_ready(lane)

    def _catch_up(self, lanes: Numbers, stops: Numbers) -> None:
        """Outputs up to these steps have arrived, perhaps again."""
        mine = self.lanes.rare[lanes]
        received = self.lanes["received"][lanes]
        still = np.clip(received - stops, 0, mine["behind"])
        gained = int((mine["behind"] - still).sum())
        self.acknowledgements.add_repeated(lanes, received - mine["behind"], received - still)
        self.in_flight -= gained
        self._behind -= gained
        self.lanes.rare["behind"][lanes] = still
        for lane in lanes[(still == 0) & mine["retains"] & ~mine["awaits_durable"]].tolist():
            self.replay_buffer.set_retaining(lane, is_retaining=False)
            self.replay_buffer.release(np.array([lane]))

    # -- failures -----------------------------------------------------------------

    def refuse(self, lane: int, error: SluiceError) -> None:
        """The server refused step `received`: discard the steps behind it, and rewind the lane."""
        later = StepDiscarded(
            f"step {self.received(lane)} failed before it: {error.message}",
            sequence_id=error.sequence_id,
            reason=error.reason,
        )
        self._truncate(lane, error, later)

    def end(self, lane: int, error: SluiceError) -> None:
        """No more outputs will come: fail the steps under way, and all submitted later."""
        self.replay_buffer.await_durable(lane, is_awaiting=False)
        self._truncate(lane, error, error)
        self.detach(lane)
        self.acknowledgements.await_confirm(lane, is_awaiting=False)
        self.lanes["has_ended"][lane] = True
        self.queue.end_errors[lane] = error
        self.queue.unstall()

    def _truncate(self, lane: int, error: SluiceError, later: SluiceError) -> None:
        """Drop the unanswered steps: `error` for the first chunk, `later` for the rest."""
        self.queue.number_steps()
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
            if rare["retains"] and int(mine["first"]) < step:
                # Its first steps were applied, and may have to be replayed.
                mine["stop"] = step
                self.replay_buffer.retain(np.array([lane]), np.array([chunk]), self._calls)
            else:
                dropped.append(chunk)
            self._calls.fail(number, position, stop - begin, error.at(error.sequence_id, begin))
            chunk, error = after, later
        self._chunks.free(np.array(dropped, np.int64))
        row["tail"] = rare["newest"] if rare["oldest"] != NONE else NONE
        if row["tail"] != NONE:
            chunks["next"][row["tail"]] = NONE
        self.replay_buffer.set_retaining(lane, is_retaining=bool(rare["awaits_durable"]))
        self.replay_buffer.release(np.array([lane]))
