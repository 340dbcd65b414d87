"""The stores of SQLAlchemy's engines: those of the databases that the engines lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retryproof.sql.engines.sqlalchemy import file_of, target_of
from retryproof.sql.sqlite.url import TIMEOUT
from retryproof.stores.base import AsyncStore, Store

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


def blocking(engine: Engine | AsyncEngine, *, timeout: float = TIMEOUT) -> Store:
    """The store of an engine over SQLite or psycopg."""
    if engine.dialect.name == "sqlite":
        from retryproof.stores.sql.sqlite import SqliteStore

        return SqliteStore(file_of(engine), timeout=timeout)
    from retryproof.stores.sql.psycopg import PsycopgStore

    return PsycopgStore(target_of(engine), timeout=timeout)


def on_loop(engine: AsyncEngine, *, timeout: float = TIMEOUT) -> AsyncStore:
    """The store of an engine over asyncpg."""
    from retryproof.stores.sql.asyncpg import AsyncpgStore

    return AsyncpgStore(target_of(engine), timeout=timeout)
