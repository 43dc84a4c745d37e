"""Decides whether to wait a few turns of the event loop for more messages, without a timer.

Clients have many messages in flight, but one turn of the event loop reads only a few of them.
A run for each of them alone would cost several times as much as one run for all.
"""

_QUIET_TURNS = 8  # where waiting helps, a run waits until this many turns have brought nothing …
_TURNS_MAX = 128  # … and for this many turns at most
_TRIED_AGAIN = 32  # where waiting does not help, it is tried again after this many runs


class Arrivals:
    """Learns from past runs whether waiting for more messages helps."""

    def __init__(self) -> None:
        self.count = 0
        self._seen = self._first = 0
        self._turns = self._quiet = 0
        self._is_patient = False
        self._runs = 0  # runs until waiting is tried again

    def may_bring_more(self) -> bool:
        """True to wait for another turn. Call it once per turn while messages wait."""
        if not self._turns:
            self._first = self._seen = self.count
            self._is_patient = self._is_patient or self._runs <= 0
        elif self._seen != self.count:
            self._seen, self._quiet = self.count, 0
        if self._is_patient and self._quiet < _QUIET_TURNS and self._turns < _TURNS_MAX:
            self._turns += 1
            self._quiet += 1
            return True
        self._is_patient = self._is_patient and self.count > self._first
        self._runs = _TRIED_AGAIN if self._turns else self._runs - 1
        self._turns = self._quiet = 0
        return False
