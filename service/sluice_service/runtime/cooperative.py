"""Cuts long work on the event loop into short turns, so that it delays nothing else for long.

Work is an iterator that does a small part at each step.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

_TURN_SECONDS = 0.001
# Rounds of the event loop between two turns: as many as pass between a message and its answer,
# so that each step is delayed by one turn or two.
_ROUNDS = 4

# Calls what it is given at a suitable time, and returns its result.
Instant = Callable[[Callable[[], bool]], Awaitable[bool]]


def take_turn(work: Iterator[object]) -> bool:
    """Do `work` for a short time; True once it is done."""
    end = time.monotonic() + _TURN_SECONDS
    return all(time.monotonic() < end for _ in work)


async def rest() -> None:
    """Let other tasks run."""
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


async def at_once(turn: Callable[[], bool]) -> bool:
    """The Instant for work that may be done at any time."""
    return turn()


async def take_turns(work: Iterator[object], *, instant: Instant = at_once) -> None:
    """Do all of `work` in turns, each at an `instant`, with rests between them."""
    while not await instant(partial(take_turn, work)):
        await rest()
