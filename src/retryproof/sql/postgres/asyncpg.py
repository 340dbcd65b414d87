"""PostgreSQL on asyncpg, for one event loop: a pool whose calls end at a deadline, its own or over the caller's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import asyncpg

from retryproof.core.errors import StoreUnavailable
from retryproof.sql.plan import Plan, Row, Statement, aperform
from retryproof.sql.postgres.url import (
    CONNECT_TIMEOUT,
    POOL_SIZE,
    Target,
    check_primary,
    check_server,
    explain,
    pauses,
    retryable,
    shares,
    timed_out,
)

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

T = TypeVar("T")

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


class AsyncpgPool:
    """A few connections of its own, or a pool of the caller's, which stays the caller's to close; for one event loop.

    timeout: seconds for each call, connecting included. check: the statement whose row `check_server` judges.
    """

    def __init__(self, source: Target | Pool, timeout: float, check: str) -> None:
        self._timeout = timeout
        self._connections = (
            _Connections(source, timeout) if isinstance(source, Target) else _Borrowed(source, timeout, check)
        )

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed when its call ends. A caller's pool stays open."""
        self._connections.close()
        await asyncio.sleep(0)  # for the loop to take leave of the sockets

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan before the deadline; once more on a new connection when an idle one turns out to be dead.

        That is safe: what may have been done already is answered alike (C3).
        """
        deadline = asyncio.get_running_loop().time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._connections.places.acquire()
        except TimeoutError as error:
            raise StoreUnavailable(f"all connections were in use for {self._timeout:g} s") from error
        try:
            return await self._run(plan, deadline)
        except DRIVER_ERRORS as error:
            if _over(deadline):
                raise timed_out(self._timeout) from error
            raise explain(error, getattr(error, "sqlstate", None)) from error
        finally:
            self._connections.places.release()

    async def _run(self, plan: Callable[[], Plan[T]], deadline: float) -> T:
        while True:
            async with self._connections.take(deadline) as (connection, used):
                try:
                    return await aperform(plan(), lambda statement: _execute(connection, statement))
                except DRIVER_ERRORS:
                    dead = connection.is_closed() and not _over(deadline)
                    if not (used and dead):
                        raise
            self._connections.discard()


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


async def _fetch(connection: Connection, statement: Statement) -> Sequence[Row]:
    rows = await connection.fetch(statement.sql, *statement.parameters)
    return cast(Sequence[Row], rows)  # records can be indexed


def _over(deadline: float) -> bool:
    """Whether the deadline has passed; uvloop's timers may be a millisecond early."""
    return asyncio.get_running_loop().time() >= deadline - 0.005


class _Connections:
    """A few connections of our own."""

    def __init__(self, target: Target, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._idle: list[asyncpg.Connection[asyncpg.Record]] = []
        self._closed = False
        self.places = asyncio.Semaphore(self._target.pool_size)

    @asynccontextmanager
    async def take(self, deadline: float) -> AsyncIterator[tuple[Connection, bool]]:
        """A connection until the deadline, and whether it was used before; kept after a clean end only.

        At the deadline the connection is cut, not asked to cancel: a stopped server answers neither.
        """
        loop = asyncio.get_running_loop()
        used = bool(self._idle)
        connection = self._idle.pop() if used else await self._connect(deadline)
        alarm = loop.call_at(deadline, connection.terminate)
        try:
            yield connection, used
        except BaseException:
            connection.terminate()
            raise
        finally:
            alarm.cancel()
            if self._closed or connection.is_closed():
                connection.terminate()
            else:
                self._idle.append(connection)

    def discard(self) -> None:
        """Cut what is idle."""
        while self._idle:
            self._idle.pop().terminate()

    def close(self) -> None:
        """Cut what is idle, and from now on whatever comes back."""
        self._closed = True
        self.discard()

    async def _connect(self, deadline: float) -> asyncpg.Connection[asyncpg.Record]:
        """A new connection to the first host that is a primary."""
        failure: Exception = TimeoutError()
        for dsn, until in shares(self._target, asyncio.get_running_loop().time(), deadline):
            try:
                return await self._connect_to(dsn, until)
            except (*DRIVER_ERRORS, StoreUnavailable) as error:
                failure = error
        raise failure

    async def _connect_to(self, dsn: str, deadline: float) -> asyncpg.Connection[asyncpg.Record]:
        loop = asyncio.get_running_loop()
        connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
            dsn,
            timeout=max(0.0, deadline - loop.time()),
            server_settings={"application_name": "retryproof", **self._target.settings(self._timeout)},
            statement_cache_size=100 if self._target.statement_cache else 0,
        )
        alarm = loop.call_at(deadline, connection.terminate)
        try:
            await _check(connection, self._target.check)
        except BaseException:
            connection.terminate()
            raise
        finally:
            alarm.cancel()
        return connection


class _Borrowed:
    """The caller's pool: its connections, with its settings."""

    def __init__(self, pool: Pool, timeout: float, check: str) -> None:
        self._pool = pool
        self._check = check
        self._timeout = timeout
        self._checked = False
        self.places = asyncio.Semaphore(POOL_SIZE)

    @asynccontextmanager
    async def take(self, deadline: float) -> AsyncIterator[tuple[Connection, bool]]:
        """A connection until the deadline; cut then, and after an error."""
        loop = asyncio.get_running_loop()
        connection = await self._pool.acquire(timeout=max(0.0, deadline - loop.time()))
        alarm = loop.call_at(deadline, connection.terminate)
        try:
            if not self._checked:
                await _check(connection, self._check)
                self._checked = True
            yield connection, False
        except BaseException:
            connection.terminate()
            raise
        finally:
            alarm.cancel()
            await self._pool.release(connection, timeout=self._timeout)

    def discard(self) -> None:
        """Nothing: a pool replaces dead connections itself."""

    def close(self) -> None:
        """Nothing: the pool is the caller's."""


async def _check(connection: Connection, statement: str) -> None:
    """Refuse a read replica and an old schema."""
    (row,) = await connection.fetch(statement)
    check_server(*row)


async def transaction(target: Target, plan: Callable[[], Plan[T]]) -> T:
    """Run a plan in one transaction on a connection of its own, without a limit on its time but for connecting."""
    try:
        connection = await connect_to_primary(target)
        try:
            async with connection.transaction():
                return await aperform(plan(), lambda statement: _fetch(connection, statement))
        finally:
            connection.terminate()
    except DRIVER_ERRORS as error:
        raise explain(error, getattr(error, "sqlstate", None)) from error


async def connect_to_primary(target: Target) -> asyncpg.Connection[asyncpg.Record]:
    """A connection with the session's own settings; raises a driver's error or StoreUnavailable."""
    loop = asyncio.get_running_loop()
    failure: Exception = TimeoutError()
    for dsn, until in shares(target, loop.time(), loop.time() + CONNECT_TIMEOUT):
        try:
            connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
                dsn,
                timeout=max(0.0, until - loop.time()),
                server_settings={"application_name": "retryproof"},
                statement_cache_size=100 if target.statement_cache else 0,
            )
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
