"""PostgreSQL on asyncpg, for one event loop: a pool whose calls end at a deadline, its own or over the caller's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import asyncpg

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.drive import apump
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.postgres.url import (
    BACKEND,
    CONNECT_TIMEOUT,
    POOL_SIZE,
    SET,
    Maker,
    PostgresTarget,
    check_primary,
    check_server,
    explain,
    not_made,
    pauses,
    retryable,
    shares,
    timed_out,
)

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

T = TypeVar("T")

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
WAIT_FOR_NEXT = 0.002
"""Seconds that a connection of the caller's pool waits for the next call."""


class AsyncpgPool:
    """A few connections of its own, or a pool of the caller's, which stays the caller's to close; for one event loop.

    timeout: seconds for each call, connecting included. check: the statement whose row `check_server` judges.
    """

    def __init__(self, source: PostgresTarget | Pool, timeout: float, check: str) -> None:
        self._timeout = timeout
        self._connections = (
            _Connections(source, timeout) if isinstance(source, PostgresTarget) else _Borrowed(source, timeout, check)
        )

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed when its call ends. A caller's pool stays open."""
        await self._connections.aclose()

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """See LoopPool. A plan that is run twice is safe: what may have been done already is answered alike (C3)."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        places = self._connections.places
        if places.locked():
            await self._wait_for_a_place(deadline)
        else:
            await places.acquire()  # at once
        try:
            return await self._run(plan, deadline)
        except DRIVER_ERRORS as error:
            if _over(deadline):
                raise timed_out(self._timeout) from error
            raise explain(error, getattr(error, "sqlstate", None)) from error
        finally:
            places.release()

    async def _wait_for_a_place(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._connections.places.acquire()
        except TimeoutError as error:
            raise StoreUnavailable(f"all connections were in use for {self._timeout:g} s") from error

    async def _run(self, plan: Callable[[], Plan[T]], deadline: float) -> T:
        while True:
            line = await self._connections.take(deadline)
            used = line.used
            try:
                result = await apump(plan(), line.execute)
            except DRIVER_ERRORS:
                dead = line.is_dead() and not _over(deadline)
                await self._connections.drop(line)
                if not (used and dead):
                    raise
            except BaseException:
                await self._connections.drop(line)
                raise
            else:
                await self._connections.put_back(line)
                return result
            self._connections.discard()


class _Line:
    """A connection that is cut at the deadline of the call that uses it.

    It is cut and not asked to cancel: a stopped server answers neither. One alarm serves many calls: where it rings
    before the deadline of the call that is under way, it is set again.
    """

    __slots__ = ("_alarm", "_deadline", "_loop", "connection", "used")

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection = connection
        self.used = False
        self._loop = loop
        self._deadline: float | None = None
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self, deadline: float) -> None:
        """A call begins."""
        self._deadline = deadline
        if self._alarm is None:
            self._alarm = self._loop.call_at(deadline, self._ring)

    def end(self) -> None:
        """The call has ended well."""
        self._deadline, self.used = None, True

    def release(self) -> None:
        """The connection is somebody else's from now on."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def is_dead(self) -> bool:
        """Whether the connection is closed. One that was lent has gone back to its pool then, and tells nothing."""
        try:
            return self.connection.is_closed()
        except asyncpg.InterfaceError:
            return True

    def cut(self) -> None:
        """Cut the connection."""
        self.release()
        with suppress(asyncpg.InterfaceError):  # as in `is_dead`
            self.connection.terminate()

    def _ring(self) -> None:
        self._alarm = None
        if self._deadline is None:
            return
        if _over(self._deadline, self._loop):
            self.cut()
        else:
            self._alarm = self._loop.call_at(self._deadline, self._ring)

    async def execute(self, statement: Statement) -> Sequence[Row]:
        """Run one statement in a transaction of its own, again when the server undid it for a rival's sake."""
        try:
            return await _fetch(self.connection, statement)
        except asyncpg.PostgresError as error:
            if not retryable(error.sqlstate):
                raise
        return await _execute(self.connection, statement)


async def _execute(connection: Connection, statement: Statement) -> Sequence[Row]:
    """Run one statement in a transaction of its own, again when the server undid it for a rival's sake."""
    for pause in pauses():
        try:
            return await _fetch(connection, statement)
        except asyncpg.PostgresError as error:
            if not retryable(error.sqlstate):
                raise
            await asyncio.sleep(pause)  # the alarm at the deadline cuts the connection
    return await _fetch(connection, statement)


def _fetch(connection: Connection, statement: Statement) -> Awaitable[Sequence[Row]]:
    if statement.counted:
        return counted(connection.execute(statement.sql, *statement.parameters))
    fetched: Any = connection.fetch(statement.sql, *statement.parameters)
    return cast(Awaitable[Sequence[Row]], fetched)  # records can be indexed


async def counted(executing: Awaitable[str]) -> Sequence[Row]:
    """An empty row for each that was written, by the number in an answer such as `INSERT 0 1`."""
    return [()] * int((await executing).rpartition(" ")[2])


def _over(deadline: float, loop: asyncio.AbstractEventLoop | None = None) -> bool:
    """Whether the deadline has passed; uvloop's timers may be a millisecond early."""
    return (loop or asyncio.get_running_loop()).time() >= deadline - 0.005


class _Connections:
    """A few connections of our own."""

    def __init__(self, target: PostgresTarget, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._idle: list[_Line] = []
        self._closed = False
        self.places = asyncio.Semaphore(self._target.pool_size)

    async def take(self, deadline: float) -> _Line:
        """A connection until the deadline."""
        line = self._idle.pop() if self._idle else _Line(await self._connect(deadline), asyncio.get_running_loop())
        line.begin(deadline)
        return line

    async def put_back(self, line: _Line) -> None:
        """Keep it for the next call, after a clean end."""
        line.end()
        if self._closed or line.is_dead():
            line.cut()
        else:
            self._idle.append(line)

    async def drop(self, line: _Line) -> None:
        """Cut it, after an error."""
        line.cut()

    def discard(self) -> None:
        """Cut what is idle."""
        while self._idle:
            self._idle.pop().cut()

    async def aclose(self) -> None:
        """Cut what is idle, and from now on whatever comes back."""
        self._closed = True
        self.discard()
        await asyncio.sleep(0)  # for the loop to take leave of the sockets

    async def _connect(self, deadline: float) -> asyncpg.Connection[asyncpg.Record]:
        """A new connection to the first host that is a primary."""
        failure: Exception = TimeoutError()
        for host, until in shares(self._target, asyncio.get_running_loop().time(), deadline):
            try:
                return await self._connect_to(host, until)
            except (*DRIVER_ERRORS, StoreUnavailable) as error:
                failure = error
        raise failure

    async def _connect_to(self, host: str | Maker, deadline: float) -> asyncpg.Connection[asyncpg.Record]:
        loop = asyncio.get_running_loop()
        settings = self._target.settings(self._timeout)
        connection = await _connect(host, deadline, settings, cached=self._target.statement_cache)
        alarm = loop.call_at(deadline, connection.terminate)
        try:
            if not isinstance(host, str):
                await _prepare(connection, settings)
            await _check(connection, self._target.check)
        except BaseException:
            connection.terminate()
            raise
        finally:
            alarm.cancel()
        return connection


async def _connect(
    host: str | Maker, deadline: float, settings: dict[str, str], *, cached: bool
) -> asyncpg.Connection[asyncpg.Record]:
    """Connect before the deadline, to a DSN or as a caller's engine does."""
    left = max(0.0, deadline - asyncio.get_running_loop().time())
    connection: asyncpg.Connection[asyncpg.Record]
    if isinstance(host, str):
        settings = {"application_name": "retryproof", **settings}
        size = 100 if cached else 0
        connection = await asyncpg.connect(host, timeout=left, server_settings=settings, statement_cache_size=size)
        return connection
    try:
        async with asyncio.timeout(left):
            connection = await host()
    except (*DRIVER_ERRORS, ConfigurationError):
        raise
    except Exception as error:
        raise not_made(error) from error
    return connection


async def _prepare(connection: asyncpg.Connection[asyncpg.Record], settings: dict[str, str]) -> None:
    """Make the session of an engine's connection ours, unless a pooler lends it."""
    if settings and await connection.fetchval(BACKEND) == connection.get_server_pid():
        await connection.execute(SET, list(settings), list(settings.values()))


class _Borrowed:
    """The caller's pool: its connections, with its settings.

    A connection waits for the next call for a moment before it goes back, since asyncpg resets it then, which costs a
    round trip. It does not wait where it is the last that the pool has.
    """

    def __init__(self, pool: Pool, timeout: float, check: str) -> None:
        self._pool = pool
        self._check = check
        self._timeout = timeout
        self._checked = False
        self._idle: list[_Line] = []
        self._end_of_wait: asyncio.TimerHandle | None = None
        self._going_back: set[asyncio.Task[None]] = set()
        self.places = asyncio.Semaphore(POOL_SIZE)

    async def take(self, deadline: float) -> _Line:
        """A connection until the deadline."""
        while self._idle:
            line = self._idle.pop()
            if not line.is_dead():
                line.begin(deadline)
                return line
            await self.drop(line)  # asyncpg may not have told the pool that it is closed
        loop = asyncio.get_running_loop()
        line = _Line(await self._pool.acquire(timeout=max(0.0, deadline - loop.time())), loop)
        line.begin(deadline)
        if not self._checked:
            try:
                await _check(line.connection, self._check)
            except BaseException:
                await self.drop(line)
                raise
            self._checked = True
        return line

    async def put_back(self, line: _Line) -> None:
        """Keep it for a moment, then give it back."""
        if self._pool.get_idle_size() == 0 and self._pool.get_size() >= self._pool.get_max_size():
            line.release()
            with suppress(Exception):  # of the reset: the pool has closed that connection, and the call is answered
                await self._release(line.connection)
            return
        line.end()
        self._idle.append(line)
        if self._end_of_wait is None:
            self._end_of_wait = asyncio.get_running_loop().call_later(WAIT_FOR_NEXT, self.discard)

    async def _release(self, connection: Any) -> None:
        await self._pool.release(connection, timeout=self._timeout)

    async def drop(self, line: _Line) -> None:
        """Cut it, after an error, and give it back."""
        line.cut()
        await self._release(line.connection)

    def discard(self) -> None:
        """Give back what is idle; a pool replaces dead connections itself."""
        if self._end_of_wait is not None:
            self._end_of_wait.cancel()
            self._end_of_wait = None
        while self._idle:
            line = self._idle.pop()
            line.release()
            task = asyncio.get_running_loop().create_task(self._release(line.connection))
            self._going_back.add(task)
            task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._going_back.discard(task)
        if not task.cancelled():
            task.exception()  # of the reset: the pool has closed that connection

    async def aclose(self) -> None:
        """Give back what is idle; the pool is the caller's."""
        self.discard()
        await asyncio.gather(*self._going_back, return_exceptions=True)


async def _check(connection: Connection, statement: str) -> None:
    """Refuse a read replica and an old schema."""
    (row,) = await connection.fetch(statement)
    check_server(*row)


async def transaction(target: PostgresTarget, plan: Callable[[], Plan[T]]) -> T:
    """Run a plan in one transaction on a connection of its own, without a limit on its time but for connecting."""
    try:
        connection = await connect_to_primary(target)
        try:
            async with connection.transaction():
                return await apump(plan(), lambda statement: _fetch(connection, statement))
        finally:
            connection.terminate()
    except DRIVER_ERRORS as error:
        raise explain(error, getattr(error, "sqlstate", None)) from error


async def connect_to_primary(target: PostgresTarget) -> asyncpg.Connection[asyncpg.Record]:
    """A connection with the session's own settings; raises a driver's error or StoreUnavailable."""
    loop = asyncio.get_running_loop()
    failure: Exception = TimeoutError()
    for host, until in shares(target, loop.time(), loop.time() + CONNECT_TIMEOUT):
        try:
            connection = await _connect(host, until, {}, cached=target.statement_cache)
            try:
                check_primary(await connection.fetchval("SELECT pg_is_in_recovery()"))
            except BaseException:
                connection.terminate()
                raise
        except (*DRIVER_ERRORS, StoreUnavailable) as error:
            failure = error
        else:
            return connection
    raise failure
