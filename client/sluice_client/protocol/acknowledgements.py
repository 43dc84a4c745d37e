"""Which outputs are to be acknowledged, so that the server can forget them."""

import numpy as np

from sluice_client.protocol.tables import Numbers, Table


class Acknowledgements:
    """The outputs of all lanes that are not acknowledged yet.

    Outputs are acknowledged when they have arrived; those of a lane that *awaits
    confirm*, when its caller has confirmed them.
    """

    def __init__(self, lanes: Table) -> None:
        self._lanes = lanes
        # Lanes with outputs to acknowledge.
        self._touched: list[Numbers] = []
        # How many lanes await confirm.
        self._awaiting = 0
        # Outputs to acknowledge, of all lanes.
        self.count = 0

    @property
    def is_by_response(self) -> bool:
        """All outputs of a response are acknowledged together, by the number of responses."""
        return not self._awaiting

    @property
    def bytes_max(self) -> int:
        """The size of `entries` in a message, at most."""
        return 0 if self.is_by_response else 20 * sum(map(len, self._touched))

    def await_confirm(self, lane: int, *, is_awaiting: bool) -> None:
        """Set whether outputs of this lane are acknowledged only when they are confirmed."""
        rare = self._lanes.rare[lane]
        self._awaiting += int(is_awaiting) - int(rare["awaits_confirm"])
        rare["awaits_confirm"] = is_awaiting

    def longest_awaiting(self, lanes: Numbers, counts: Numbers) -> int:
        """The longest chunk for a lane that awaits confirm: [chunks], [chunks]."""
        if not self._awaiting:
            return 0
        return int((counts * self._lanes.rare["awaits_confirm"][lanes]).max())

    def add(self, lanes: Numbers, counts: Numbers, total: int) -> None:
        """Outputs have arrived: [lanes], [lanes], and the sum of the counts."""
        if self._awaiting:
            counts = np.where(self._lanes.rare["awaits_confirm"][lanes], 0, counts)
            total = int(counts.sum())
        self.count += total
        self._lanes["unacknowledged"][lanes] += counts
        self._touched.append(lanes)

    def add_repeated(self, lanes: Numbers, first: Numbers, stop: Numbers) -> None:
        """Outputs from `first` to `stop` have arrived again: the server holds them again."""
        rare = self._lanes.rare[lanes]
        limit = np.where(rare["awaits_confirm"], rare["confirmed"], stop)
        counts = np.minimum(stop, limit) - np.minimum(first, limit)
        self.count += int(counts.sum())
        self._lanes["unacknowledged"][lanes] += counts
        self._touched.append(lanes)

    def confirm(self, lane: int, step: int) -> None:
        """The caller has stored the outputs before `step` of a lane that awaits confirm."""
        row, rare = self._lanes.rows[lane], self._lanes.rare[lane]
        count = min(step, int(row["received"])) - int(rare["confirmed"])
        if count > 0:
            rare["confirmed"] += count
            row["unacknowledged"] += count
            self.count += count
            self._touched.append(np.array([lane]))

    def acknowledged(self, lane: int) -> int:
        """The outputs that a RESUME of this lane acknowledges."""
        rare = self._lanes.rare[lane]
        return int(rare["confirmed"] if rare["awaits_confirm"] else self._lanes["received"][lane])

    def is_due(self, lanes: Numbers, steps_max: int) -> bool:
        """The server may soon stop running one of `lanes` for want of an acknowledgement."""
        lanes = lanes[lanes < len(self._lanes)]
        held = self._lanes["unacknowledged"][lanes]
        if self._awaiting:
            rare = self._lanes.rare[lanes]
            unconfirmed = self._lanes["received"][lanes] - rare["confirmed"]
            held = np.where(rare["awaits_confirm"] & (held > 0), held + unconfirmed, held)
        lanes = lanes[2 * held >= steps_max]
        answered = self._lanes["received"][lanes] - self._lanes.rare["behind"][lanes]
        return bool(np.any(self._lanes["sent"][lanes] > answered))

    def entries(self) -> tuple[Numbers, Numbers]:
        """What to acknowledge lane by lane: lanes and steps, both [lanes]."""
        lanes = np.unique(np.concatenate(self._touched))
        mine, rare = self._lanes.rows[lanes], self._lanes.rare[lanes]
        chosen = mine["is_attached"] & (mine["unacknowledged"] > 0)
        steps = np.where(rare["awaits_confirm"], rare["confirmed"], mine["received"])
        return lanes[chosen], steps[chosen]

    def clear(self) -> None:
        """All of them have been acknowledged."""
        for lanes in self._touched:
            self._lanes["unacknowledged"][lanes] = 0
        self._touched.clear()
        self.count = 0
