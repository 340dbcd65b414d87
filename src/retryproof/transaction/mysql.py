"""MariaDB and MySQL through PyMySQL, mysqlclient or MySQL's own connector: as far as `insert_once` needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from retryproof.stores.sql.plan import Row, Statement
from retryproof.transaction.connections import AUTOCOMMIT, Blocking, percent


def adapt(connection: Any) -> Mysql | None:
    """The adapter of a connection; None for anything else of the libraries'."""
    return Mysql(connection) if hasattr(connection, "cursor") and hasattr(connection, "commit") else None


class Mysql(Blocking):
    """A DB-API connection to MariaDB or MySQL."""

    ADVICE = "Turn autocommit off, or begin a transaction."
    dialect: Literal["mysql"] = "mysql"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        mode = getattr(self._connection, "get_autocommit", None)
        on = mode() if callable(mode) else getattr(self._connection, "autocommit", False)
        return AUTOCOMMIT if on is True and not self._in_transaction() else None

    def _in_transaction(self) -> bool:
        status = getattr(self._connection, "server_status", 0)  # PyMySQL's
        return bool(status & 1) or getattr(self._connection, "in_transaction", False) is True

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        sql, parameters = percent(statement)
        with self._connection.cursor() as cursor:
            if statement.many:
                cursor.executemany(sql, parameters)
                return ()
            cursor.execute(sql, tuple(parameters))
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else ()

    def begin(self) -> None:
        """See BlockingConnection."""
        if not self._in_transaction():
            self._connection.begin()

    def commit(self) -> None:
        """See BlockingConnection."""
        self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._connection.rollback()
