"""Opens the store that a URL names."""

from pathlib import Path

from sluice_service.store.protocol import Store, StoreSetupError
from sluice_service.store.redaction import redact

_SQLITE = "sqlite:"
_REDIS = ("redis://", "rediss://")
_FORMS = (
    "sqlite:///absolute/path.db, sqlite:relative/path.db, "
    "redis://HOST:PORT/0 or rediss://:PASSWORD@HOST:PORT/0"
)


def open_store(url: str, *, tombstone_seconds: float, record_seconds: float) -> Store:
    """The store at `url`, not started yet. Raises StoreSetupError for a URL of no store.

    A closed sequence is remembered for `tombstone_seconds`. A live sequence whose lease is
    not renewed for `record_seconds` is deleted.
    """
    path = _read_path(url)
    if path is not None:
        # Imported here: Python may have been built without SQLite.
        from sluice_service.store.sqlite import SqliteStore

        return SqliteStore(
            path,
            tombstone_seconds=tombstone_seconds,
            record_seconds=record_seconds,
        )
    if url.startswith(_REDIS):
        try:
            from sluice_service.store.redis import RedisStore
        except ImportError as error:
            raise StoreSetupError(
                f"a redis:// store needs redis-py ({error}): pip install 'sluice-serving[redis]'"
            ) from error
        return RedisStore(url, tombstone_seconds=tombstone_seconds, record_seconds=record_seconds)
    raise StoreSetupError(f"{redact(url)!r} is not a store; a store is one of {_FORMS}")


def _read_path(url: str) -> Path | None:
    """The file that a SQLite URL names. Raises StoreSetupError for a file in the root folder."""
    path = url.removeprefix(_SQLITE)
    names_host = path.startswith("//") and not path.startswith("///")
    if not url.startswith(_SQLITE) or not path.strip("/") or names_host:
        return None
    if not path.startswith("/"):
        return Path(path)
    file = Path("/" + path.lstrip("/"))
    # Other programs read three slashes as the start of a relative path: ask what was meant.
    if file.parent == Path("/"):
        raise StoreSetupError(
            f"{url} names the file {file}; for a file in the working directory say "
            f"sqlite:{file.name}, else name a folder: sqlite:///var/lib/sluice/sequences.db"
        )
    return file
