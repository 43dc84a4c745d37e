"""A process of its own that uses a store, and says on standard output what it was promised.

`python -m tests.service.store.child COMMAND URL …`
"""

import asyncio
import resource
import sys

from sluice_service.store import Packed, Store, StoreError, Verdict, open_store
from tests.service.store.places import ask, claim, key, take_over, write

SEQUENCES = 8
_SECONDS = {"tombstone_seconds": 600.0, "record_seconds": 600.0}


def content(name: str, step: int) -> bytes:
    """What the checkpoint of a sequence at a step is."""
    return f"{name} at {step} ".encode() * 100


def tell(*words: object) -> None:
    print(*words, flush=True)


async def write_until_killed(store: Store) -> None:
    """Claim sequences and write them one step after another; each promise is a line."""

    async def go_on(name: str) -> None:
        granted = await take_over_or_start(store, name)
        step = granted.checkpoint.step
        tell("claimed", name, granted.epoch)
        while True:
            step += 1
            assert await write(store, granted.claim_id, step, content(name, step), name) is (
                Verdict.DONE
            )
            tell("written", name, step)

    await asyncio.gather(*(go_on(f"s{number}") for number in range(SEQUENCES)))


async def take_over_or_start(store: Store, name: str):
    found = await store.read(key(name))
    if found is None:
        return await claim(store, ask(name))
    return await take_over(store, name, b"%d" % found.epoch)


async def claim_many(store: Store, who: str, times: int) -> None:
    """Take the same few sequences over, again and again, each time under a new writer."""
    for turn in range(times):
        for number in range(SEQUENCES):
            name = f"s{number}"
            granted = await take_over(store, name, f"{who} {turn}".encode())
            verdict = await write(store, granted.claim_id, granted.checkpoint.step + 1, b"", name)
            tell("epoch", granted.epoch, verdict.name)


async def fill_the_disk(store: Store) -> None:
    """Start sequences until the disk is full, make room, and go on with the one that failed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    kept, failures = list[str](), 0
    while failures < 5:
        name = f"s{len(kept)}"
        initial = Packed(0, content(name, 0) * 40)
        try:
            await claim(store, ask(name, initial=initial))
        except StoreError as error:
            failures += 1  # one after the other: at first closing the log makes room
            tell("full", error)
        else:
            kept.append(name)
            failures = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await claim(store, ask(name, initial=initial))
    for each in [*kept, name]:
        found = await store.read(key(each))
        assert found is not None
        assert found.checkpoint.data == content(each, 0) * 40
        tell("kept", each)


async def main(command: str, url: str, *words: str) -> None:
    store = open_store(url, **_SECONDS)
    await store.start()
    tell("started")
    match command:
        case "write":
            await write_until_killed(store)
        case "claim":
            sys.stdin.readline()
            await claim_many(store, words[0], int(words[1]))
        case "fill":
            await fill_the_disk(store)
    await store.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
