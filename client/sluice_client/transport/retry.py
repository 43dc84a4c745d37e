"""How a client reaches its servers: addresses, channel options, and how long it keeps trying."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc

from sluice_client.errors import SluiceError, Unavailable, from_status

# The largest response this client takes; the server splits what would be larger.
RESPONSE_BYTES_MAX: Final = 64 * 2**20

# Servers allow a ping every 10 s, also without calls.
CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX + 2**16),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The stream's own back-off decides when to try again, not the channel's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # Two clients of one process must not share a connection's fate.
    ("grpc.use_local_subchannel_pool", 1),
)

# How long a question that changes nothing may take.
QUESTION_SECONDS_MAX: Final = 10.0

_BACKOFF_SECONDS_FIRST: Final = 0.02
_BACKOFF_SECONDS_MAX: Final = 2.0
# More than lead to the longest pause; after a long outage 2**losses is no float any more.
_DOUBLINGS_MAX: Final = 16

# A stream that ends so may do better next time.
_PASSING: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# These may too, but not if no step comes through between two of them.
_DOUBTFUL: Final = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


@dataclass(frozen=True, slots=True)
class Loss:
    """How a stream ended, or why there is none."""

    code: grpc.StatusCode
    details: str
    # The server was of use, or has even sent outputs.
    was_answered: bool = False
    had_outputs: bool = False
    # The server wants no more of this client now.
    is_refused: bool = False

    @property
    def asks_for_another(self) -> bool:
        """The next server may do better."""
        is_silent = self.code is grpc.StatusCode.UNAVAILABLE and not self.was_answered
        return self.is_refused or is_silent

    def as_error(self) -> SluiceError:
        """As the exception for everybody who waits for this stream."""
        return from_status(self.code.name, self.details)


def read_addresses(address: str | Iterable[str]) -> list[str]:
    """The addresses of a client, each a gRPC target such as `host:port` or `dns:///name:port`."""
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses or not all(addresses):
        raise ValueError("give an address, such as 127.0.0.1:8001, or a list of them")
    return addresses


class Patience:
    """Says how long to wait before the next stream, and when to give up."""

    def __init__(self, seconds_max: float, servers: int = 1) -> None:
        self._seconds_max = seconds_max
        self._servers = servers
        self._since: float | None = None
        self._losses = 0

    def rest(self) -> None:
        """All is well again."""
        self._since, self._losses = None, 0

    def after(self, loss: Loss, now: float) -> float | SluiceError:
        """Seconds until the next attempt (full jitter), or the error to give up with."""
        if loss.code not in _PASSING | _DOUBTFUL:
            self.rest()
            return loss.as_error()
        is_fresh = loss.was_answered if loss.code in _PASSING else loss.had_outputs
        if is_fresh or self._since is None:
            self._since, self._losses = now, 0
        elif now - self._since > self._seconds_max:
            seconds = now - self._since
            self.rest()
            return Unavailable(
                f"no server has answered for {seconds:.0f} s ({loss.details or loss.code.name}); "
                "steps that were under way may have been applied",
                reason=loss.code.name,
            )
        # Longer only when every server has been asked once more.
        rounds = min(self._losses // self._servers, _DOUBLINGS_MAX)
        self._losses += 1
        return random.uniform(0, min(_BACKOFF_SECONDS_MAX, _BACKOFF_SECONDS_FIRST * 2**rounds))
