"""Redis and Valkey: one script call a batch. What the server has to promise is in docs/howto/redis.md.

`scripts/` decides, `protocol` says what is sent and what an answer means, `settings` how to connect; `blocking` and
`asynchronous` send. The classes are loaded when they are asked for, since they need the `redis` package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retryproof.stores.redis.asynchronous import AsyncRedisStore
    from retryproof.stores.redis.blocking import RedisStore

__all__ = ["AsyncRedisStore", "RedisStore"]

_MODULES = {
    "AsyncRedisStore": "retryproof.stores.redis.asynchronous",
    "RedisStore": "retryproof.stores.redis.blocking",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ModuleNotFoundError(
            "the Redis store needs the redis package: pip install 'retryproof[redis]'", name="redis"
        ) from error
