"""A TCP forwarder on the loopback interface that breaks what passes through it, on demand.

It runs an event loop in a thread of its own; all its methods may be called from any thread.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

T = TypeVar("T")

_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST, what is unsent is lost


class Way(Enum):
    """Which way bytes go."""

    THERE = "there"  # from who connects to the target
    BACK = "back"


@dataclass(eq=False)
class _Connection:
    near: socket.socket
    far: socket.socket
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    ways_ended: int = 0
    is_stranded: bool = False
    is_over: bool = False


class Proxy:
    """Forwards to `target` (`host:port`), which may change; breaks things between."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.connections = 0
        # Bytes that have gone each way.
        self.passed = dict.fromkeys(Way, 0)
        self._live: set[_Connection] = set()
        self._delay = 0.0
        self._is_refusing = False
        self._cut_after: dict[Way, int] = {}
        self._loop = asyncio.new_event_loop()
        self._may_pass = {way: asyncio.Event() for way in Way}
        for gate in self._may_pass.values():
            gate.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="chaos proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What can be done to the connections.

    def cut(self, count: int | None = None) -> int:
        """Break all connections, or so many, whatever is on its way; how many there were."""
        return self._call(lambda: self._cut(count))

    def strand(self) -> int:
        """Let nothing more pass on the connections there are; only their ends can find out."""

        def begin() -> int:
            for connection in self._live:
                connection.is_stranded = True
            return len(self._live)

        return self._call(begin)

    def cut_after(self, way: Way, size: int) -> None:
        """Once `size` more bytes have gone one way on whichever connection, break that one."""
        self._call(lambda: self._cut_after.update({way: size}))

    def hold(self, *ways: Way) -> None:
        """Let nothing pass (one way), silently: who sends cannot tell. `heal` lets it go on."""
        self._call(lambda: [self._may_pass[way].clear() for way in ways or Way])

    def delay(self, seconds: float) -> None:
        """Hold everything up for so long."""
        self._call(lambda: setattr(self, "_delay", seconds))

    def refuse(self) -> None:
        """Break all connections, and each new one as soon as it is made."""

        def begin() -> None:
            self._is_refusing = True
            self._cut()

        self._call(begin)

    def heal(self) -> None:
        """Pass everything on again; connections that were broken stay so."""

        def end() -> None:
            self._delay, self._is_refusing = 0.0, False
            self._cut_after.clear()
            for gate in self._may_pass.values():
                gate.set()

        self._call(end)

    def close(self) -> None:
        """Break everything and listen no more."""
        if self._thread.is_alive():
            self._call(self._cut)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._listener.close()

    # The thread's own.

    def _call(self, action: Callable[[], T]) -> T:
        """What `action` returns, called in the loop's thread."""

        async def act() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        accepting = self._loop.create_task(self._accept())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        assert accepting.done()
        self._loop.close()

    async def _accept(self) -> None:
        while True:
            near, _ = await self._loop.sock_accept(self._listener)
            self.connections += 1
            near.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._is_refusing or not self.target:
                _abort(near)
                continue
            task = self._loop.create_task(self._connect(near))
            task.add_done_callback(_retrieve)

    async def _connect(self, near: socket.socket) -> None:
        far = socket.socket()
        far.setblocking(False)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Whoever took the target away meanwhile has left nothing to connect to.
        host, _, port = (self.target or "127.0.0.1:1").rpartition(":")
        try:
            await self._loop.sock_connect(far, (host, int(port)))
        except OSError:
            _abort(far)
            _abort(near)
            return
        connection = _Connection(near, far)
        if self._is_refusing:
            self._break(connection)
            return
        self._live.add(connection)
        for way, source, sink in ((Way.THERE, near, far), (Way.BACK, far, near)):
            task = self._loop.create_task(self._forward(connection, way, source, sink))
            connection.tasks.append(task)

    async def _forward(
        self, connection: _Connection, way: Way, source: socket.socket, sink: socket.socket
    ) -> None:
        try:
            while data := await self._loop.sock_recv(source, 65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await self._may_pass[way].wait()
                if connection.is_stranded:
                    await asyncio.Event().wait()  # until it is broken
                data, is_last = self._toll(way, data)
                await self._loop.sock_sendall(sink, data)
                self.passed[way] += len(data)
                if is_last:
                    self._break(connection)
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._break(connection)
            return
        connection.ways_ended += 1
        if connection.ways_ended == len(Way) and not connection.is_over:
            connection.is_over = True
            self._live.discard(connection)
            source.close()
            sink.close()

    def _toll(self, way: Way, data: bytes) -> tuple[bytes, bool]:
        """What of `data` may still pass, and whether the connection is to break after it."""
        left = self._cut_after.get(way)
        if left is None:
            return data, False
        if len(data) < left:
            self._cut_after[way] = left - len(data)
            return data, False
        del self._cut_after[way]
        return data[:left], True

    def _cut(self, count: int | None = None) -> int:
        live = list(self._live)[:count]
        for connection in live:
            self._break(connection)
        return len(live)

    def _break(self, connection: _Connection) -> None:
        if connection.is_over:
            return
        connection.is_over = True
        self._live.discard(connection)
        current = asyncio.current_task(self._loop)
        for task in connection.tasks:
            if task is not current:
                task.cancel()
        for end in (connection.near, connection.far):
            # Whoever waits for it in the loop must have let go of it before it is closed.
            self._loop.remove_reader(end)
            self._loop.remove_writer(end)
            _abort(end)


def _abort(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    end.close()


def _retrieve(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.result()
