"""Cuts long work into short turns, so that nobody on the event loop waits for it for long.

Work is an iterator that does a little of it each time it is drawn from.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

_TURN_SECONDS = 0.001
# Rounds of the event loop between two turns: as many as a step needs from its message to its
# answer, so that it meets one turn or two.
_ROUNDS = 4

# Calls what it is given as soon as it suits, and returns what that returned.
Instant = Callable[[Callable[[], bool]], Awaitable[bool]]


def take_turn(work: Iterator[object]) -> bool:
    """Draw from `work` for a short time; True once there is nothing left."""
    end = time.monotonic() + _TURN_SECONDS
    return all(time.monotonic() < end for _ in work)


async def rest() -> None:
    """Let others have the event loop."""
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


async def at_once(turn: Callable[[], bool]) -> bool:
    """It always suits."""
    return turn()


async def take_turns(work: Iterator[object], *, instant: Instant = at_once) -> None:
    """Do all of `work`, a turn at an `instant`, with rests between them."""
    while not await instant(partial(take_turn, work)):
        await rest()
