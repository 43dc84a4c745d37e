"""Measures the claims and checkpoints per second of each store: `python -m bench.stores`.

SQLite and a Redis that this command starts write into the folder for temporary files. Both are as
fast as that disk makes a write durable.
"""

import asyncio
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.table import Effort, Figures, bar, print_table, read_effort
from sluice_protos.sequences_pb2 import RESUME, START, OpenSequence
from sluice_service.store import (
    ClaimRequest,
    Granted,
    Key,
    Packed,
    Store,
    StoreError,
    Verdict,
    Write,
    open_store,
)

SEQUENCES = 10_000
AT_ONCE = 1000
ROW_BYTES = 2048
ALONE = 200
FSYNCS = ("everysec", "always")
# All different, so that no store gains by not writing equal pages.
ROWS = [secrets.token_bytes(ROW_BYTES) for _ in range(64)]
_REDIS_SECONDS_MAX = 30

Claims = list[tuple[Key, bytes]]


def batches(items: Sequence[Key] | Claims) -> Iterator[Sequence]:
    """The items in batches."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


async def claim_all(store: Store, keys: Sequence[Key], mode: OpenSequence) -> Claims:
    """Claim every sequence, as a server that knows none of them does."""
    claims = Claims()
    for some in batches(keys):
        requests = [ClaimRequest(key, mode, Packed(0, random.choice(ROWS))) for key in some]
        for request, answer in zip(requests, await store.claim(requests), strict=True):
            assert isinstance(answer, Granted), answer
            claims.append((request.key, answer.claim_id))
    return claims


async def write_all(store: Store, claims: Claims, step: int) -> None:
    """Write a newer checkpoint of every sequence."""
    for some in batches(claims):
        writes = [Write(key, claim_id, Packed(step, random.choice(ROWS))) for key, claim_id in some]
        assert await store.write(writes) == [Verdict.DONE] * len(writes)


async def measure(name: str, url: str, effort: Effort, figures: Figures) -> None:
    """Measure one round of one store, with new sequences."""
    count = effort.pick(full=SEQUENCES, quick=AT_ONCE, smoke=ALONE)
    keys = [Key("m", secrets.token_hex(16)) for _ in range(count)]
    opening = OpenSequence(mode=START, writer=secrets.token_bytes(16), attempt=1)
    coming_back = OpenSequence(mode=RESUME, writer=opening.writer, attempt=2)
    async with opened(url) as store:
        begun = time.perf_counter()
        claims = await claim_all(store, keys, opening)
        figures.add(f"{name} claims", count / (time.perf_counter() - begun))
        random.shuffle(claims)
        begun, spent = time.perf_counter(), time.process_time()
        for step in (1, 2):
            await write_all(store, claims, step)
        figures.add(f"{name} writes", 2 * count / (time.perf_counter() - begun))
        figures.add(f"{name} cpu", 1e6 * (time.process_time() - spent) / (2 * count))
        begun = time.perf_counter()
        for some in batches(claims):
            await store.renew_leases(some)
        figures.add(f"{name} leases", count / (time.perf_counter() - begun))
        begun = time.perf_counter()
        for key, claim_id in claims[:ALONE]:
            await store.write([Write(key, claim_id, Packed(3, bytes(ROW_BYTES)))])
        figures.add(f"{name} alone", 1e3 * (time.perf_counter() - begun) / ALONE)
    async with opened(url) as store:
        begun = time.perf_counter()
        await claim_all(store, keys, coming_back)
        figures.add(f"{name} back", count / (time.perf_counter() - begun))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    """Open the store at a URL, as a server does when it starts."""
    store = open_store(url, tombstone_seconds=600, record_seconds=600)
    deadline = time.monotonic() + _REDIS_SECONDS_MAX
    while True:
        try:
            warnings = await store.start()
        except StoreError:  # Redis may still be starting
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
        else:
            break
    for warning in warnings:
        print(warning, file=sys.stderr)
    yield store
    await store.stop()


@contextmanager
def redis_server(folder: Path, fsync: str) -> Iterator[str]:
    """Start a Redis with that `appendfsync`; its URL."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("there is no redis-server here: `make tools` unpacks Debian's; see `make bench`")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder.mkdir()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
    options["appendfsync"] = fsync
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    figures = Figures()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        urls = {"SQLite": f"sqlite:///{folder}/store.db"}
        for fsync in effort.pick(full=FSYNCS, quick=FSYNCS, smoke=FSYNCS[:1]):
            urls[f"Redis, {fsync}"] = stack.enter_context(redis_server(folder / fsync, fsync))
        progress = stack.enter_context(bar())
        for _ in progress.track(range(effort.rounds), description="stores"):
            for name, url in urls.items():
                asyncio.run(measure(name, url, effort, figures))
    columns = {
        "claims/s": "claims",
        "checkpoints/s": "writes",
        "µs of CPU a checkpoint": "cpu",
        "a checkpoint alone, ms": "alone",
        "leases renewed/s": "leases",
        "taken over/s": "back",
    }
    rows = [
        [name, *(show(figures, f"{name} {each}") for each in columns.values())] for name in urls
    ]
    print_table(f"Stores: rows of {ROW_BYTES:,} bytes, {AT_ONCE:,} at once", ["", *columns], rows)


def show(figures: Figures, name: str) -> str:
    """The median of a figure's rounds."""
    value = figures.median(name)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
