"""Faults that land where they are meant to, every time: nothing here is left to chance."""

import signal
import time
from collections.abc import Callable

from tests.chaos.faults import landed_in
from tests.chaos.instants import Instant
from tests.chaos.proxy import Way
from tests.chaos.world import Server, World

# Only bounds a hang.
SECONDS_MAX = 120


def wait_until(claim: Callable[[], bool], world: World, words: str) -> None:
    """Return once a claim is true. Raises AssertionError when it does not come true."""
    deadline = time.monotonic() + SECONDS_MAX
    while not claim():
        assert time.monotonic() < deadline, f"never {words}\n{world.tails()}"
        time.sleep(0.005)


def await_progress(world: World) -> None:
    """Until something has arrived that was not there before."""
    before = world.received
    wait_until(lambda: world.received > before, world, "any progress")


def lose_responses(world: World, server: Server) -> None:
    """Break every connection while outputs are on their way that nobody will get."""

    def is_applied_and_not_received() -> bool:
        return any(
            at.applied > world.journaled(sequence_id) for sequence_id, at in server.trace.progress()
        )

    await_progress(world)
    server.process.proxy.hold(Way.BACK)
    wait_until(is_applied_and_not_received, world, "an output on its way")
    server.process.proxy.cut()
    server.process.proxy.heal()


def break_within_a_message(world: World, server: Server, way: Way, size: int) -> None:
    """Break a connection after so many more bytes, in the middle of what is being said."""
    connections = server.process.proxy.connections
    server.process.proxy.cut_after(way, size)
    wait_until(
        lambda: server.process.proxy.connections > connections, world, "a client coming back"
    )


def kill_at(world: World, server: Server, instant: Instant, *, count: int = 1) -> set[str]:
    """Kill a server the `count`th time it comes to an instant; the gaps that had steps in them."""
    server.trace.arm(instant, count, signal.SIGKILL)
    wait_until(lambda: not server.process.is_running, world, f"came to {instant.name}")
    server.process.kill()
    return landed_in(server)


def pause_at(world: World, server: Server, instant: Instant, *, count: int = 1) -> set[str]:
    """Stop a server the `count`th time it comes to an instant; the gaps that had steps in them."""
    server.trace.arm(instant, count, signal.SIGSTOP)
    wait_until(lambda: not server.trace.is_armed, world, f"came to {instant.name}")
    server.process.is_paused = True
    return landed_in(server)
