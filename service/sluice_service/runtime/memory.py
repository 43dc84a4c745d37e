"""What this process does about its memory: what the collector looks at, and what is given back."""

import asyncio
import ctypes
import gc
from collections.abc import Callable

# What the collector of cycles waits for: so many more objects than before; so many of its small
# rounds; so many of its middle ones. It finds next to nothing here, for what ends is let go of
# without it. By Python's own measure (700, 10, 10) it took 2 to 5 % of the CPU that 64 to 256
# separate streams need, and now 0.2 % at most; and opening 100,000 sequences met rounds over all
# of them, of up to 58 ms each, where the longest one now takes 4.
_COLLECTOR_THRESHOLDS = (5_000, 5, 10)
# glibc gives blocks of some megabytes back as soon as they are free, and a message of that size
# then finds pages that must be cleared first, one by one, while the event loop stands still:
# beside chunks of 10,000 steps the p99 of single steps was twice what it is now. So much of what
# is free is kept, and blocks of up to so many bytes (the most there is) come from it.
_KEPT_BYTES, _REUSED_BLOCK_BYTES = 64 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them
_C_LIBRARY = ctypes.CDLL(None)
# What was used a moment ago will be used again.
_QUIET_SECONDS = 10.0


def keep_imports() -> None:
    """Spare the collector what has been imported: it stays for the life of the process.

    Of a process that is ours alone; else garbage of others would stay, too.
    """
    gc.freeze()
    gc.enable()


def settle() -> None:
    """Spare the collector all that is alive now, and have freed memory used again.

    Models and their hosts stay for long; what is freed is given back when all is quiet.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTOR_THRESHOLDS)
    set_option = getattr(_C_LIBRARY, "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        set_option(_M_MMAP_THRESHOLD, _REUSED_BLOCK_BYTES)


def give_back() -> None:
    """Give the system what has been freed; nothing where the C library cannot be asked to.

    It keeps most of it otherwise, for good: after a burst several times of what is in use.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


async def give_back_when_quiet(
    activity: Callable[[], object], action: Callable[[], None] = give_back
) -> None:
    """Until cancelled: act once `activity` has not changed for a while, and again after it has.

    In a thread, and at a time when nobody is held up by it.
    """
    before = given = activity()
    while True:
        await asyncio.sleep(_QUIET_SECONDS)
        now = activity()
        if now == before != given:
            await asyncio.to_thread(action)
            given = now
        before = now
