"""asyncpg: its Connection, also from a pool."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Literal

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction

from retryproof.sql.callers import BLOCK, CLOSED, NOT_OPEN, OnLoop
from retryproof.sql.plan import Row, Statement
from retryproof.sql.postgres.asyncpg import counted


def adapter_of(kind: type) -> type[Asyncpg] | None:
    """The adapter of connections; None for anything else of the library's."""
    return Asyncpg if issubclass(kind, (PoolConnectionProxy, asyncpg.Connection)) else None


class Asyncpg(OnLoop):
    """An asyncpg connection. asyncpg does not tell a savepoint from a transaction, nor one that has failed.

    What it began itself it knows again; what went back to its pool is closed.
    """

    ADVICE = "Start a transaction on it (`await connection.transaction().start()`), and leave it open."
    ASKS = False
    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._begun: Transaction | None = None

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        connection = self._underneath()
        try:
            if connection.is_closed():
                return CLOSED
            if self._begun is not None and connection._top_xact is not self._begun:
                return NOT_OPEN
            return None if connection.is_in_transaction() else NOT_OPEN
        except asyncpg.InterfaceError:  # it is with its pool again
            return CLOSED

    def block(self) -> str | None:
        """See BlockingConnection."""
        return BLOCK if getattr(self._top(), "_managed", False) else None

    def known_driver(self) -> object:
        """See BlockingConnection."""
        connection = self._underneath()
        self._begun = getattr(connection, "_top_xact", None)
        return connection

    async def driver(self) -> object:
        """See BlockingConnection."""
        return self.known_driver()

    def execute(self, statement: Statement) -> Awaitable[Sequence[Row]]:
        """See BlockingConnection."""
        connection = self._underneath()
        if statement.many:
            return _without_rows(connection.executemany(statement.sql, statement.parameters))
        if statement.counted:
            return counted(connection.execute(statement.sql, *statement.parameters))
        rows: Awaitable[Sequence[Row]] = connection.fetch(statement.sql, *statement.parameters)
        return rows

    async def begin(self) -> None:
        """See BlockingConnection."""
        connection = self._underneath()
        if not connection.is_in_transaction():
            await connection.transaction().start()

    def commit(self) -> Awaitable[None]:
        """See BlockingConnection."""
        started = self._started()
        ending: Awaitable[None] = self._connection.execute("COMMIT") if started is None else started.commit()
        return ending

    def rollback(self) -> Awaitable[None]:
        """See BlockingConnection."""
        started = self._started()
        ending: Awaitable[None] = self._connection.execute("ROLLBACK") if started is None else started.rollback()
        return ending

    def _started(self) -> Any:
        """The transaction that was started by hand, which has to be told of its end; an `async with` block need not."""
        found = self._top()
        return None if found is None or getattr(found, "_managed", False) else found

    def _top(self) -> Transaction | None:
        found: Transaction | None = getattr(self._underneath(), "_top_xact", None)
        return found

    def _underneath(self) -> Any:
        """What a pool lent, which is quicker to ask; what stands for it where it is with its pool again."""
        return getattr(self._connection, "_con", None) or self._connection


async def _without_rows(executing: Awaitable[None]) -> Sequence[Row]:
    await executing
    return ()
