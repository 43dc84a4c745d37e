"""The proxy of the harness does to a connection what it says."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.chaos.proxy import Proxy, Way


@contextmanager
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    while data := connection.recv(65536):
                        connection.sendall(data)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += (piece := connection.recv(size - len(data)))
        assert piece
    return data


def is_broken(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def is_refused(proxy: Proxy) -> bool:
    try:
        with connect(proxy) as connection:
            return is_broken(connection)
    except ConnectionError:
        return True


def test_what_is_sent_arrives_and_the_end_of_it_too() -> None:
    with echo() as target, Proxy(target) as proxy, connect(proxy) as connection:
        data = bytes(range(256)) * 4096
        threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
        assert read(connection, len(data)) == data
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_cut_breaks_what_is_there_and_lets_new_connections_in() -> None:
    with echo() as target, Proxy(target) as proxy, connect(proxy) as first:
        first.sendall(b"a")
        assert read(first, 1) == b"a"
        assert proxy.cut() == 1
        assert is_broken(first)
        with connect(proxy) as second:
            second.sendall(b"b")
            assert read(second, 1) == b"b"


def test_what_is_held_arrives_once_it_is_healed() -> None:
    with echo() as target, Proxy(target) as proxy, connect(proxy) as connection:
        proxy.hold(Way.BACK)
        connection.sendall(b"held")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        proxy.heal()
        assert read(connection, 4) == b"held"


def test_a_message_is_cut_where_it_was_asked() -> None:
    with echo() as target, Proxy(target) as proxy, connect(proxy) as connection:
        proxy.cut_after(Way.BACK, 3)
        connection.sendall(b"abcdef")
        received = b""
        with suppress(ConnectionError):
            while piece := connection.recv(6):
                received += piece
        assert b"abc".startswith(received)


def test_refused_connections_break_until_it_is_healed() -> None:
    with echo() as target, Proxy(target) as proxy:
        proxy.refuse()
        assert is_refused(proxy)
        proxy.heal()
        proxy.delay(0.001)
        with connect(proxy) as connection:
            connection.sendall(b"late")
            assert read(connection, 4) == b"late"


def test_a_target_that_is_not_there_breaks_the_connection_and_another_may_be_named() -> None:
    with echo() as target, Proxy("127.0.0.1:1") as proxy:
        assert is_refused(proxy)
        proxy.target = target
        with connect(proxy) as connection:
            connection.sendall(b"x")
            assert read(connection, 1) == b"x"
