"""Which outputs the server may forget, and has not been told of yet."""

import numpy as np

from sluice_client.protocol.tables import Numbers, Table


class Acknowledgements:
    """The outputs of the ledger's lanes that have arrived since the server was last told.

    The outputs of a lane that *holds* may be forgotten only when its caller has
    confirmed them; those of any other as soon as they have arrived.
    """

    def __init__(self, lanes: Table) -> None:
        self._lanes = lanes
        self._touched: list[Numbers] = []
        self._holding = 0
        # Outputs to tell of, of all lanes.
        self.count = 0

    @property
    def is_by_response(self) -> bool:
        """All outputs of a response may be acknowledged together, by the responses' number."""
        return not self._holding

    @property
    def bytes_max(self) -> int:
        """What `entries` takes in a message, at most."""
        return 0 if self.is_by_response else 20 * sum(map(len, self._touched))

    def hold(self, lane: int, *, is_holding: bool) -> None:
        """Say whether this lane holds."""
        rare = self._lanes.rare[lane]
        self._holding += int(is_holding) - int(rare["holds"])
        rare["holds"] = is_holding

    def most_held(self, lanes: Numbers, counts: Numbers) -> int:
        """The longest chunk for a lane that holds: [chunks], [chunks]."""
        return int((counts * self._lanes.rare["holds"][lanes]).max()) if self._holding else 0

    def note(self, lanes: Numbers, counts: Numbers, total: int) -> None:
        """So many outputs have arrived: [lanes], [lanes], and their sum."""
        if self._holding:
            counts = np.where(self._lanes.rare["holds"][lanes], 0, counts)
            total = int(counts.sum())
        self.count += total
        self._lanes["unacknowledged"][lanes] += counts
        self._touched.append(lanes)

    def note_again(self, lanes: Numbers, first: Numbers, stop: Numbers) -> None:
        """Outputs from `first` to `stop` have come again: the server holds them again."""
        rare = self._lanes.rare[lanes]
        limit = np.where(rare["holds"], rare["confirmed"], stop)
        counts = np.minimum(stop, limit) - np.minimum(first, limit)
        self.count += int(counts.sum())
        self._lanes["unacknowledged"][lanes] += counts
        self._touched.append(lanes)

    def confirm(self, lane: int, step: int) -> None:
        """The outputs before `step` are safe with the caller of a lane that holds."""
        row, rare = self._lanes.rows[lane], self._lanes.rare[lane]
        count = min(step, int(row["received"])) - int(rare["confirmed"])
        if count > 0:
            rare["confirmed"] += count
            row["unacknowledged"] += count
            self.count += count
            self._touched.append(np.array([lane]))

    def told(self, lane: int) -> int:
        """What a RESUME says of the outputs that have arrived: the server forgets them then."""
        rare = self._lanes.rare[lane]
        return int(rare["confirmed"] if rare["holds"] else self._lanes["received"][lane])

    def is_due(self, lanes: Numbers, steps_max: int) -> bool:
        """The server may soon stop running one of `lanes` for want of an acknowledgement."""
        lanes = lanes[lanes < len(self._lanes)]
        held = self._lanes["unacknowledged"][lanes]
        if self._holding:
            rare = self._lanes.rare[lanes]
            unconfirmed = self._lanes["received"][lanes] - rare["confirmed"]
            held = np.where(rare["holds"] & (held > 0), held + unconfirmed, held)
        lanes = lanes[2 * held >= steps_max]
        answered = self._lanes["received"][lanes] - self._lanes.rare["behind"][lanes]
        return bool(np.any(self._lanes["sent"][lanes] > answered))

    def entries(self) -> tuple[Numbers, Numbers]:
        """What to tell the server lane by lane: lanes and steps, both [lanes]."""
        lanes = np.unique(np.concatenate(self._touched))
        mine, rare = self._lanes.rows[lanes], self._lanes.rare[lanes]
        news = mine["is_attached"] & (mine["unacknowledged"] > 0)
        steps = np.where(rare["holds"], rare["confirmed"], mine["received"])
        return lanes[news], steps[news]

    def clear(self) -> None:
        """The server is being told of all of them."""
        for lanes in self._touched:
            self._lanes["unacknowledged"][lanes] = 0
        self._touched.clear()
        self.count = 0
