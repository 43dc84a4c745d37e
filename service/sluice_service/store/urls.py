"""Which store a URL names."""

from pathlib import Path
from urllib.parse import urlsplit

from sluice_service.store.memory import MemoryStore
from sluice_service.store.protocol import Store, StoreSetupError

_SQLITE = "sqlite:///"
_REDIS = ("redis://", "rediss://")
_FORMS = (
    "memory, sqlite:///relative/path.db, sqlite:////absolute/path.db, "
    "redis://HOST:PORT/0 or rediss://:PASSWORD@HOST:PORT/0"
)


def open_store(url: str, *, tombstone_seconds: float, record_seconds: float) -> Store:
    """The store at `url`, not started yet. Raises StoreSetupError for a URL of none.

    A closed sequence is remembered for `tombstone_seconds`; a live one that nobody
    renews is dropped after `record_seconds`.
    """
    if url == "memory":
        return MemoryStore(tombstone_seconds=tombstone_seconds, record_seconds=record_seconds)
    if url.startswith(_SQLITE) and len(url) > len(_SQLITE):
        # Where SQLite is not used, Python may have been built without it.
        from sluice_service.store.sqlite import SqliteStore

        return SqliteStore(
            Path(url.removeprefix(_SQLITE)),
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


def redact(url: str) -> str:
    """The URL as it may be shown: without user, password and options."""
    scheme, separator, _ = url.partition("://")
    if not separator or url.startswith(_SQLITE):
        return "…" if "@" in url and not separator else url
    try:
        parts = urlsplit(url)
        # A password with special characters that are not encoded may be anywhere.
        is_plain = "@" not in parts.path + parts.query + parts.fragment and parts.port != 0
    except ValueError:
        is_plain = False
    if not is_plain:
        return f"{scheme}://…"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
