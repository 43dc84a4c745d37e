"""How a channel to a server is configured."""

from collections.abc import Iterable
from typing import Final

# The largest response that this client takes; the server splits larger ones.
RESPONSE_BYTES_MAX: Final = 64 * 2**20

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX + 2**16),
    # Servers allow a ping every 10 s, also without calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The stream's own back-off decides when to try again, not the channel's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # Two clients of one process must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
)


def read_addresses(address: str | Iterable[str]) -> list[str]:
    """The addresses of a client, each a gRPC target such as `host:port` or `dns:///name:port`."""
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses or not all(addresses):
        raise ValueError("give an address, such as 127.0.0.1:8001, or a list of them")
    return addresses
