"""The stores of SQLAlchemy's engines: those of the databases that the engines lead to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from retryproof.sql.engines.sqlalchemy import file_of, target_of
from retryproof.sql.plan import Plan
from retryproof.sql.sqlite.url import TIMEOUT
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.looped import InLoop

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


def blocking(engine: Engine | AsyncEngine, *, timeout: float = TIMEOUT) -> Store:
    """The store of an engine; one over asyncpg has an event loop of its own."""
    if engine.dialect.driver == "asyncpg":
        return _InLoop(lambda: on_loop(engine, timeout=timeout))
    if engine.dialect.name == "sqlite":
        from retryproof.stores.sql.sqlite import SqliteStore

        return SqliteStore(file_of(engine), timeout=timeout)
    from retryproof.stores.sql.psycopg import PsycopgStore

    return PsycopgStore(target_of(engine), timeout=timeout)


def on_loop(engine: Engine | AsyncEngine, *, timeout: float = TIMEOUT) -> AsyncStore:
    """The store of an engine over asyncpg."""
    from retryproof.stores.sql.asyncpg import AsyncpgStore

    return AsyncpgStore(target_of(engine), timeout=timeout)


class _InLoop(InLoop):
    """The store over asyncpg for callers that block, with what more a store in SQL does."""

    _calls: Any

    def unmark(self, ids: Sequence[bytes]) -> None:
        """See PostgresStore."""
        self._make(self._calls.unmark, ids)

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """See PostgresStore."""
        result: T = self._make(self._calls.perform, plan)
        return result
