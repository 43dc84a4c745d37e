"""Which store a URL names."""

from pathlib import Path
from urllib.parse import urlsplit

from sluice_service.store.memory import MemoryStore
from sluice_service.store.protocol import Store, StoreSetupError

_SQLITE = "sqlite:"
_REDIS = ("redis://", "rediss://")
_FORMS = (
    "memory, sqlite:///absolute/path.db, sqlite:relative/path.db, "
    "redis://HOST:PORT/0 or rediss://:PASSWORD@HOST:PORT/0"
)


def open_store(url: str, *, tombstone_seconds: float, record_seconds: float) -> Store:
    """The store at `url`, not started yet. Raises StoreSetupError for a URL of none.

    A closed sequence is remembered for `tombstone_seconds`; a live one that nobody
    renews is dropped after `record_seconds`.
    """
    if url == "memory":
        return MemoryStore(tombstone_seconds=tombstone_seconds, record_seconds=record_seconds)
    path = _read_path(url)
    if path is not None:
        # Where SQLite is not used, Python may have been built without it.
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
    """The file that a URL of SQLite names. Raises StoreSetupError for one nobody means."""
    path = url.removeprefix(_SQLITE)
    names_host = path.startswith("//") and not path.startswith("///")
    if not url.startswith(_SQLITE) or not path.strip("/") or names_host:
        return None
    if not path.startswith("/"):
        return Path(path)
    file = Path("/" + path.lstrip("/"))
    # Elsewhere three slashes begin a relative path: let nobody's file land in the root.
    if file.parent == Path("/"):
        raise StoreSetupError(
            f"{url} names the file {file}; for a file in the working directory say "
            f"sqlite:{file.name}, else name a folder: sqlite:///var/lib/sluice/sequences.db"
        )
    return file


def redact(url: str) -> str:
    """The URL as it may be shown: without user, password and options."""
    scheme, separator, _ = url.partition("://")
    if url.startswith(_SQLITE):
        return url
    if not separator:
        return "…" if "@" in url else url
    try:
        parts = urlsplit(url)
        # A password with special characters that are not encoded may be anywhere.
        is_plain = "@" not in parts.path + parts.query + parts.fragment and parts.port != 0
    except ValueError:
        is_plain = False
    if not is_plain:
        return f"{scheme}://…"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
