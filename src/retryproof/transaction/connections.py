"""The caller's own connection: what runs inside the caller's transaction, whatever library opened it.

`adapt` takes a connection of psycopg 3 (sync or async), asyncpg, SQLAlchemy 2 (Connection, Session, AsyncConnection,
AsyncSession), Django or sqlite3, and gives the same three things for each: which dialect it speaks, whether a
transaction is open on it, and how to execute a statement in it. Nothing here begins, commits or rolls back unless the
caller asked for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from retryproof.core.errors import ConfigurationError
from retryproof.stores.sql.plan import Row, Statement

Dialect = Literal["postgresql", "sqlite", "mysql"]


@runtime_checkable
class BlockingConnection(Protocol):
    """A caller's connection that blocks."""

    @property
    def dialect(self) -> Dialect: ...

    def check_open(self) -> None:
        """Raise ConfigurationError, saying what to do, unless a usable transaction is open.

        Refused: none open, autocommit, one that already failed, a savepoint that would hide a failure.
        """

    def execute(self, statement: Statement) -> Sequence[Row]:
        """Execute a statement, `$1` style for PostgreSQL and `?` style for the others; its rows, or none."""

    def commit(self) -> None:
        """Commit the caller's transaction; for transactional mode, which was asked to."""

    def rollback(self) -> None:
        """Roll the caller's transaction back."""


@runtime_checkable
class LoopConnection(Protocol):
    """A caller's connection on an event loop; the contract is BlockingConnection's, awaited."""

    @property
    def dialect(self) -> Dialect: ...

    async def check_open(self) -> None: ...

    async def execute(self, statement: Statement) -> Sequence[Row]: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...


_ADAPTERS = {
    "psycopg": "retryproof.transaction.psycopg",
    "psycopg_pool": "retryproof.transaction.psycopg",
    "asyncpg": "retryproof.transaction.asyncpg",
    "sqlalchemy": "retryproof.transaction.sqlalchemy",
    "sqlmodel": "retryproof.transaction.sqlalchemy",
    "django": "retryproof.transaction.django",
    "sqlite3": "retryproof.transaction.sqlite",
}
"""By the package that a connection's class, or a class that it inherits from, comes from."""


def adapt(connection: Any) -> BlockingConnection | LoopConnection:
    """The caller's connection in our terms; raises ConfigurationError for one that is not known."""
    for base in type(connection).__mro__:
        module = _ADAPTERS.get(base.__module__.partition(".")[0])
        if module is not None:
            adapted: BlockingConnection | LoopConnection = importlib.import_module(module).adapt(connection)
            return adapted
    raise ConfigurationError(
        f"{type(connection).__module__}.{type(connection).__qualname__} is no connection that is known here. Pass one "
        "of psycopg, asyncpg, SQLAlchemy (Connection, Session, AsyncConnection, AsyncSession), Django or sqlite3."
    )
