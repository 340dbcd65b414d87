"""The caller's own connection, for work inside the caller's transaction, of whatever library.

`adapt` takes a connection of psycopg 3 (sync or async), asyncpg, SQLAlchemy 2 (Connection, Session, AsyncConnection,
AsyncSession), Django, sqlite3 or aiosqlite, for `insert_once` also one to MariaDB, and gives the same few things for
each: which dialect it speaks, whether a transaction is open on it, and how to execute a statement in it. Nothing here
begins, commits or rolls back unless the caller asked for that.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from retryproof.core.errors import ConfigurationError
from retryproof.forks import check_not_inherited, has_inherited_files
from retryproof.sql.plan import Row, Statement

DialectName = Literal["postgresql", "sqlite", "mysql"]

NOT_OPEN = "no transaction is open on it"
AUTOCOMMIT = "it commits each statement by itself (autocommit)"
FAILED = "its transaction has already failed; roll it back"
BLOCK = "a block is around it that commits by itself"
SAVEPOINT = "it is inside a savepoint, which would hide a failure from the transaction around it"
CLOSED = "it is closed"

_FILES = Statement("PRAGMA database_list")


@runtime_checkable
class BlockingConnection(Protocol):
    """A caller's connection that blocks.

    on_loop: whether its methods are awaited. IDENTIFIED: the library tells the transaction that is joined from the next
    one, and refuses to commit it. ASKS: `check_open` may ask the database, and so say more than `unusable`.
    ADVICE: what to do about one that is refused.
    """

    on_loop: ClassVar[bool]
    IDENTIFIED: ClassVar[bool]
    ASKS: ClassVar[bool]
    ADVICE: ClassVar[str]

    @property
    def dialect(self) -> DialectName: ...

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """Why no statement can be part of the caller's transaction, as far as the client knows; None when it can.

        to_commit: also why the transaction cannot be committed from here.
        """

    def check_open(self) -> None:
        """Raise ConfigurationError, saying what to do, unless a usable transaction is open.

        Refused: none open, autocommit, one that already failed, a savepoint that would hide a failure, a SQLite file
        that was open over a fork. Where the library opens one by itself at the next statement, that one counts as open.
        """

    def execute(self, statement: Statement) -> Sequence[Row]:
        """Execute a statement, `$1` style for PostgreSQL and `?` style for the others; its rows, or none."""

    def begin(self) -> None:
        """Begin a transaction unless one is open; for connections that are ours for as long as an operation runs."""

    def commit(self) -> None:
        """Commit the caller's transaction; for transactional mode, which was asked to."""

    def rollback(self) -> None:
        """Roll the caller's transaction back."""

    def known_driver(self) -> object | None:
        """What `driver` gives, where nothing has to be awaited for it; None where `driver` is to be asked."""

    def driver(self) -> object:
        """The driver's own connection, underneath whatever stands for it."""

    def block(self) -> str | None:
        """Why the transaction would be committed by somebody else, as far as the library says; None otherwise."""

    def guard(self) -> None:
        """Have the library refuse any other commit until `unguard`, where it can."""

    def unguard(self) -> None:
        """The end of that; once or more."""


@runtime_checkable
class LoopConnection(Protocol):
    """A caller's connection on an event loop; the contract is BlockingConnection's, awaited."""

    on_loop: ClassVar[bool]
    IDENTIFIED: ClassVar[bool]
    ASKS: ClassVar[bool]
    ADVICE: ClassVar[str]

    @property
    def dialect(self) -> DialectName: ...

    def unusable(self, *, to_commit: bool = False) -> str | None: ...

    async def check_open(self) -> None: ...

    def execute(self, statement: Statement) -> Awaitable[Sequence[Row]]: ...

    def begin(self) -> Awaitable[None]: ...

    def commit(self) -> Awaitable[None]: ...

    def rollback(self) -> Awaitable[None]: ...

    def known_driver(self) -> object | None: ...

    def driver(self) -> Awaitable[object]: ...

    def block(self) -> str | None: ...

    def guard(self) -> None: ...

    def unguard(self) -> None: ...


Adapter: TypeAlias = Callable[[Any], BlockingConnection | LoopConnection]

_ADAPTERS = {
    "psycopg": "retryproof.sql.callers.psycopg",
    "psycopg_pool": "retryproof.sql.callers.psycopg",
    "asyncpg": "retryproof.sql.callers.asyncpg",
    "sqlalchemy": "retryproof.sql.callers.sqlalchemy",
    "sqlmodel": "retryproof.sql.callers.sqlalchemy",
    "django": "retryproof.sql.callers.django",
    "sqlite3": "retryproof.sql.callers.sqlite",
    "aiosqlite": "retryproof.sql.callers.aiosqlite",
    "pymysql": "retryproof.sql.callers.mysql",
    "MySQLdb": "retryproof.sql.callers.mysql",
    "asyncmy": "retryproof.sql.callers.mysql",
    "aiomysql": "retryproof.sql.callers.mysql",
    "mysql": "retryproof.sql.callers.mysql",
}
"""By the package that a connection's class, or a class that it inherits from, comes from."""


def adapt(connection: Any) -> BlockingConnection | LoopConnection:
    """The caller's connection in our terms; raises ConfigurationError for one that is not known."""
    adapter = adapter_of(type(connection))
    if adapter is None:
        raise unknown(connection)
    return adapter(connection)


def _adapter_of(kind: type) -> Adapter | None:
    for base in kind.__mro__:
        module = _ADAPTERS.get(base.__module__.partition(".")[0])
        if module is not None:
            adapter: Adapter | None = importlib.import_module(module).adapter_of(kind)
            return adapter
    return None


adapter_of: Callable[[type], Adapter | None] = cache(_adapter_of)
"""What makes the adapter of a connection of this class; None for a class that is not known.

Each adapter's file has a function of this name, for the classes of its library. A program has few kinds of connections.
"""


def innermost(connection: Any) -> object:
    """What is underneath a driver's connection that another library wraps."""
    return getattr(connection, "_con", None) or getattr(connection, "_conn", None) or connection


def unknown(connection: Any) -> ConfigurationError:
    """The error of something that is no connection."""
    return ConfigurationError(
        f"{type(connection).__module__}.{type(connection).__qualname__} is no connection that is known here. Pass one "
        "of psycopg, asyncpg, SQLAlchemy (Connection, Session, AsyncConnection, AsyncSession), Django, sqlite3 or "
        "aiosqlite, for insert_once also PyMySQL, MySQL's own connector or asyncmy; not an engine or a pool."
    )


def refused(reason: str, advice: str) -> ConfigurationError:
    """The error of a connection whose transaction is of no use."""
    return ConfigurationError(f"This connection cannot be used: {reason}. {advice}")


def check_usable(connection: BlockingConnection | LoopConnection | Blocking | OnLoop) -> None:
    """Raise ConfigurationError, saying what to do, where the client knows that no statement can be executed on it."""
    reason = connection.unusable()
    if reason is not None:
        raise refused(reason, connection.ADVICE)


class Unguarded:
    """Libraries that tell nothing of blocks, and refuse no commit."""

    IDENTIFIED: ClassVar[bool] = False
    ASKS: ClassVar[bool] = True

    def known_driver(self) -> object | None:
        """See BlockingConnection."""
        return None

    def block(self) -> str | None:
        """See BlockingConnection."""
        return None

    def guard(self) -> None:
        """See BlockingConnection."""

    def unguard(self) -> None:
        """See BlockingConnection."""


class Blocking(Unguarded):
    """What the adapters of libraries that block have in common."""

    ADVICE: ClassVar[str] = "Open a transaction first, and leave it open."
    on_loop: ClassVar[bool] = False
    dialect: DialectName
    _connection: Any

    def driver(self) -> object:
        """See BlockingConnection."""
        return self._connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        raise NotImplementedError

    def check_open(self) -> None:
        """See BlockingConnection."""
        check_usable(self)
        if self.dialect == "sqlite" and has_inherited_files():
            _check_files(self.execute(_FILES))

    def execute(self, statement: Statement) -> Sequence[Row]:
        """See BlockingConnection."""
        raise NotImplementedError


class OnLoop(Unguarded):
    """What the adapters of libraries for event loops have in common."""

    ADVICE: ClassVar[str] = Blocking.ADVICE
    on_loop: ClassVar[bool] = True
    dialect: DialectName
    _connection: Any

    async def driver(self) -> object:
        """See BlockingConnection."""
        return self._connection

    def unusable(self, *, to_commit: bool = False) -> str | None:
        """See BlockingConnection."""
        raise NotImplementedError

    async def check_open(self) -> None:
        """See BlockingConnection."""
        check_usable(self)
        if self.dialect == "sqlite" and has_inherited_files():
            _check_files(await self.execute(_FILES))

    def execute(self, statement: Statement) -> Awaitable[Sequence[Row]]:
        """See LoopConnection."""
        raise NotImplementedError


def _check_files(databases: Sequence[Row]) -> None:
    """Refuse SQLite files that were open when this process was forked; each row ends with a file's name."""
    for *_, file in databases:
        check_not_inherited(file)


_DOLLARS = re.compile(r"\$(\d+)")


def percent(statement: Statement) -> tuple[str, Sequence[Any]]:
    """A statement in `%s` style, with its parameters, or the rows of them, in the order of their places."""
    sql, order = _percent(statement.sql)
    if order is None:
        return sql, statement.parameters
    if statement.many:
        return sql, [[row[place] for place in order] for row in statement.parameters]
    return sql, [statement.parameters[place] for place in order]


@lru_cache(maxsize=512)
def _percent(sql: str) -> tuple[str, tuple[int, ...] | None]:
    escaped = sql.replace("%", "%%")
    order = tuple(int(place) - 1 for place in _DOLLARS.findall(escaped))
    if order:
        return _DOLLARS.sub("%s", escaped), order
    return escaped.replace("?", "%s"), None


def sqlstate_of(error: BaseException | None) -> str | None:
    """The SQLSTATE that a driver's error carries, or the error that a library wrapped around it."""
    while error is not None:
        state = getattr(error, "sqlstate", None)
        if isinstance(state, str):
            return state
        error = getattr(error, "orig", None) or error.__cause__
    return None


def missing_table(error: BaseException) -> bool:
    """Whether the database has no such table."""
    return sqlstate_of(error) in ("42P01", "3F000") or "no such table" in str(error)
