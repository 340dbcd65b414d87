"""Stores by URL. Opening one makes no connection: that happens at the first call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from retryproof.core.address import check_address, scheme_of
from retryproof.core.errors import ConfigurationError
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.memory import MemoryStore
from retryproof.stores.threaded import InThread


@dataclass(frozen=True, slots=True)
class Scheme:
    """Where a scheme's stores are: "module:factory", each called with (url, timeout=seconds)."""

    blocking: str
    on_loop: str | None
    extra: str | None


_REDIS = Scheme(
    "retryproof.stores.redis.blocking:RedisStore", "retryproof.stores.redis.asynchronous:AsyncRedisStore", "redis"
)
_PSYCOPG, _ASYNCPG = "retryproof.stores.sql.psycopg:from_url", "retryproof.stores.sql.asyncpg:from_url"
_POSTGRES = Scheme(_PSYCOPG, _ASYNCPG, "postgres")

SCHEMES: dict[str, Scheme] = {
    "memory": Scheme("retryproof.stores.url:_open_memory", None, None),
    "sqlite": Scheme("retryproof.stores.sql.sqlite:from_url", None, None),
    "redis": _REDIS,
    "rediss": _REDIS,
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "postgresql+asyncpg": _POSTGRES,
    "postgresql+psycopg": Scheme(_PSYCOPG, None, "postgres"),
}

_named_memory: dict[str, MemoryStore] = {}
os.register_at_fork(after_in_child=_named_memory.clear)  # shared in one process


def open_store(url: str, *, timeout: float = 2.0) -> Store:
    """A blocking store; the caller closes it with `close()`.

    timeout: seconds that one call may take.
    Raises ConfigurationError for an unknown scheme or a missing driver.
    """
    scheme = _scheme(url)
    store: Store = _load(scheme.blocking, scheme)(url, timeout=timeout)
    return store


def open_async(url: str, *, timeout: float = 2.0) -> AsyncStore:
    """A store for the running event loop; see `aopen_store`."""
    scheme = _scheme(url)
    if scheme.on_loop is None:
        return InThread(open_store(url, timeout=timeout))
    store: AsyncStore = _load(scheme.on_loop, scheme)(url, timeout=timeout)
    return store


async def aopen_store(url: str, *, timeout: float = 2.0) -> AsyncStore:
    """A store for the running event loop; the caller closes it with `await aclose()`.

    timeout: seconds that one call may take.
    Raises ConfigurationError for an unknown scheme or a missing driver.
    """
    return open_async(url, timeout=timeout)


def is_async_url(url: str) -> bool:
    """Whether the URL's store for async callers is a native one, tied to an event loop."""
    return _scheme(url).on_loop is not None


def scheme_name(url: str) -> str:
    """The URL's scheme in lower case; ConfigurationError for an unknown one."""
    _scheme(url)
    return scheme_of(url)


def _scheme(url: str) -> Scheme:
    name = scheme_of(url)
    scheme = SCHEMES.get(name)
    if scheme is None:
        known = ", ".join(
            f"{known}://" + (f" (retryproof[{it.extra}])" if it.extra else "") for known, it in SCHEMES.items()
        )
        shown = f"{name}://" if name else "it has no scheme"
        raise ConfigurationError(f"Unknown store URL ({shown}). Known schemes, with the extra to install: {known}.")
    check_address(url)
    return scheme


def _load(path: str, scheme: Scheme) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if scheme.extra is None or (error.name or "").startswith("retryproof"):
            raise
        raise ConfigurationError(
            f"This store needs the package {error.name!r}, which is not installed: "
            f"pip install 'retryproof[{scheme.extra}]'."
        ) from error
    return factory


def _open_memory(url: str, *, timeout: float) -> MemoryStore:
    """`memory://` is new each time; `memory://name` is shared in the process."""
    parts = urlsplit(url)
    name = parts.netloc + parts.path
    return _named_memory.setdefault(name, MemoryStore()) if name else MemoryStore()
