"""Judges whether messages that are about to arrive are worth waiting for, without a timer.

Clients have many messages under way, and few of them are read in one turn of the event
loop: a run of each alone would cost several times what they cost together.
"""

_QUIET_TURNS = 8  # where waiting pays, a run waits for this many turns that bring nothing …
_TURNS_MAX = 128  # … and for this many turns in all
_TRIED_AGAIN = 32  # where it does not pay, it is tried again after this many runs


class Arrivals:
    """Whether it is worth a few turns of the event loop to wait for more messages."""

    def __init__(self) -> None:
        self.count = 0
        self._seen = self._first = 0
        self._turns = self._quiet = 0
        self._is_patient = False
        self._runs = 0  # until waiting is tried again

    def may_bring_more(self) -> bool:
        """Asked once per turn while messages wait: True to wait for another turn."""
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
