"""The store in one SQLite file."""

from sluice_service.store.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
