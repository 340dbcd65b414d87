"""aiosqlite: its Connection."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import aiosqlite

from retryproof.forks import has_inherited_files
from retryproof.sql.callers import CLOSED, NOT_OPEN, OnLoop, innermost
from retryproof.sql.plan import Row, Statement

FORKED = "it was made before this process was forked, and its thread is not here"


def adapter_of(kind: type) -> type[Aiosqlite] | None:
    """The adapter of connections; None for anything else of the library's."""
    return Aiosqlite if issubclass(kind, aiosqlite.Connection) else None


class Aiosqlite(OnLoop):
    """An aiosqlite connection."""

    ADVICE = 'Begin one (`await connection.execute("BEGIN IMMEDIATE")`), and leave it open.'
    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        try:
            if not self._connection.in_transaction:
                return NOT_OPEN
        except ValueError:
            return CLOSED
        return FORKED if has_inherited_files() and not self._thread.is_alive() else None

    @property
    def _thread(self) -> threading.Thread:
        """The one that executes, which the connection itself was in earlier releases."""
        connection: Any = self._connection
        thread: threading.Thread = getattr(connection, "_thread", connection)
        return thread

    async def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        if statement.many:
            async with self._connection.executemany(statement.sql, statement.parameters):
                return ()
        async with self._connection.execute(statement.sql, statement.parameters) as cursor:
            return [tuple(row) for row in await cursor.fetchall()]

    async def driver(self) -> object:
        """See BlockingConnection."""
        return innermost(self._connection)

    async def begin(self) -> None:
        """See BlockingConnection."""
        if not self._connection.in_transaction:
            await self._connection.execute("BEGIN IMMEDIATE")

    async def commit(self) -> None:
        """See BlockingConnection."""
        await self._connection.execute("COMMIT")

    async def rollback(self) -> None:
        """See BlockingConnection."""
        if self._connection.in_transaction:
            await self._connection.execute("ROLLBACK")
