"""What a test holds in its own hands: a server's clock, its models' runs, its store's answers."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from sluice_service.models.host import Host
from sluice_service.store import StoreError
from tests.service.wire import Served, eventually


class Hands:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def go(self, host: Host, seconds: float, *, tick: float = 1.0) -> None:
        """Let time pass with somebody asking at each tick, as a process that is awake does."""
        for _ in range(int(seconds / tick)):
            self.seconds += tick
            host.now()


class Gate(Executor):
    """Executes each run when it is let through."""

    def __init__(self) -> None:
        self.held: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function, /, *args, **kwargs):
        future: Future[Any] = Future()
        self.held.append((future, lambda: function(*args, **kwargs)))
        return future

    async def reached(self) -> None:
        """Return once a run stands at the gate."""
        await eventually(lambda: self.held)

    async def let_through(self) -> None:
        await self.reached()
        future, execute = self.held.popleft()
        future.set_result(execute())


class Late:
    """A method of a store that does what it is asked, and says so when it is let."""

    def __init__(self, served: Served, method: str, monkeypatch) -> None:
        self._method = getattr(served.server.store, method)
        self._may_answer = asyncio.Event()
        self.done = 0
        monkeypatch.setattr(served.server.store, method, self)

    async def __call__(self, *arguments: Any) -> Any:
        answer = await self._method(*arguments)
        self.done += 1
        await self._may_answer.wait()
        return answer

    def answer(self) -> None:
        self._may_answer.set()


class Away:
    """Methods of a store that does not answer for a while."""

    def __init__(self, served: Served, monkeypatch, *methods: str) -> None:
        self._patch, self._store = monkeypatch, served.server.store
        self._methods = {method: getattr(self._store, method) for method in methods}
        for method in methods:
            monkeypatch.setattr(self._store, method, _fail)

    def come_back(self) -> None:
        for name, method in self._methods.items():
            self._patch.setattr(self._store, name, method)


async def _fail(*_: Any) -> Any:
    raise StoreError("the store is away")
