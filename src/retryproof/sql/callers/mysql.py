"""MariaDB and MySQL through PyMySQL, mysqlclient, MySQL's own connector, asyncmy or aiomysql: what `insert_once` needs.

A DB-API connection counts as being in a transaction where autocommit is off, or where one was begun on it. The server
rolls a whole transaction back when it is the victim of a deadlock, and libraries do not notice, since an error carries
no status: with autocommit on, the next statement would commit by itself. So there the server is asked first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from retryproof.sql.callers import AUTOCOMMIT, CLOSED, Blocking, OnLoop, check_usable, percent
from retryproof.sql.plan import Row, Statement

ADVICE = "Turn autocommit off, or begin a transaction."
IN_TRANSACTION = 1
"""SERVER_STATUS_IN_TRANS of the protocol's status flags."""
_ON_LOOP = ("asyncmy", "aiomysql")


def adapter_of(kind: type) -> type[Mysql | LoopMysql] | None:
    """The adapter of connections; None for anything else of the libraries'."""
    package, _, module = kind.__module__.partition(".")
    lent = hasattr(kind, "__getattr__")  # by the connector's pool: it has the methods of the connection inside
    if module.startswith("connector.aio") or not (lent or (hasattr(kind, "cursor") and hasattr(kind, "commit"))):
        return None
    return LoopMysql if package in _ON_LOOP else Mysql


class Mysql(Blocking):
    """A DB-API connection to MariaDB or MySQL."""

    ADVICE = ADVICE
    dialect: Literal["mysql"] = "mysql"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        return _unusable(self._connection)

    def check_open(self) -> None:
        """See BlockingConnection."""
        if _commits_by_itself(self._connection) and _in_transaction(self._connection):
            self._connection.ping(False)  # reconnect=False, which the libraries name differently
        super().check_open()

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        sql, parameters = percent(statement)
        with self._connection.cursor() as cursor:
            if statement.many:
                cursor.executemany(sql, parameters)
                return ()
            cursor.execute(sql, tuple(parameters))
            return _rows(cursor.fetchall()) if cursor.description else ()

    def begin(self) -> None:
        """See BlockingConnection."""
        if not _in_transaction(self._connection):
            start = getattr(self._connection, "start_transaction", None) or self._connection.begin
            start()

    def commit(self) -> None:
        """See BlockingConnection."""
        self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._connection.rollback()


class LoopMysql(OnLoop):
    """A connection of asyncmy or aiomysql."""

    ADVICE = ADVICE
    dialect: Literal["mysql"] = "mysql"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        return _unusable(self._connection)

    async def check_open(self) -> None:
        """See BlockingConnection."""
        if _commits_by_itself(self._connection) and _in_transaction(self._connection):
            await self._connection.ping(False)
        check_usable(self)

    async def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        sql, parameters = percent(statement)
        async with self._connection.cursor() as cursor:
            if statement.many:
                await cursor.executemany(sql, parameters)
                return ()
            await cursor.execute(sql, tuple(parameters))
            return _rows(await cursor.fetchall()) if cursor.description else ()

    async def begin(self) -> None:
        """See BlockingConnection."""
        if not _in_transaction(self._connection):
            await self._connection.begin()

    async def commit(self) -> None:
        """See BlockingConnection."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """See BlockingConnection."""
        await self._connection.rollback()


def _unusable(connection: Any) -> str | None:
    if getattr(connection, "open", True) in (False, 0) or getattr(connection, "closed", False) is True:
        return CLOSED
    return AUTOCOMMIT if _commits_by_itself(connection) and not _in_transaction(connection) else None


def _commits_by_itself(connection: Any) -> bool:
    mode = getattr(connection, "get_autocommit", None)
    return bool(mode() if callable(mode) else getattr(connection, "autocommit", False))


def _in_transaction(connection: Any) -> bool:
    status = getattr(connection, "server_status", 0)
    return bool(status & IN_TRANSACTION) or getattr(connection, "in_transaction", False) is True


def _rows(fetched: Sequence[Any]) -> Sequence[Row]:
    """Tuples, in the order of the columns, whatever the connection's cursors give."""
    return [tuple(row.values() if isinstance(row, Mapping) else row) for row in fetched]
