"""Steps on their way from callers to the server: numbers them, and cuts frames out of them."""

import numpy as np
from numpy.typing import NDArray

from sluice_client.errors import SluiceError
from sluice_client.protocol.calls import Call, OutstandingCalls, concatenate
from sluice_client.protocol.frames import Frame, gather, join
from sluice_client.protocol.replay_buffer import ReplayBuffer
from sluice_client.protocol.tables import NONE, Numbers, Table, first_occurrences, passes


class SendQueue:
    """The calls that were submitted, and the lanes that have something to send."""

    def __init__(
        self, lanes: Table, chunks: Table, calls: OutstandingCalls, replay_buffer: ReplayBuffer
    ) -> None:
        self._lanes = lanes
        self._chunks = chunks
        self._calls = calls
        self._replay_buffer = replay_buffer
        # Calls whose steps have no numbers yet.
        self._submitted: list[Call] = []
        # Lanes that may have something to send.
        self._ready: list[Numbers] = []
        # Lanes that may send no more until something is durable.
        self._stalled: list[Numbers] = []
        # Why lanes have ended: what is submitted to them fails.
        self.end_errors: dict[int, SluiceError] = {}

    @property
    def may_have_frame(self) -> bool:
        """Some step may be waiting to be sent."""
        return bool(self._submitted or self._ready)

    def submit(self, call: Call) -> None:
        """Add the steps of a call behind those submitted before."""
        self._submitted.append(call)

    def add_ready(self, lane: int) -> None:
        """This lane may have something to send."""
        self._ready.append(np.array([lane]))

    def unstall(self) -> None:
        """Look again at the lanes that wait until something is durable."""
        self._ready += self._stalled
        self._stalled.clear()

    def number_steps(self) -> None:
        """Number the steps of all calls submitted since the last time, in one pass."""
        if not self._submitted:
            return
        calls, self._submitted = self._submitted, []
        self._calls.update((call.number, call) for call in calls)
        lanes, counts, numbers, positions, rows = concatenate(calls)
        # Each lane once in a pass, so that a chunk may follow another of the same lane.
        for index in passes(lanes):
            self._append(lanes[index], counts[index], numbers[index], positions[index], rows[index])

    def _append(
        self, lanes: Numbers, counts: Numbers, calls: Numbers, positions: Numbers, rows: Numbers
    ) -> None:
        """Append one chunk to each of `lanes`; fail those of lanes that have ended."""
        table, chunks = self._lanes.rows, self._chunks
        first = table["end"][lanes]
        leading = positions == 0
        for number, step in zip(calls[leading].tolist(), first[leading].tolist(), strict=True):
            self._calls[number].first_step = step
        ended = table["has_ended"][lanes]
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                error = self.end_errors[int(lanes[index])]
                error = error.at(error.sequence_id, error.step)
                self._calls.fail(
                    int(calls[index]), int(positions[index]), int(counts[index]), error
                )
            alive = ~ended
            lanes, counts, first = lanes[alive], counts[alive], first[alive]
            calls, positions, rows = calls[alive], positions[alive], rows[alive]
        chunk = chunks.allocate(len(lanes))
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

    def next_frame(self, rows_max: int, chunk_steps_max: int, step_bytes: int = 0) -> Frame | None:
        """The next frame of at most `rows_max` steps; its steps count as sent.

        Lanes take turns: a long chunk does not delay another lane's single step.
        """
        self.number_steps()
        if not self._ready:
            return None
        lanes = np.concatenate(self._ready)
        lanes = lanes[first_occurrences(lanes)]
        lanes = lanes[self._may_send(lanes)]
        table = self._lanes.rows
        picked: list[Frame] = []
        waiting: list[Numbers] = []
        while lanes.size and rows_max > 0:
            chunk = table["cursor"][lanes]
            stop = self._chunks["stop"][chunk]
            if self._replay_buffer.lanes_awaiting:
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
                lanes, chunk = lanes[sends], chunk[sends]
                first, counts = first[sends], counts[sends]
            mine = self._chunks.rows[chunk]
            retained = self._replay_buffer.sources
            picked.append(gather(lanes, mine, first, counts, self._calls, retained))
            table["sent"][lanes] = sent = first + counts
            finished = sent == self._chunks["stop"][chunk]
            table["cursor"][lanes] = np.where(finished, self._chunks["next"][chunk], chunk)
            rows_max -= int(counts.sum())
            lanes = lanes[table["cursor"][lanes] != NONE]
        waiting.append(lanes)
        self._ready = [lanes for lanes in waiting if lanes.size]
        return join(picked)

    def _stall(
        self, lanes: Numbers, chunk: Numbers, stop: Numbers, step_bytes: int
    ) -> tuple[Numbers, Numbers, Numbers]:
        """Leave out the lanes that have to wait for Durable, and cut what the others may send."""
        limit = self._replay_buffer.send_limits(lanes, step_bytes)
        may_send = self._lanes["sent"][lanes] < limit
        if not may_send.all():
            self._stalled.append(lanes[~may_send])
        return lanes[may_send], chunk[may_send], np.minimum(stop, limit)[may_send]

    def _may_send(self, lanes: Numbers) -> NDArray[np.bool_]:
        mine = self._lanes.rows[lanes]
        result: NDArray[np.bool_] = mine["is_attached"] & (mine["cursor"] != NONE)
        return result
