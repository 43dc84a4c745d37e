"""The SQLite store: the calls of a store as SQL, one transaction each."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from sluice_service.errors import LaneError
from sluice_service.store.claims import Claim, Record
from sluice_service.store.protocol import (
    ClaimRequest,
    Closing,
    Granted,
    Key,
    Packed,
    Stored,
    Verdict,
    Write,
)
from sluice_service.store.records import (
    Header,
    answer,
    give_epoch,
    grant,
    is_closed_by,
    may_close,
    to_tombstone,
)
from sluice_service.store.sqlite.commits import Commits
from sluice_service.store.sqlite.file import SqliteFile, Transaction

_CHORE_SECONDS_MAX = 10.0
# Rows deleted in one transaction: other processes wait meanwhile.
_FORGOTTEN_AT_ONCE_MAX = 10_000
_LISTED_AT_ONCE = 1000

_FIND = """
    SELECT s.id, writer, attempt, epoch, is_alive, ending, claim_id, claim, is_held, previous, step
    FROM sequences AS s LEFT JOIN checkpoints AS c ON c.id = s.id
    WHERE model = ? AND sequence_id = ? AND expires > ?
"""
_PUT = """
    INSERT INTO sequences (
        model, sequence_id, writer, attempt, epoch, is_alive, ending,
        claim_id, claim, is_held, previous, expires
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (model, sequence_id) DO UPDATE SET
        writer = excluded.writer, attempt = excluded.attempt, epoch = excluded.epoch,
        is_alive = excluded.is_alive, ending = excluded.ending, claim_id = excluded.claim_id,
        claim = excluded.claim, is_held = excluded.is_held, previous = excluded.previous,
        expires = excluded.expires
    RETURNING id
"""
_OWNED = """
    SELECT id FROM sequences
    WHERE model = ? AND sequence_id = ? AND claim_id = ? AND is_alive AND expires > ?
"""
_WRITE = f"UPDATE checkpoints SET step = ?, data = ? WHERE step <= ? AND id = ({_OWNED})"
_RENEW_LEASE = f"UPDATE sequences SET expires = ? WHERE id = ({_OWNED})"
_LIST = """
    SELECT s.id, sequence_id, epoch, step FROM sequences AS s JOIN checkpoints AS c ON c.id = s.id
    WHERE model = ? AND is_alive AND expires > ? AND s.id > ? ORDER BY s.id LIMIT ?
"""


class SqliteStore:
    """Sequences in one file, which outlive the server and a crash of the machine."""

    def __init__(
        self,
        path: Path,
        *,
        tombstone_seconds: float,
        record_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
        busy_seconds: float = 5.0,
    ) -> None:
        """`start` opens the file. Locks of other processes are waited for `busy_seconds`."""
        self._tombstone_seconds = tombstone_seconds
        self._record_seconds = record_seconds
        chore_seconds = min(_CHORE_SECONDS_MAX, tombstone_seconds, record_seconds)
        file = SqliteFile(path, monotonic, busy_seconds=busy_seconds)
        self._commits = Commits(file, _forget, chore_seconds=chore_seconds)

    async def start(self) -> list[str]:
        """See Store."""
        return await self._commits.start()

    async def stop(self) -> None:
        """See Store."""
        await self._commits.stop()

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Granted | LaneError]:
        """See Store."""
        return await self._commits.write(
            lambda transaction: [self._claim(transaction, request) for request in requests]
        )

    def _claim(self, transaction: Transaction, request: ClaimRequest) -> Granted | LaneError:
        number, found = _find(transaction, request.key)
        try:
            claim = grant(found, request)
        except LaneError as error:
            return error
        header = claim.header
        if claim.raises_epoch:
            header = give_epoch(header, transaction.raise_epoch())
        number = _put(transaction, request.key, header, self._record_seconds)
        if claim.checkpoint is not None:
            transaction.connection.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)",
                (number, claim.checkpoint.step, claim.checkpoint.data),
            )
            return answer(header, claim.checkpoint.data)
        return answer(header, _data(transaction, number))

    async def write(self, writes: Sequence[Write]) -> list[Verdict]:
        """See Store."""
        return await self._commits.write(lambda transaction: _write(transaction, writes))

    async def close(self, closings: Sequence[Closing]) -> list[Verdict]:
        """See Store."""
        return await self._commits.write(
            lambda transaction: [self._close(transaction, closing) for closing in closings]
        )

    def _close(self, transaction: Transaction, closing: Closing) -> Verdict:
        number, found = _find(transaction, closing.key)
        if found is None or not may_close(found, closing.claim_id):
            is_repeat = found is not None and is_closed_by(found, closing.claim_id)
            return Verdict.DONE if is_repeat else Verdict.REFUSED
        transaction.connection.execute("DELETE FROM checkpoints WHERE id = ?", (number,))
        _put(transaction, closing.key, to_tombstone(found, closing.ending), self._tombstone_seconds)
        return Verdict.DONE

    async def renew_leases(self, claims: Sequence[tuple[Key, bytes]]) -> list[Verdict]:
        """See Store."""

        def renew(transaction: Transaction) -> list[Verdict]:
            expires = transaction.now + self._record_seconds
            rows = [(expires, *key, claim_id, transaction.now) for key, claim_id in claims]
            done = transaction.connection.executemany(_RENEW_LEASE, rows).rowcount
            return _verdicts(transaction, claims, done)

        return await self._commits.write(renew)

    async def read(self, key: Key) -> Stored | None:
        """See Store."""

        def read(transaction: Transaction) -> Stored | None:
            number, found = _find(transaction, key)
            if found is None or not found.record.is_alive:
                return None
            return Stored(key, found.record.epoch, Packed(found.step, _data(transaction, number)))

        return await self._commits.read(read)

    async def stored(self, model: str) -> AsyncIterator[Stored]:
        """See Store."""

        def list_after(transaction: Transaction, number: int) -> list[tuple[int, str, int, int]]:
            row = (model, transaction.now, number, _LISTED_AT_ONCE)
            return transaction.connection.execute(_LIST, row).fetchall()

        rows = await self._commits.read(partial(list_after, number=0))
        while rows:
            for _, sequence_id, epoch, step in rows:
                yield Stored(Key(model, sequence_id), epoch, Packed(step, b""))
            rows = await self._commits.read(partial(list_after, number=rows[-1][0]))


def _find(transaction: Transaction, key: Key) -> tuple[int, Header | None]:
    """The row id of a sequence and its header; 0 and None if there is none."""
    row = transaction.connection.execute(_FIND, (*key, transaction.now)).fetchone()
    if row is None:
        return 0, None
    number, writer, attempt, epoch, is_alive, ending, claim_id, claim, is_held, previous, step = row
    record = Record(writer, int(attempt), epoch, bool(is_alive), ending)
    return number, Header(record, claim_id, Claim[claim], bool(is_held), previous, step or 0)


def _put(transaction: Transaction, key: Key, header: Header, seconds: float) -> int:
    """Write a header that expires in `seconds`; return its row id."""
    record = header.record
    row = (
        *key,
        record.writer,
        str(record.attempt),  # up to 2^64: more than an integer of SQLite holds
        record.epoch,
        record.is_alive,
        record.ending,
        header.claim_id,
        header.claim.name,
        header.is_held,
        header.previous,
        transaction.now + seconds,
    )
    ((number,),) = transaction.connection.execute(_PUT, row).fetchall()
    return int(number)


def _data(transaction: Transaction, number: int) -> bytes:
    found = transaction.connection.execute("SELECT data FROM checkpoints WHERE id = ?", (number,))
    data: bytes = found.fetchone()[0]
    return data


def _write(transaction: Transaction, writes: Sequence[Write]) -> list[Verdict]:
    rows = [
        (
            write.checkpoint.step,
            write.checkpoint.data,
            write.checkpoint.step,
            *write.key,
            write.claim_id,
            transaction.now,
        )
        for write in writes
    ]
    done = transaction.connection.executemany(_WRITE, rows).rowcount
    return _verdicts(transaction, [(write.key, write.claim_id) for write in writes], done)


def _verdicts(
    transaction: Transaction, claims: Sequence[tuple[Key, bytes]], done: int
) -> list[Verdict]:
    """DONE for each claim that owns its sequence. No query is needed if all rows were `done`."""
    if done == len(claims):
        return [Verdict.DONE] * done

    def judge(key: Key, claim_id: bytes) -> Verdict:
        row = (*key, claim_id, transaction.now)
        is_owner = transaction.connection.execute(_OWNED, row).fetchone() is not None
        return Verdict.DONE if is_owner else Verdict.REFUSED

    return [judge(key, claim_id) for key, claim_id in claims]


def _forget(transaction: Transaction) -> None:
    """Delete sequences whose lease has run out, and old tombstones."""
    connection = transaction.connection
    expired: Iterable[tuple[int]] = connection.execute(
        "SELECT id FROM sequences WHERE expires <= ? LIMIT ?",
        (transaction.now, _FORGOTTEN_AT_ONCE_MAX),
    ).fetchall()
    connection.executemany("DELETE FROM checkpoints WHERE id = ?", expired)
    connection.executemany("DELETE FROM sequences WHERE id = ?", expired)
