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


def _comes_true(claim: Callable[[], bool]) -> bool:
    """Whether a claim comes true soon; where it does not, something else is tried."""
    deadline = time.monotonic() + 5
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def await_progress(world: World) -> None:
    """Until every client has received something that it had not before."""
    before = [client.received for client in world.clients]
    wait_until(
        lambda: all(
            client.received > size for client, size in zip(world.clients, before, strict=True)
        ),
        world,
        "progress of every client",
    )


def lose_responses(world: World, server: Server) -> None:
    """Break every connection while outputs are on their way that nobody will get."""

    def is_applied_and_not_received() -> bool:
        return any(
            at.applied > world.journaled(sequence_id) for sequence_id, at in server.trace.progress()
        )

    while True:
        await_progress(world)
        server.process.proxy.hold(Way.BACK)
        if _comes_true(is_applied_and_not_received):
            break
        # Every client happened to be opening or closing, and waits for the answer.
        server.process.proxy.heal()
    server.process.proxy.cut()
    server.process.proxy.heal()


def break_within_a_message(world: World, server: Server, way: Way, size: int) -> None:
    """Break a connection after so many more bytes, in the middle of what is being said."""
    connections = server.process.proxy.connections
    server.process.proxy.cut_after(way, size)
    wait_until(
        lambda: server.process.proxy.connections > connections, world, "a client coming back"
    )


def await_trap(world: World, server: Server) -> set[str]:
    """Until the trap of a server has sprung; the gaps that had steps in them."""
    wait_until(lambda: not server.trace.is_armed, world, "into the trap")
    # The signal comes a moment later, from the process itself.
    wait_until(lambda: server.process.is_halted, world, "to a halt")
    return landed_in(server)


def kill_at(world: World, server: Server, instant: Instant, *, count: int = 1) -> set[str]:
    """Kill a server the `count`th time it comes to an instant; the gaps that had steps in them."""
    server.trace.arm(instant, count, signal.SIGKILL)
    gaps = await_trap(world, server)
    server.process.kill()
    return gaps


def swap(world: World, instant: Instant, turn: int) -> set[str]:
    """Have everything move between the two servers of a world, one of them paused.

    It stops at an instant of its work and wakes when all that it had has gone on at the
    other. The gaps that had steps in them when it stopped.
    """
    here, there = world.servers if turn % 2 == 0 else world.servers[::-1]
    there.process.proxy.refuse()
    await_progress(world)
    if instant in (Instant.CLAIMING, Instant.CLAIMED):
        # On the way to the other server, which stops while it asks for what comes.
        there, here = here, there
        here.trace.arm(instant, 1, signal.SIGSTOP)
        here.process.proxy.heal()
        there.process.proxy.refuse()
    else:
        here.trace.arm(instant, 1, signal.SIGSTOP)
    gaps = await_trap(world, here)
    there.process.proxy.heal()
    here.process.proxy.refuse()
    await_progress(world)
    here.process.wake()
    here.process.proxy.heal()
    return gaps


def restart(world: World, server: Server) -> None:
    """End a server by SIGTERM, as a rollout does, and start it again."""
    assert server.process.stop() == 0, world.tails()
    server.process.start()


def kill_before_the_store(world: World, server: Server) -> None:
    """Kill a server when outputs have arrived that its store, which is slow, does not have."""

    await_progress(world)
    # So slow that no busy machine lets it finish before the kill.
    server.trace.slow_store(10)
    # What was applied before may be in a write that is under way and as quick as ever.
    before = {sequence_id: at.applied for sequence_id, at in server.trace.progress()}

    def is_ahead() -> bool:
        return any(
            world.journaled(sequence_id) > before.get(sequence_id, at.applied)
            for sequence_id, at in server.trace.progress()
        )

    wait_until(is_ahead, world, "an output ahead of the store")
    server.process.kill()
    server.trace.slow_store(0)
    server.process.start()


def replace_clients(world: World) -> None:
    """Kill every client; each has a successor that has its journal and nothing else."""
    for client in world.clients:
        assert client.is_mortal
        client.process.kill()
        client.process.start()


def lose_redis(world: World) -> None:
    """Kill Redis when it has been sent a write, and nobody hears its answer."""
    redis = world.redis
    assert redis is not None
    for server in world.servers:
        server.trace.arm(Instant.CHECKPOINTED, 1, signal.SIGSTOP)
    wait_until(
        lambda: any(server.process.is_halted for server in world.servers),
        world,
        "a checkpoint on its way",
    )
    redis.proxy.hold(Way.BACK)
    before = redis.proxy.passed[Way.THERE]
    for server in world.servers:
        server.trace.disarm()
        server.process.wake()
    wait_until(lambda: redis.proxy.passed[Way.THERE] > before, world, "a write to Redis")
    redis.kill()
    redis.proxy.heal()
    redis.start()


def sleep_through_a_claim(world: World, server: Server) -> None:
    """Stop a server about to write; wake it when another has its sequence and went on with it."""
    rival = world.clients[1 - world.servers.index(server)]
    server.trace.arm(Instant.CHECKPOINTED, 1, signal.SIGSTOP)
    await_trap(world, server)
    before = rival.received
    wait_until(lambda: rival.received > before, world, "the other server's answer")
    server.process.wake()
    await_progress(world)
