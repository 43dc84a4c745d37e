"""Checks that a Redis is set up to keep data, as far as it tells."""

from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from sluice_service.store.protocol import StoreSetupError

_OLDEST = (6, 0)


async def check(redis: Redis, name: str) -> list[str]:
    """Warnings about data that this Redis may lose.

    Raises StoreSetupError if it cannot be used, RedisError if it does not answer.
    """
    try:
        told = await redis.info()
    except AuthenticationError as error:
        raise StoreSetupError(
            f"the Redis store {name} refuses the login ({error}); give the user and password "
            "in the URL: redis://USER:PASSWORD@HOST:PORT/0"
        ) from error
    except NoPermissionError as error:
        raise StoreSetupError(
            f"the Redis store {name} forbids INFO ({error}); permit it to this user"
        ) from error
    _refuse(told, name)
    warnings = []
    if told.get("connected_slaves"):
        warnings.append(
            f"the Redis store {name} has replicas, which it does not wait for: a failover may "
            "lose acknowledged writes"
        )
    try:
        shown = await redis.config_get("*")
    except ResponseError as error:
        return [
            *warnings,
            f"the Redis store {name} does not show its settings ({error}): make sure that it "
            "has appendonly yes, appendfsync always and maxmemory-policy noeviction",
        ]
    return warnings + _judge({str(key): str(value) for key, value in shown.items()}, name)


def _refuse(told: dict[str, Any], name: str) -> None:
    version = str(told.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise StoreSetupError(
            f"the Redis store {name} is Redis {version}; use {'.'.join(map(str, _OLDEST))} or newer"
        )
    if told.get("cluster_enabled"):
        raise StoreSetupError(
            f"the Redis store {name} is a cluster, over which no script is atomic; name a single "
            "primary"
        )
    if told.get("role") != "master":
        raise StoreSetupError(
            f"the Redis store {name} is a {told.get('role')}, which takes no writes; name its "
            "primary"
        )


def _judge(settings: dict[str, str], name: str) -> list[str]:
    policy = settings.get("maxmemory-policy", "noeviction")
    if policy.startswith("allkeys"):
        raise StoreSetupError(
            f"the Redis store {name} may evict sequences (maxmemory-policy {policy}); set it to "
            "noeviction: CONFIG SET maxmemory-policy noeviction"
        )
    if settings.get("appendonly") != "yes":
        return [
            f"the Redis store {name} has appendonly {settings.get('appendonly')}: a restart of "
            "Redis loses what came after its last snapshot"
        ]
    warnings = []
    if (fsync := settings.get("appendfsync")) != "always":
        warnings.append(
            f"the Redis store {name} has appendfsync {fsync}: a crash of its machine loses the "
            "writes of about a second; strict durability needs appendfsync always"
        )
    elif settings.get("no-appendfsync-on-rewrite") == "yes":
        warnings.append(
            f"the Redis store {name} has no-appendfsync-on-rewrite yes: while it rewrites its "
            "file, a crash of its machine loses writes"
        )
    return warnings
