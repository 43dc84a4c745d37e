"""The servers of a client, and which of them is asked next."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from sluice_client.errors import from_status
from sluice_client.transport.questions import Question

Channel = TypeVar("Channel")


class BaseRoute(Generic[Channel]):
    """The channels to a client's servers: the present one is used as long as it answers."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._present = 0

    @property
    def servers(self) -> int:
        """The number of servers."""
        return len(self._channels)

    @property
    def channel(self) -> Channel:
        """The channel to the present server."""
        return self._channels[self._present]

    def turn(self) -> None:
        """Continue with the next server."""
        self._present = (self._present + 1) % len(self._channels)

    def _attempts(self) -> Iterator[int]:
        """How many attempts are left after each: every server is asked twice.

        A question changes nothing, and a connection may be broken without anybody's notice.
        """
        return reversed(range(2 * len(self._channels)))

    def _turn_or_raise(
        self, error: grpc.RpcError, question: Question[Any], attempts_left: int
    ) -> None:
        """Continue with the next server if that may help. Raises SluiceError otherwise."""
        if not attempts_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise from_status(
                error.code().name,
                error.details() or "",
                sequence_id=question.sequence_id,
                not_found=question.not_found,
            ) from None
        self.turn()
