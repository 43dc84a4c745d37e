"""The Redis store: decides on claims here, and has a script write them if nothing has changed."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from sluice_service.errors import LaneError
from sluice_service.store.claims import Claim, Record
from sluice_service.store.protocol import (
    ClaimRequest,
    Closing,
    Granted,
    Key,
    Packed,
    Stored,
    StoreError,
    StoreSetupError,
    Verdict,
    Write,
)
from sluice_service.store.records import Grant, Header, answer, give_epoch, grant
from sluice_service.store.redaction import redact
from sluice_service.store.redis.checks import check
from sluice_service.store.redis.scripts import (
    CLAIM,
    CLOSE,
    READ,
    READ_DATA,
    RENEW_LEASE,
    SCAN,
    TICK,
    WRITE,
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_PREFIX = "sluice:"
_CONNECTIONS_MAX = 8
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 3.0
# Every script is idempotent, so that a lost answer is asked for again.
_RETRIES = 1
_BACKOFF_SECONDS, _BACKOFF_SECONDS_MAX = 0.05, 1.0
_TICK_SECONDS_MAX = 5.0
# Of the time between two ticks at most this much counts: the rest was a pause of the users.
_GAP_SECONDS_MAX = 15.0
# Sequences in one script: Redis does nothing else meanwhile.
_AT_ONCE_MAX = 250
_FORGOTTEN_AT_ONCE_MAX = 1000
_LISTED_AT_ONCE = 1000
# Attempts to claim while others claim the same sequences.
_ROUNDS_MAX = 100


class _Swap(NamedTuple):
    """A grant, and the header that it was decided for."""

    key: Key
    found: Header | None
    grant: Grant


class RedisStore:
    """Sequences in Redis, shared by servers of many machines, and as durable as that Redis is."""

    def __init__(self, url: str, *, tombstone_seconds: float, record_seconds: float) -> None:
        """Connects in `start`. Raises StoreSetupError for a URL that cannot be read.

        `?prefix=NAME:` sets what all keys begin with; other options are redis-py's, such as
        `?ssl_ca_certs=FILE`.
        """
        self._name = redact(url)
        try:
            address, self._prefix = _read_url(url)
            pool = BlockingConnectionPool.from_url(
                address,
                max_connections=_CONNECTIONS_MAX,
                timeout=None,  # each connection is given back in time
                socket_connect_timeout=_CONNECT_SECONDS,
                socket_timeout=_ANSWER_SECONDS,
                retry=Retry(
                    ExponentialWithJitterBackoff(base=_BACKOFF_SECONDS, cap=_BACKOFF_SECONDS_MAX),
                    _RETRIES,
                ),
                protocol=2,
            )
            pool.make_connection()  # raises for an unknown option
        except (TypeError, RedisError) as error:
            raise StoreSetupError(f"the URL of the Redis store {self._name}: {error}") from error
        except ValueError:
            # The message may quote a password that was taken for the port.
            raise StoreSetupError(
                f"the URL of the Redis store {self._name} cannot be read; it is like "
                "redis://USER:PASSWORD@HOST:PORT/0, with %40 for @ and %2F for / in a password"
            ) from None
        self._redis = Redis.from_pool(pool)
        self._tombstone_ms = int(tombstone_seconds * 1000)
        self._record_ms = int(record_seconds * 1000)
        self._tick_seconds = min(_TICK_SECONDS_MAX, tombstone_seconds / 2, record_seconds / 2)
        self._clock = f"{self._prefix}clock"
        self._expiries = f"{self._prefix}expiries"
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> list[str]:
        """See Store."""
        with self._asking():
            warnings = await check(self._redis, self._name)
        await self._tick()
        self._ticking = asyncio.create_task(self._keep_time())
        return warnings

    async def stop(self) -> None:
        """See Store."""
        if self._ticking is not None:
            self._ticking.cancel()
        await self._redis.aclose()

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Granted | LaneError]:
        """See Store."""
        answers: dict[int, Granted | LaneError] = {}
        pending = list(range(len(requests)))
        for _ in range(_ROUNDS_MAX):
            if not pending:
                return [answers[place] for place in range(len(requests))]
            found = await _in_pieces(self._find, [requests[place].key for place in pending])
            wanted = list[tuple[int, _Swap]]()
            for place, header in zip(pending, found, strict=True):
                request = requests[place]
                try:
                    wanted.append((place, _Swap(request.key, header, grant(header, request))))
                except LaneError as error:
                    answers[place] = error
            swapped = await _in_pieces(self._swap, [swap for _, swap in wanted])
            answers |= {
                place: granted
                for (place, _), granted in zip(wanted, swapped, strict=True)
                if granted is not None
            }
            pending = [place for place in pending if place not in answers]
        raise StoreError(
            f"the Redis store {self._name}: other servers kept claiming the same sequences"
        )

    async def _swap(self, swaps: Sequence[_Swap]) -> list[Granted | None]:
        """Write grants in place of what was found; None for each that has changed since."""
        keys, values = [self._clock, self._expiries, f"{self._prefix}epoch"], list[Any]()
        for key, found, claim in swaps:
            header, checkpoint = claim.header, claim.checkpoint
            keys.append(self._key(key))
            values += (
                (found.claim_id, int(found.record.is_alive), found.step)
                if found is not None
                else ("", "", "")
            )
            values += (header.claim_id, _pack_head(header), int(claim.raises_epoch))
            values += (checkpoint.step, checkpoint.data) if checkpoint is not None else ("", b"")
        answers = await self._eval(CLAIM, keys, [self._record_ms, *values])
        return [
            answer(give_epoch(claim.header, int(swapped[0])), swapped[1]) if swapped else None
            for (_, _, claim), swapped in zip(swaps, answers, strict=True)
        ]

    async def write(self, writes: Sequence[Write]) -> list[Verdict]:
        """See Store."""

        def values(write: Write) -> list[Any]:
            return [write.claim_id, write.checkpoint.step, write.checkpoint.data]

        return await self._judge_all(WRITE, [], [(write.key, values(write)) for write in writes])

    async def close(self, closings: Sequence[Closing]) -> list[Verdict]:
        """See Store."""
        items = [(closing.key, [closing.claim_id, closing.ending]) for closing in closings]
        return await self._judge_all(CLOSE, [self._tombstone_ms], items)

    async def renew_leases(self, claims: Sequence[tuple[Key, bytes]]) -> list[Verdict]:
        """See Store."""
        items = [(key, [claim_id]) for key, claim_id in claims]
        return await self._judge_all(RENEW_LEASE, [self._record_ms], items)

    async def _judge_all(
        self, script: str, shared: list[Any], items: Sequence[tuple[Key, list[Any]]]
    ) -> list[Verdict]:
        """Run a script over sequences, each with its own values; return the verdicts."""

        async def judge(some: Sequence[tuple[Key, list[Any]]]) -> list[Verdict]:
            keys = [self._clock, self._expiries, *(self._key(key) for key, _ in some)]
            values = [value for _, values in some for value in values]
            done = await self._eval(script, keys, shared + values)
            return [Verdict.DONE if is_done else Verdict.REFUSED for is_done in done]

        return await _in_pieces(judge, items)

    async def read(self, key: Key) -> Stored | None:
        """See Store."""
        is_alive, epoch, step, data = await self._eval(READ_DATA, [self._key(key)], [])
        if is_alive != b"1":
            return None
        return Stored(key, int(epoch), Packed(int(step), data))

    async def stored(self, model: str) -> AsyncIterator[Stored]:
        """See Store."""
        prefix = self._key(Key(model, "")).encode()
        seen, cursor = set[bytes](), b"0"
        while True:
            cursor, members = await self._eval(SCAN, [self._expiries], [cursor, _LISTED_AT_ONCE])
            # A scan lists members and scores in turns, and may list a member twice.
            names = {name for name in members[::2] if name.startswith(prefix)} - seen
            seen |= names
            keys = [Key(model, name.removeprefix(prefix).decode()) for name in names]
            for key, header in zip(keys, await _in_pieces(self._find, keys), strict=True):
                if header is not None and header.record.is_alive:
                    yield Stored(key, header.record.epoch, Packed(header.step, b""))
            if cursor == b"0":
                return

    async def _find(self, keys: Sequence[Key]) -> list[Header | None]:
        return [
            _unpack_header(*found) if found[0] is not None else None
            for found in await self._eval(READ, [self._key(key) for key in keys], [])
        ]

    def _key(self, key: Key) -> str:
        return f"{self._prefix}sequence:{quote(key.model, safe='')}:{key.sequence_id}"

    async def _keep_time(self) -> None:
        """Advance the clock of the store and delete what has expired, until cancelled."""
        while True:
            await asyncio.sleep(self._tick_seconds)
            try:
                await self._tick()
            except StoreError:
                continue  # calls of the store report it

    async def _tick(self) -> None:
        values = [int(_GAP_SECONDS_MAX * 1000), _FORGOTTEN_AT_ONCE_MAX]
        forgotten = _FORGOTTEN_AT_ONCE_MAX
        while forgotten == _FORGOTTEN_AT_ONCE_MAX:
            forgotten = await self._eval(TICK, [self._clock, self._expiries], values)

    async def _eval(self, script: str, keys: Sequence[str], values: list[Any]) -> Any:
        # By text, not by hash: a restarted Redis does not know the hash.
        with self._asking():
            return await self._redis.eval(script, len(keys), *keys, *values)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, RuntimeError) as error:
            # uvloop raises RuntimeError if the connection was closed meanwhile.
            raise StoreError(f"the Redis store {self._name} did not answer: {error}") from error


async def _in_pieces(
    ask: Callable[[Sequence[Item]], Awaitable[list[Answer]]], items: Sequence[Item]
) -> list[Answer]:
    """The answers of `ask` for all items, asked in pieces. Raises the first error of a piece."""
    pieces = [
        ask(items[start : start + _AT_ONCE_MAX]) for start in range(0, len(items), _AT_ONCE_MAX)
    ]
    answers = await asyncio.gather(*pieces, return_exceptions=True)
    for answer_or_error in answers:
        if isinstance(answer_or_error, BaseException):
            raise answer_or_error
    return [each for some in answers if isinstance(some, list) for each in some]


def _pack_head(header: Header) -> str:
    """The fields of a header that no script reads."""
    return json.dumps(
        {
            "writer": header.record.writer.hex(),
            "attempt": header.record.attempt,
            "claim": header.claim.name,
            "is_held": header.is_held,
            "previous": header.previous.hex(),
        }
    )


def _unpack_header(
    claim_id: bytes, is_alive: bytes, epoch: bytes, step: bytes, head: bytes, ending: bytes
) -> Header:
    """The inverse of `_pack_head`, with the fields that are stored beside it."""
    known = json.loads(head)
    return Header(
        Record(
            writer=bytes.fromhex(known["writer"]),
            attempt=known["attempt"],
            epoch=int(epoch),
            is_alive=is_alive == b"1",
            ending=ending.decode(),
        ),
        claim_id=claim_id,
        claim=Claim[known["claim"]],
        is_held=known["is_held"],
        previous=bytes.fromhex(known["previous"]),
        step=int(step),
    )


def _read_url(url: str) -> tuple[str, str]:
    """The URL for redis-py, and the prefix of all keys. Raises ValueError."""
    parts = urlsplit(url)
    options = parse_qsl(parts.query)
    prefix = dict(options).get("prefix", _PREFIX)
    rest = [(option, value) for option, value in options if option != "prefix"]
    return parts._replace(query=urlencode(rest)).geturl(), prefix
