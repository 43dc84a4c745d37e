"""The store in Redis."""

from sluice_service.store.redis.store import RedisStore

__all__ = ["RedisStore"]
