"""One SQLite file: opens and checks it, and gives transactions and a clock that cannot be set."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sluice_service.store.protocol import StoreError, StoreSetupError
from sluice_service.store.sqlite.location import judge_place

# "Slui": tells our databases from those of other programs.
_APPLICATION = 0x536C7569
_SCHEMA_VERSION = 1
_FULL = 2
# SQLite copies the log into the file after this many pages.
_LOG_PAGES = 4000
# Under the load of several processes SQLite never copies the whole log. Beyond this size the
# store makes all of them wait until it is copied.
_LOG_BYTES_MAX = 64 * 2**20
# Of the time between two transactions at most this much counts: the rest was a pause of the users.
_GAP_SECONDS_MAX = 30.0

# Checkpoints have a table of their own: renewing a lease then touches none of their pages.
_SCHEMA = f"""
CREATE TABLE store (epoch INTEGER NOT NULL, seconds REAL NOT NULL, monotonic REAL NOT NULL) STRICT;
INSERT INTO store VALUES (0, 0, 0);
CREATE TABLE sequences (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    sequence_id TEXT NOT NULL,
    writer BLOB NOT NULL,
    attempt TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    is_alive INTEGER NOT NULL,
    ending TEXT NOT NULL,
    claim_id BLOB NOT NULL,
    claim TEXT NOT NULL,
    is_held INTEGER NOT NULL,
    previous BLOB NOT NULL,
    expires REAL NOT NULL,
    UNIQUE (model, sequence_id)
) STRICT;
CREATE TABLE checkpoints (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, data BLOB NOT NULL) STRICT;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_SCHEMA_VERSION};
"""

# Errors of the path itself, which a retry does not mend.
_SETUP_CODES = frozenset(
    (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
)


@dataclass(slots=True)
class Transaction:
    """One transaction: all of it is durable, or nothing has happened."""

    connection: sqlite3.Connection
    # Seconds in which the store was in use; independent of the wall clock.
    now: float
    epoch: int

    def raise_epoch(self) -> int:
        """A new epoch, never issued before."""
        self.epoch += 1
        return self.epoch


class SqliteFile:
    """A connection to the file, for one thread of one process."""

    def __init__(
        self,
        path: Path,
        monotonic: Callable[[], float],
        *,
        busy_seconds: float,
        log_bytes_max: int = _LOG_BYTES_MAX,
    ) -> None:
        self.path = path.absolute()
        self._busy_seconds = busy_seconds
        self._monotonic = monotonic
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._log = self.path.with_name(self.path.name + "-wal")
        self._log_bytes_max = self._log_bytes_due = log_bytes_max

    def create(self) -> list[str]:
        """Open the file and create its tables if it is new; return warnings for the operator.

        Raises StoreSetupError if it cannot be used, StoreError if a retry may help.
        """
        warnings = judge_place(self.path)
        try:
            self._open("rwc")
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _SETUP_CODES:
                raise StoreSetupError(
                    f"the SQLite store {self.path} cannot be used ({error}); name a file that "
                    "this process may write, in a folder that it may write"
                ) from error
            raise self._down(error) from error
        return warnings

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    @contextmanager
    def transaction(self, *, is_writing: bool) -> Iterator[Transaction]:
        """Commit what the block does durably, or nothing of it. Raises StoreError."""
        try:
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE" if is_writing else "BEGIN")
            epoch, seconds, last = connection.execute("SELECT * FROM store").fetchone()
            # One clock for all processes of the machine; a restart of the machine resets it.
            monotonic = self._monotonic()
            seconds += min(max(0.0, monotonic - last), _GAP_SECONDS_MAX)
            transaction = Transaction(connection, seconds, epoch)
            yield transaction
            if is_writing:
                row = (transaction.epoch, transaction.now, monotonic)
                connection.execute("UPDATE store SET (epoch, seconds, monotonic) = (?, ?, ?)", row)
            connection.execute("COMMIT")
            if is_writing:
                self._bound_log(connection)
        except (sqlite3.Error, OSError, StoreSetupError) as error:
            # After some errors a connection is unusable, and a new one costs little.
            self._abandon()
            raise self._down(error) from error
        except BaseException:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _bound_log(self, connection: sqlite3.Connection) -> None:
        """Truncate the log if it has grown too long."""
        log_bytes = self._log.stat().st_size
        if log_bytes <= self._log_bytes_due:
            return
        is_kept = True
        with suppress(sqlite3.Error):  # what was committed is durable anyway
            (is_kept, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        # A long reader, such as a backup, prevents it; do not wait for it at every commit.
        self._log_bytes_due = self._log_bytes_max + (log_bytes if is_kept else 0)

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._inode == _inode(self.path):
            return self._connection
        # The file was replaced or deleted: what is written to the old one would be lost.
        self._abandon()
        return self._open("rw")

    def _abandon(self) -> None:
        with suppress(sqlite3.Error):
            self.close()

    def _open(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode={mode}",
            timeout=self._busy_seconds,
            isolation_level=None,
            uri=True,
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._inode = connection, _inode(self.path)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Set durable commits, create the tables in a new file, and check both."""
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")  # for macOS and the cache of its drive
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        _turn_on_log(connection, time.monotonic() + self._busy_seconds)
        found = (_pragma(connection, "journal_mode"), _pragma(connection, "synchronous"))
        if found != ("wal", _FULL):
            raise StoreSetupError(
                f"the SQLite store {self.path} gets journal_mode {found[0]} and synchronous "
                f"{found[1]} where it needs wal and {_FULL} (FULL); put it on a local disk"
            )
        if _is_empty(connection):
            connection.execute("BEGIN IMMEDIATE")
            if _is_empty(connection):  # still: another process may have been faster
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
            connection.execute("COMMIT")
        self._recognize(connection)

    def _recognize(self, connection: sqlite3.Connection) -> None:
        """Raise StoreSetupError for the file of another program or of another version."""
        version = _pragma(connection, "user_version")
        if _pragma(connection, "application_id") != _APPLICATION:
            raise StoreSetupError(
                f"{self.path} is a database of another program; name a file of its own"
            )
        if version != _SCHEMA_VERSION:
            raise StoreSetupError(
                f"the SQLite store {self.path} has schema {version} and this Sluice knows "
                f"{_SCHEMA_VERSION}; serve it with the Sluice that made it, or name a new file"
            )

    def _down(self, error: Exception) -> StoreError:
        return StoreError(f"the SQLite store {self.path} did not answer: {error}")


def _turn_on_log(connection: sqlite3.Connection, deadline: float) -> None:
    """Turn on write-ahead logging, also while other processes open the same new file."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # The timeout of the connection does not cover this lock.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _pragma(connection: sqlite3.Connection, name: str) -> object:
    value: object = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _is_empty(connection: sqlite3.Connection) -> bool:
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return not tables and _pragma(connection, "application_id") == 0


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
