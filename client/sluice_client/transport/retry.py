"""When to try again after a stream was lost, and when to give up."""

import random
from dataclasses import dataclass
from typing import Final

import grpc

from sluice_client.errors import SluiceError, Unavailable, from_status

_BACKOFF_SECONDS_FIRST: Final = 0.02
_BACKOFF_SECONDS_MAX: Final = 2.0
# Enough to reach the longest pause; without a limit 2**losses overflows after a long outage.
_DOUBLINGS_MAX: Final = 16

# After a stream that ended with one of these the next one may succeed.
_TRANSIENT: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# After these too, but only outputs count as progress between two of them.
_DOUBTFUL: Final = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


@dataclass(frozen=True, slots=True)
class Loss:
    """How a stream ended, or why none could be started."""

    code: grpc.StatusCode
    details: str
    # The server answered, or has even sent outputs.
    was_answered: bool = False
    had_outputs: bool = False
    # The server does not want this client now.
    is_refused: bool = False

    @property
    def asks_for_another(self) -> bool:
        """The next server should be tried."""
        is_silent = self.code is grpc.StatusCode.UNAVAILABLE and not self.was_answered
        return self.is_refused or is_silent

    def as_error(self) -> SluiceError:
        """The exception for everybody who waits for this stream."""
        return from_status(self.code.name, self.details)


class Backoff:
    """Says how long to wait before the next attempt, and when to give up."""

    def __init__(self, seconds_max: float, servers: int = 1) -> None:
        self._seconds_max = seconds_max
        self._servers = servers
        # The time of the first loss without progress since, and how many there were.
        self._since: float | None = None
        self._losses = 0

    def reset(self) -> None:
        """Forget all losses: the server is of use again."""
        self._since, self._losses = None, 0

    def after(self, loss: Loss, now: float) -> float | SluiceError:
        """Seconds until the next attempt (full jitter), or the error to give up with."""
        if loss.code not in _TRANSIENT | _DOUBTFUL:
            self.reset()
            return loss.as_error()
        has_progressed = loss.was_answered if loss.code in _TRANSIENT else loss.had_outputs
        if has_progressed or self._since is None:
            self._since, self._losses = now, 0
        elif now - self._since > self._seconds_max:
            seconds = now - self._since
            self.reset()
            return Unavailable(
                f"no server has answered for {seconds:.0f} s ({loss.details or loss.code.name}); "
                "steps that were under way may have been applied",
                reason=loss.code.name,
            )
        # The pause doubles when every server has been tried once more.
        rounds = min(self._losses // self._servers, _DOUBLINGS_MAX)
        self._losses += 1
        return random.uniform(0, min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_FIRST * 2**rounds))
