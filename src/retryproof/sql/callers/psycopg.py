"""psycopg 3: Connection and AsyncConnection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import psycopg
from psycopg import AsyncRawCursor, RawCursor
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from retryproof.sql.callers import AUTOCOMMIT, CLOSED, FAILED, NOT_OPEN, SAVEPOINT, Blocking, OnLoop
from retryproof.sql.plan import Row, Statement

ADVICE = "Use a connection with autocommit off, or open a transaction on it, and leave it open."
PIPELINE = "it is in pipeline mode, in which it answers later; leave the pipeline first"


def adapter_of(kind: type) -> type[Psycopg | AsyncPsycopg] | None:
    """The adapter of connections; None for anything else of the library's."""
    if issubclass(kind, psycopg.Connection):
        return Psycopg
    return AsyncPsycopg if issubclass(kind, psycopg.AsyncConnection) else None


def _unusable(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], to_commit: bool, used: bool
) -> str | None:
    if connection.closed:
        return CLOSED
    if connection.info.pipeline_status != PipelineStatus.OFF:
        return PIPELINE
    status = connection.info.transaction_status
    if status == TransactionStatus.INERROR:
        return FAILED
    if status == TransactionStatus.IDLE and connection.autocommit:
        return AUTOCOMMIT
    if status == TransactionStatus.IDLE and used:  # a statement of ours had begun one
        return NOT_OPEN
    # psycopg does not say in public how many `transaction()` blocks are around.
    blocks: int = getattr(connection, "_num_transactions", 0)
    if blocks > 1:
        return SAVEPOINT
    if blocks and to_commit:
        return "a `transaction()` block is around, which commits by itself"
    return None


class Psycopg(Blocking):
    """A psycopg Connection."""

    ADVICE = ADVICE
    ASKS = False
    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._used = False

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        return _unusable(self._connection, to_commit, self._used)

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        self._used = True
        with RawCursor(self._connection, row_factory=tuple_row) as cursor:
            if statement.many:
                cursor.executemany(statement.sql.encode(), statement.parameters)
                return ()
            cursor.execute(statement.sql.encode(), statement.parameters)
            if statement.counted:
                return [()] * cursor.rowcount
            return cursor.fetchall() if cursor.description else ()

    def begin(self) -> None:
        """See BlockingConnection."""
        if self._connection.info.transaction_status == TransactionStatus.IDLE and self._connection.autocommit:
            self._connection.execute("BEGIN")

    def commit(self) -> None:
        """See BlockingConnection."""
        self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._connection.rollback()


class AsyncPsycopg(OnLoop):
    """A psycopg AsyncConnection."""

    ADVICE = ADVICE
    ASKS = False
    dialect: Literal["postgresql"] = "postgresql"

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._used = False

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        return _unusable(self._connection, to_commit, self._used)

    async def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        self._used = True
        async with AsyncRawCursor(self._connection, row_factory=tuple_row) as cursor:
            if statement.many:
                await cursor.executemany(statement.sql.encode(), statement.parameters)
                return ()
            await cursor.execute(statement.sql.encode(), statement.parameters)
            if statement.counted:
                return [()] * cursor.rowcount
            return await cursor.fetchall() if cursor.description else ()

    async def begin(self) -> None:
        """See BlockingConnection."""
        if self._connection.info.transaction_status == TransactionStatus.IDLE and self._connection.autocommit:
            await self._connection.execute("BEGIN")

    async def commit(self) -> None:
        """See BlockingConnection."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """See BlockingConnection."""
        await self._connection.rollback()
