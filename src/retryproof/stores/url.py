"""Stores by URL, or by an engine of SQLAlchemy's. Opening one makes no connection: that happens at the first call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from retryproof.core.address import check_address, scheme_of
from retryproof.core.errors import ConfigurationError
from retryproof.stores.base import AsyncStore, DatabaseEngine, Store
from retryproof.stores.looped import InLoop
from retryproof.stores.memory import MemoryStore
from retryproof.stores.threaded import InThread


@dataclass(frozen=True, slots=True)
class Entry:
    """All that is said of a kind of store, in one place: a new one is added to ENTRIES and nowhere else.

    schemes: of its URLs. drivers: of the SQLAlchemy engines that it takes; these stand in the place of the URL below.
    blocking, on_loop: "module:factory" of its stores, each called with (url, timeout=seconds); a kind that has only one
        serves callers of the other colour through a thread.
    doctor: the module whose `diagnose(url, timeout=seconds)` looks for what breaks its safety.
    migrations: the module with `pending(url)` and `migrate(url, progress=tell)`; None where there is no schema.
    check: "module:function" that refuses an engine before it is used.
    extra: what is installed for it, `retryproof[extra]`; None: the standard library has it.
    Modules are imported when they are first needed, since each imports a library that may be missing.
    """

    schemes: tuple[str, ...]
    blocking: str | None
    on_loop: str | None
    doctor: str | None
    migrations: str | None = None
    extra: str | None = None
    drivers: tuple[str, ...] = ()
    check: str | None = None


ENTRIES = (
    Entry(("memory",), "retryproof.stores.url:_open_memory", None, "retryproof.stores.memory_doctor"),
    Entry(
        ("sqlite",),
        "retryproof.stores.sql.sqlite:from_url",
        None,
        "retryproof.sql.sqlite.doctor",
        "retryproof.sql.sqlite.migrate",
    ),
    Entry(
        ("redis", "rediss"),
        "retryproof.stores.redis.blocking:RedisStore",
        "retryproof.stores.redis.asynchronous:AsyncRedisStore",
        "retryproof.stores.redis.doctor",
        extra="redis",
    ),
    Entry(
        ("postgresql", "postgres", "postgresql+asyncpg"),
        "retryproof.stores.sql.psycopg:from_url",
        "retryproof.stores.sql.asyncpg:from_url",
        "retryproof.sql.postgres.doctor",
        "retryproof.sql.postgres.migrate",
        extra="postgres",
    ),
    Entry(
        ("postgresql+psycopg",),
        "retryproof.stores.sql.psycopg:from_url",
        None,
        "retryproof.sql.postgres.doctor",
        "retryproof.sql.postgres.migrate",
        extra="postgres",
    ),
    Entry(
        ("django",),
        "retryproof.stores.sql.django:from_url",
        None,
        "retryproof.sql.engines.django",
        "retryproof.sql.engines.django",
        extra="django",
    ),
    Entry(
        (),
        "retryproof.stores.sql.sqlalchemy:blocking",
        None,
        None,
        "retryproof.sql.engines.sqlalchemy",
        extra="postgres",
        drivers=("psycopg", "psycopg_async", "pysqlite", "aiosqlite"),
        check="retryproof.sql.engines.sqlalchemy:check",
    ),
    Entry(
        (),
        "retryproof.stores.sql.sqlalchemy:blocking",
        "retryproof.stores.sql.sqlalchemy:on_loop",
        None,
        "retryproof.sql.engines.sqlalchemy",
        extra="postgres",
        drivers=("asyncpg",),
    ),
)
SCHEMES = {scheme: entry for entry in ENTRIES for scheme in entry.schemes}
DRIVERS = {driver: entry for entry in ENTRIES for driver in entry.drivers}

_named_memory: dict[str, MemoryStore] = {}
os.register_at_fork(after_in_child=_named_memory.clear)  # shared in one process


def open_store(url: str | DatabaseEngine, *, timeout: float = 2.0) -> Store:
    """A blocking store; the caller closes it with `close()`.

    url: or a SQLAlchemy Engine or AsyncEngine, which stays the caller's. timeout: seconds that one call may take.
    Raises ConfigurationError for an unknown scheme or a missing driver.
    """
    entry = entry_of(url)
    if entry.blocking is None:
        return InLoop(lambda: open_async(url, timeout=timeout))
    store: Store = _factory(entry, entry.blocking)(url, timeout=timeout)
    return store


def open_async(url: str | DatabaseEngine, *, timeout: float = 2.0) -> AsyncStore:
    """A store for the running event loop; see `aopen_store`."""
    entry = entry_of(url)
    if entry.on_loop is None:
        return InThread(open_store(url, timeout=timeout))
    store: AsyncStore = _factory(entry, entry.on_loop)(url, timeout=timeout)
    return store


async def aopen_store(url: str | DatabaseEngine, *, timeout: float = 2.0) -> AsyncStore:
    """A store for the running event loop; the caller closes it with `await aclose()`.

    url: or a SQLAlchemy Engine or AsyncEngine, which stays the caller's. timeout: seconds that one call may take.
    Raises ConfigurationError for an unknown scheme or a missing driver.
    """
    return open_async(url, timeout=timeout)


def is_engine(store: object) -> TypeGuard[DatabaseEngine]:
    """Whether it is an engine of SQLAlchemy's, of any database."""
    return any(f"{kind.__module__}.{kind.__name__}" in _ENGINES for kind in type(store).__mro__)


_ENGINES = ("sqlalchemy.engine.base.Engine", "sqlalchemy.ext.asyncio.engine.AsyncEngine")


def is_async_url(url: str | DatabaseEngine) -> bool:
    """Whether the store of a URL or an engine for async callers is a native one, tied to an event loop."""
    return entry_of(url).on_loop is not None


def entry_of(url: str | DatabaseEngine) -> Entry:
    """The entry of the URL's scheme, or of the engine's driver; ConfigurationError for an unknown one."""
    if isinstance(url, str):
        return _entry_of_url(url)
    if not is_engine(url):
        raise ConfigurationError(f"{url!r} is neither a URL like 'sqlite:///keys.db' nor an engine of SQLAlchemy's.")
    entry = DRIVERS.get(url.dialect.driver) if url.dialect.name in ("postgresql", "sqlite") else None
    if entry is None:
        raise ConfigurationError(
            f"No store works over SQLAlchemy's {url.dialect.name}+{url.dialect.driver}; use postgresql+psycopg, "
            "postgresql+asyncpg, sqlite or sqlite+aiosqlite."
        )
    if entry.check is not None:
        _factory(entry, entry.check)(url)
    return entry


def _entry_of_url(url: str) -> Entry:
    name = scheme_of(url)
    entry = SCHEMES.get(name)
    if entry is None:
        known = ", ".join(
            f"{known}://" + (f" (retryproof[{it.extra}])" if it.extra else "") for known, it in SCHEMES.items()
        )
        shown = f"{name}://" if name else "it has no scheme"
        raise ConfigurationError(f"Unknown store URL ({shown}). Known schemes, with the extra to install: {known}.")
    check_address(url)
    return entry


def load(entry: Entry, module: str) -> Any:
    """A module of the entry's; ConfigurationError where a library that it imports is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if entry.extra is None or (error.name or "").startswith("retryproof"):
            raise
        raise ConfigurationError(
            f"This store needs the package {error.name!r}, which is not installed: "
            f"pip install 'retryproof[{entry.extra}]'."
        ) from error


def _factory(entry: Entry, path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    factory: Callable[..., Any] = getattr(load(entry, module), name)
    return factory


def _open_memory(url: str, *, timeout: float) -> MemoryStore:
    """`memory://` is new each time; `memory://name` is shared in the process."""
    parts = urlsplit(url)
    name = parts.netloc + parts.path
    return _named_memory.setdefault(name, MemoryStore()) if name else MemoryStore()
