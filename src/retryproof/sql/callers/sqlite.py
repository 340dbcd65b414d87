"""The standard library's sqlite3: its Connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Literal

from retryproof.sql.callers import CLOSED, NOT_OPEN, Blocking
from retryproof.sql.plan import Row, Statement


def adapter_of(kind: type) -> type[Sqlite] | None:
    """The adapter of connections; None for anything else of the library's."""
    return Sqlite if issubclass(kind, sqlite3.Connection) else None


class Sqlite(Blocking):
    """A sqlite3 connection."""

    ADVICE = 'Begin one (`connection.execute("BEGIN IMMEDIATE")`), and leave it open.'
    dialect: Literal["sqlite"] = "sqlite"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        try:
            return None if self._connection.in_transaction else NOT_OPEN
        except sqlite3.ProgrammingError:
            return CLOSED

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        cursor = self._connection.cursor()
        cursor.row_factory = None
        if statement.many:
            cursor.executemany(statement.sql, statement.parameters)
            return ()
        rows: Sequence[Row] = cursor.execute(statement.sql, statement.parameters).fetchall()
        return rows

    def begin(self) -> None:
        """See BlockingConnection."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """See BlockingConnection."""
        if getattr(self._connection, "autocommit", False) is True:  # since Python 3.12; then commit() does nothing
            self._connection.execute("COMMIT")
        else:
            self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
