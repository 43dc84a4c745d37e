"""Counts the time in which this process was awake, so that a pause does not age sequences."""

import time
from collections.abc import Callable


class AwakeClock:
    """Seconds awake since it was made, if it is read at least every `gap_max` seconds.

    Time beyond `gap_max` between two reads counts as a pause of the process: SIGSTOP, a
    suspended machine, a debugger.
    """

    def __init__(
        self, *, gap_max: float = 2.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        self._gap_max = gap_max
        self._last = monotonic()
        self._awake = 0.0

    def now(self) -> float:
        """Seconds awake."""
        current = self._monotonic()
        self._awake += min(current - self._last, self._gap_max)
        self._last = current
        return self._awake
