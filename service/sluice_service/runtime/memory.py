"""Tunes the memory of this process: what the garbage collector scans, and what is given back."""

import asyncio
import ctypes
import gc
from collections.abc import Callable

# When the garbage collector runs; see gc.set_threshold. It finds next to nothing here, because
# hardly any object is part of a cycle. With Python's default (700, 10, 10) it took 2 to 5 % of
# the CPU that 64 to 256 separate streams need, and now 0.2 % at most. While 100,000 sequences
# were opened it ran over all of them, for up to 58 ms; now for 4 ms at most.
_COLLECTOR_THRESHOLDS = (5_000, 5, 10)
# glibc returns blocks of some megabytes to the system as soon as they are free. A later message
# of that size then waits, and the event loop with it, while the system clears new pages: beside
# chunks of 10,000 steps the p99 of single steps was twice what it is now. So this much free
# memory is kept, and blocks of up to this size (the largest that glibc permits) come from it.
_KEPT_BYTES, _REUSED_BLOCK_BYTES = 64 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them
_C_LIBRARY = ctypes.CDLL(None)
# Memory that was used within this time is likely to be used again.
_QUIET_SECONDS = 10.0


def keep_imports() -> None:
    """Have the garbage collector never scan what is imported, and let it run from now on.

    For a process of our own: in another program it would keep that program's garbage.
    """
    gc.freeze()
    gc.enable()


def settle() -> None:
    """Have the garbage collector never scan what is alive now, and keep freed memory for reuse."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTOR_THRESHOLDS)
    set_option = getattr(_C_LIBRARY, "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        set_option(_M_MMAP_THRESHOLD, _REUSED_BLOCK_BYTES)


def give_back() -> None:
    """Return freed memory to the system, where the C library can.

    Otherwise glibc keeps most of it: after a burst, several times what is in use.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


async def give_back_when_quiet(
    activity: Callable[[], object], action: Callable[[], None] = give_back
) -> None:
    """Until cancelled: call `action` in a thread each time `activity` has stopped changing."""
    before = given = activity()
    while True:
        await asyncio.sleep(_QUIET_SECONDS)
        now = activity()
        if now == before != given:
            await asyncio.to_thread(action)
            given = now
        before = now
