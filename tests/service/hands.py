"""What a test holds in its own hands: the clock of a server, and the runs of its models."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from sluice_service.clock import AwakeClock
from tests.service.wire import eventually


class Hands:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def go(self, clock: AwakeClock, seconds: float, *, tick: float = 1.0) -> None:
        """Let time pass with somebody asking at each tick, as a process that is awake does."""
        for _ in range(int(seconds / tick)):
            self.seconds += tick
            clock.now()


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
