"""SQLAlchemy 2: Connection, Session, AsyncConnection, AsyncSession, over PostgreSQL's, SQLite's and MariaDB's drivers.

The async ones are the sync ones behind `run_sync`, so there is one adapter. A session is flushed before our statements:
what is pending belongs to the transaction, and its errors come before the record is touched.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, scoped_session

from retryproof.core.errors import ConfigurationError
from retryproof.sql.callers import (
    AUTOCOMMIT,
    BLOCK,
    CLOSED,
    FAILED,
    NOT_OPEN,
    SAVEPOINT,
    Blocking,
    DialectName,
    OnLoop,
    innermost,
    percent,
)
from retryproof.sql.plan import Row, Statement

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

T = TypeVar("T")

DIALECTS: dict[str, DialectName] = {
    "postgresql": "postgresql",
    "sqlite": "sqlite",
    "mysql": "mysql",
    "mariadb": "mysql",
}
_AS_WRITTEN = ("asyncpg", "pysqlite", "aiosqlite")
"""Drivers that take our placeholders as they are."""
_PERCENT = ("psycopg", "psycopg_async", "pymysql", "mysqldb", "mysqlconnector", "asyncmy", "aiomysql")


def adapter_of(kind: type) -> Callable[[Any], OfConnection | OfSession | OfAsync] | None:
    """What makes the adapter of connections or sessions; None for anything else of the library's."""
    if issubclass(kind, scoped_session):
        return lambda scoped: OfSession(scoped())
    if issubclass(kind, Session):
        return OfSession
    if issubclass(kind, Connection):
        return OfConnection
    # It needs greenlet, which not everybody has; who has such a connection has imported it.
    extension = sys.modules.get("sqlalchemy.ext.asyncio")
    if extension is None:
        return None
    if issubclass(kind, extension.async_scoped_session):
        return lambda scoped: _of_async_session(scoped())
    if issubclass(kind, extension.AsyncSession):
        return _of_async_session
    if issubclass(kind, extension.AsyncConnection):
        return lambda connection: OfAsync(connection, OfConnection(connection.sync_connection))
    return None


def _of_async_session(session: AsyncSession) -> OfAsync:
    return OfAsync(session, OfSession(session.sync_session))


class _Begun:
    """Remembers the transaction that was first used, so that another one is not taken for it."""

    transaction: object = None

    def ended(self, present: object) -> bool:
        """Whether the one that was first used is over."""
        return self.transaction is not None and self.transaction is not present

    def use(self, present: object) -> None:
        """Remember the first."""
        if self.transaction is None:
            self.transaction = present


class _Guard:
    """Refuses every commit of a connection or session but ours, before it happens."""

    def __init__(self, target: Any, name: str) -> None:
        self._target = target
        self._name = name
        self._on = True
        me = weakref.ref(self)  # a forgotten adapter must not leave a connection that refuses to commit

        def refuse(given: Any) -> None:
            guard = me()
            if guard is not None and guard._on and not (name == "before_commit" and given.in_nested_transaction()):
                if name == "commit":  # a connection counts its transaction as over then, and would not roll it back
                    given.connection.rollback()
                raise ConfigurationError(
                    "The operation's transaction is committed after its handler returns, with its result: use flush(), "
                    "not commit(), and no block that commits by itself. Nothing was committed."
                )

        self._refuse = refuse
        event.listen(target, name, refuse)

    def end(self) -> None:
        """Let commits through again."""
        self._on = False
        event.remove(self._target, self._name, self._refuse)


class _Guarded(Blocking):
    """What connections and sessions have in common: SQLAlchemy knows blocks, and may be told to refuse a commit."""

    IDENTIFIED = True
    EVENT = ""
    _guard: _Guard | None = None
    _outer: Any

    def block(self) -> str | None:
        """See BlockingConnection; there is no public name for it."""
        return None if getattr(self._outer, "_trans_context_manager", None) is None else BLOCK

    def guard(self) -> None:
        """See BlockingConnection."""
        self._guard = _Guard(self._outer, self.EVENT)

    def unguard(self) -> None:
        """See BlockingConnection."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.end()


class OfConnection(_Guarded):
    """A Connection."""

    EVENT = "commit"

    ADVICE = "Use a connection without AUTOCOMMIT, outside of begin_nested(), and leave its transaction open."

    def __init__(self, connection: Connection | None) -> None:
        if connection is None:
            raise ConfigurationError("This AsyncConnection was not started; enter it or await it first.")
        self._connection = self._outer = connection
        self._begun = _Begun()
        self._driver = _check_driver(connection)
        self.dialect: DialectName = DIALECTS[connection.dialect.name]

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        connection = self._connection
        if connection.closed:
            return CLOSED
        if _autocommits(connection):
            return AUTOCOMMIT
        if connection.in_nested_transaction():
            return SAVEPOINT
        if self._begun.ended(connection.get_transaction()):
            return NOT_OPEN
        present = connection.get_transaction()
        return FAILED if present is not None and not present.is_active else None

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        self.begin()
        self._begun.use(self._connection.get_transaction())
        return _execute(self._connection, self._driver, statement)

    def driver(self) -> object:
        """See BlockingConnection."""
        return innermost(self._connection.connection.driver_connection)

    def begin(self) -> None:
        """See BlockingConnection."""
        if not self._connection.in_transaction():
            self._connection.begin()

    def commit(self) -> None:
        """See BlockingConnection."""
        self._connection.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._connection.rollback()


class OfSession(_Guarded):
    """A Session."""

    EVENT = "before_commit"

    ADVICE = OfConnection.ADVICE

    def __init__(self, session: Session) -> None:
        self._session = self._outer = session
        self._begun = _Begun()
        bind = session.get_bind()
        self._driver = _check_driver(bind)
        self.dialect: DialectName = DIALECTS[bind.dialect.name]

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        session = self._session
        if session.in_nested_transaction():
            return SAVEPOINT
        present = session.get_transaction()
        if self._begun.ended(present):
            return NOT_OPEN
        if present is not None and not present.is_active:
            return FAILED
        if to_commit and isinstance(session.get_bind(), Connection):
            return "it is bound to a Connection, whose transaction it does not commit; pass the Connection"
        bind = session.get_bind() if present is None else session.connection()
        return AUTOCOMMIT if _autocommits(bind) else None

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        session = self._session
        session.flush()
        connection = session.connection()
        self._begun.use(session.get_transaction())
        return _execute(connection, self._driver, statement)

    def driver(self) -> object:
        """See BlockingConnection."""
        return innermost(self._session.connection().connection.driver_connection)

    def begin(self) -> None:
        """See BlockingConnection."""
        if not self._session.in_transaction():
            self._session.begin()

    def commit(self) -> None:
        """See BlockingConnection."""
        self._session.commit()

    def rollback(self) -> None:
        """See BlockingConnection."""
        self._session.rollback()


class OfAsync(OnLoop):
    """An AsyncConnection or AsyncSession."""

    ADVICE = OfConnection.ADVICE
    IDENTIFIED = True

    def __init__(self, outer: AsyncConnection | AsyncSession, inner: OfConnection | OfSession) -> None:
        self._outer = outer
        self._inner = inner
        self.dialect: DialectName = inner.dialect

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection; what needs the database is found out by `check_open`."""
        inner = self._inner
        if isinstance(inner, OfSession) and inner._session.get_transaction() is not None:
            # A session may have to make its connection here, which only `run_sync` can.
            return SAVEPOINT if inner._session.in_nested_transaction() else inner.unusable(to_commit=to_commit)
        return inner.unusable(to_commit=to_commit)

    async def check_open(self) -> None:
        """See BlockingConnection."""
        await self._run(lambda: self._inner.check_open())

    async def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        return await self._run(lambda: self._inner.execute(statement))

    async def driver(self) -> object:
        """See BlockingConnection."""
        return await self._run(self._inner.driver)

    def block(self) -> str | None:
        """See BlockingConnection."""
        return self._inner.block()

    def guard(self) -> None:
        """See BlockingConnection."""
        self._inner.guard()

    def unguard(self) -> None:
        """See BlockingConnection."""
        self._inner.unguard()

    async def begin(self) -> None:
        """See BlockingConnection."""
        await self._run(self._inner.begin)

    async def commit(self) -> None:
        """See BlockingConnection."""
        await self._run(self._inner.commit)

    async def rollback(self) -> None:
        """See BlockingConnection."""
        await self._run(self._inner.rollback)

    async def _run(self, call: Callable[[], T]) -> T:
        return await self._outer.run_sync(lambda inner: call())


def _check_driver(bind: Any) -> str:
    driver: str = bind.dialect.driver
    if bind.dialect.name not in DIALECTS or driver not in (*_AS_WRITTEN, *_PERCENT):
        raise ConfigurationError(
            f"SQLAlchemy's {bind.dialect.name}+{driver} is not known here; use postgresql+psycopg, postgresql+asyncpg, "
            "sqlite or sqlite+aiosqlite, for insert_once also mysql+pymysql or mysql+asyncmy."
        )
    return driver


def _autocommits(bind: Any) -> bool:
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        # What create_engine(isolation_level=…) was given; there is no public name for it.
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    return bool(level == "AUTOCOMMIT")


def _execute(connection: Connection, driver: str, statement: Statement) -> Sequence[Row]:
    if driver in _AS_WRITTEN:
        sql, parameters = statement.sql, statement.parameters
    else:
        sql, parameters = percent(statement)
    if statement.many:
        if parameters:
            connection.exec_driver_sql(sql, [tuple(row) for row in parameters])
        return ()
    result = connection.exec_driver_sql(sql, tuple(parameters))
    if statement.counted:
        return [()] * result.rowcount
    return [tuple(row) for row in result] if result.returns_rows else ()
