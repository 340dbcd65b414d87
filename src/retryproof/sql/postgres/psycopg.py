"""PostgreSQL on psycopg 3, for callers that block: connections whose waits end at a deadline, and a pool of them."""

from __future__ import annotations

import os
import select
import selectors
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from time import monotonic, sleep
from typing import Any, TypeVar

import psycopg
from psycopg import RawCursor, conninfo, pq
from psycopg.adapt import Dumper
from psycopg.errors import OperationalError
from psycopg.pq import Format

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.drive import pump
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.postgres.url import (
    BACKEND,
    CONNECT_TIMEOUT,
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

T = TypeVar("T")


class _OutOfTime(Exception):
    """The deadline of a call has passed."""


class DeadlineConnection(psycopg.Connection[Row]):
    """A connection whose waits end at `deadline`, whatever the server does; it is of no more use then.

    psycopg's own time-outs are the server's (statement_timeout), which a stopped server does not keep.
    """

    deadline = float("inf")
    made_by: object = None
    """The connection of a caller's engine that this one stands for, which must not be collected before."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Pump one of psycopg's generators, as psycopg does, until the deadline.

        It yields and is sent bits: 1 to read, 2 to write, as those of `selectors`.
        """
        try:
            wanted = next(gen)
            while True:
                wanted = gen.send(_ready(self.pgconn.socket, int(wanted), self.deadline))
        except StopIteration as stop:
            return stop.value


def _polled(socket: int, wanted: int, deadline: float) -> int:
    """Wait for a socket; return what it is ready for. A later read or write raises its errors."""
    poller = select.poll()
    poller.register(socket, _POLLED[wanted])
    found = poller.poll(None if deadline == float("inf") else max(0.0, deadline - monotonic()) * 1_000)
    if not found:
        raise _OutOfTime
    event = found[0][1]
    read = selectors.EVENT_READ if event & ~select.POLLOUT else 0
    return wanted & (read | (selectors.EVENT_WRITE if event & ~select.POLLIN else 0))


def _selected(socket: int, wanted: int, deadline: float) -> int:
    """`_polled`, where there is no poll."""
    seconds = None if deadline == float("inf") else max(0.0, deadline - monotonic())
    with selectors.SelectSelector() as selector:
        selector.register(socket, wanted)
        ready = selector.select(seconds)
    if not ready:
        raise _OutOfTime
    return ready[0][1]


# Neither opens a descriptor of its own for each wait. The selectors module's poll takes three times as long.
_ready = _polled if hasattr(select, "poll") else _selected
_POLLED = (0, select.POLLIN, select.POLLOUT, select.POLLIN | select.POLLOUT) if hasattr(select, "poll") else ()


class _Bytes(list[Any]):
    """An array of bytes or None."""


class _Numbers(list[int]):
    """An array of 64-bit numbers."""


class _Flags(list[bool]):
    """An array of truth values."""


class _Texts(list[str]):
    """An array of texts."""


_ARRAYS: dict[type, type] = {bytes: _Bytes, int: _Numbers, bool: _Flags, str: _Texts}


def _typed(parameter: list[Any]) -> list[Any]:
    """A list as an array of a known type, so that a statement is prepared once; psycopg would go by the values."""
    kind = next((type(value) for value in parameter if value is not None), bytes)
    array: list[Any] = _ARRAYS[kind](parameter)
    return array


_encoded = lru_cache(maxsize=128)(str.encode)
"""A statement as bytes, the same each time: psycopg looks it up by its hash, which bytes keep."""


def _array(element: int, length: int, nulls: bool, body: bytes) -> bytes:
    return _HEADER.pack(1, nulls, element, length, 1) + body


_HEADER = struct.Struct(">iiIii")  # dimensions, whether there are nulls, element type, length, lower bound
_LENGTH = struct.Struct(">i")
_NULL = _LENGTH.pack(-1)


class _BytesDumper(Dumper):
    format = Format.BINARY
    oid = 1001  # bytea[]

    def dump(self, obj: _Bytes) -> bytes:
        parts = [_NULL if value is None else _LENGTH.pack(len(value)) + value for value in obj]
        return _array(17, len(obj), None in obj, b"".join(parts))


class _NumbersDumper(Dumper):
    format = Format.BINARY
    oid = 1016  # bigint[]

    def dump(self, obj: _Numbers) -> bytes:
        values = [field for value in obj for field in (8, value)]
        return _array(20, len(obj), False, struct.pack(">" + "iq" * len(obj), *values))


class _FlagsDumper(Dumper):
    format = Format.BINARY
    oid = 1000  # boolean[]

    def dump(self, obj: _Flags) -> bytes:
        return _array(16, len(obj), False, b"".join(b"\0\0\0\1\1" if value else b"\0\0\0\1\0" for value in obj))


class _TextsDumper(Dumper):
    format = Format.BINARY
    oid = 1009  # text[]

    def dump(self, obj: _Texts) -> bytes:
        values = [value.encode() for value in obj]
        return _array(25, len(obj), False, b"".join(_LENGTH.pack(len(value)) + value for value in values))


_DUMPERS: dict[type, type[Dumper]] = {
    _Bytes: _BytesDumper,
    _Numbers: _NumbersDumper,
    _Flags: _FlagsDumper,
    _Texts: _TextsDumper,
}


def connect(host: str | Maker, deadline: float, settings: dict[str, str]) -> DeadlineConnection:
    """Connect before the deadline, to a DSN or as a caller's engine does."""
    if isinstance(host, str):
        return _ours(_connect_to(host, deadline, settings))
    made = _made(host, deadline)
    _check_own(made)
    connection = _ours(made.pgconn)
    connection.made_by = made
    connection.deadline = deadline
    try:
        _prepare(connection, settings)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_to(dsn: str, deadline: float, settings: dict[str, str]) -> pq.abc.PGconn:
    """Connect; libpq's own time-out counts in whole seconds, two at the least."""
    parameters = conninfo.conninfo_to_dict(dsn)
    options = [parameters.get("options"), *(f"-c {name}={_option(value)}" for name, value in settings.items())]
    parameters["options"] = " ".join(str(option) for option in options if option) or None
    parameters.setdefault("application_name", "retryproof")
    parameters["client_encoding"] = "utf8"  # a database of bytes (SQL_ASCII) would give bytes for text
    connecting = pq.PGconn.connect_start(conninfo.make_conninfo("", **parameters).encode())
    try:
        _finish_connecting(connecting, deadline)
    except BaseException:
        connecting.finish()
        raise
    connecting.nonblocking = 1
    return connecting


def _ours(connecting: pq.abc.PGconn) -> DeadlineConnection:
    connection = DeadlineConnection(connecting)
    for kind, dumper in _DUMPERS.items():
        connection.adapters.register_dumper(kind, dumper)
    if connecting.transaction_status == pq.TransactionStatus.IDLE:
        connection.autocommit = True
    return connection


def _prepare(connection: DeadlineConnection, settings: dict[str, str]) -> None:
    """End what an engine's own hooks have begun, and make the session ours unless a pooler lends it."""
    if not connection.autocommit:
        connection.commit()
        connection.autocommit = True
    if connection.pgconn.parameter_status(b"client_encoding") != b"UTF8":
        connection.execute(b"SET client_encoding TO 'UTF8'")
    ((backend,),) = connection.execute(BACKEND).fetchall()
    if backend != connection.pgconn.backend_pid:
        connection.prepare_threshold = None
    elif settings:
        with RawCursor(connection) as cursor:
            cursor.execute(SET.encode(), [_Texts(settings), _Texts(settings.values())])


MOST_MAKING = 16
_making = threading.Semaphore(MOST_MAKING)
"""What engines are making at a time: a server that takes no connection keeps each for minutes, past our deadline."""


def _forked() -> None:
    global _making
    _making = threading.Semaphore(MOST_MAKING)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _made(make: Maker, deadline: float) -> psycopg.Connection[Any] | psycopg.AsyncConnection[Any]:
    """Have an engine make a connection, in a thread, since nothing else ends its waiting; a late one is closed."""
    places = _making
    if not places.acquire(blocking=False):
        raise StoreUnavailable(
            "PostgreSQL takes no connections, and the engine still waits for earlier ones. Give it a time-out: "
            'create_engine(…, connect_args={"connect_timeout": 2}), or OPTIONS of the Django database.'
        )
    coming: Future[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]] = Future()

    def run() -> None:
        try:
            coming.set_result(make())
        except BaseException as error:  # noqa: BLE001  # who waits raises it
            coming.set_exception(error)
        finally:
            places.release()

    threading.Thread(target=run, name="retryproof-connect", daemon=True).start()
    try:
        return coming.result(max(0.0, deadline - monotonic()))
    except BaseException as error:
        coming.add_done_callback(_discard)
        if isinstance(error, TimeoutError):
            raise _OutOfTime from error
        if isinstance(error, psycopg.Error | ConfigurationError) or not isinstance(error, Exception):
            raise
        raise not_made(error) from error


def _check_own(made: Any) -> None:
    """Refuse a connection that an engine's creator took from a pool, which would miss it."""
    pool = getattr(made, "_pool", None)  # psycopg says so by no other name
    if pool is None:
        return
    if isinstance(made, psycopg.Connection):
        pool.putconn(made)
    else:
        made.pgconn.finish()
    raise ConfigurationError(
        "The engine's creator takes its connections from a psycopg pool, and the store keeps those that it is given. "
        "Give the store the database's URL, or an engine that connects by itself."
    )


def _discard(coming: Future[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]]) -> None:
    if coming.exception() is None:
        coming.result().pgconn.finish()


def _option(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def _finish_connecting(connecting: pq.abc.PGconn, deadline: float) -> None:
    status: int = pq.PollingStatus.WRITING
    while status != pq.PollingStatus.OK:
        if connecting.status == pq.ConnStatus.BAD or status == pq.PollingStatus.FAILED:
            raise OperationalError(connecting.get_error_message().strip())
        reading = status == pq.PollingStatus.READING
        _ready(connecting.socket, selectors.EVENT_READ if reading else selectors.EVENT_WRITE, deadline)
        status = connecting.connect_poll()


class PsycopgPool:
    """A few connections of its own; safe for threads. Nothing is opened before a call.

    timeout: seconds for each call, connecting included.
    """

    def __init__(self, target: PostgresTarget, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._idle: list[DeadlineConnection] = []
        self._places = threading.BoundedSemaphore(target.pool_size)
        self._closed = False

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its call ends."""
        self._closed = True
        self._discard_idle()

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """See Pool. A plan that is run twice is safe: what may have been done already is answered alike (C3)."""
        deadline = monotonic() + self._timeout
        if not self._places.acquire(timeout=self._timeout):
            raise StoreUnavailable(f"all {self._target.pool_size} connections were in use for {self._timeout:g} s")
        try:
            while self._idle:
                try:
                    return self._run(self._idle.pop(), plan(), deadline)
                except _Dead:
                    self._discard_idle()
                except IndexError:  # another thread was faster
                    break
            return self._run(self._connect(deadline), plan(), deadline)
        except _OutOfTime as error:
            raise timed_out(self._timeout) from error
        except _Dead as error:
            raise explain(error.cause, None) from error.cause
        except psycopg.Error as error:
            raise explain(error, error.sqlstate) from error
        finally:
            self._places.release()

    def _run(self, connection: DeadlineConnection, plan: Plan[T], deadline: float) -> T:
        """Run a plan; the connection goes back to the idle ones only after a clean end."""
        connection.deadline = deadline
        try:
            result = pump(plan, lambda statement: self._execute(connection, statement))
        except OperationalError as error:
            dead = connection.closed
            connection.close()
            if dead:
                raise _Dead(error) from error
            raise
        except BaseException:
            connection.close()
            raise
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)
        return result

    def _execute(self, connection: DeadlineConnection, statement: Statement) -> Sequence[Row]:
        """Run one statement in a transaction of its own, again when the server undid it for a rival's sake."""
        for pause in pauses():
            try:
                return self._fetch(connection, statement)
            except psycopg.Error as error:
                if not retryable(error.sqlstate) or monotonic() + pause >= connection.deadline:
                    raise
                sleep(pause)
        return self._fetch(connection, statement)

    def _fetch(self, connection: DeadlineConnection, statement: Statement) -> Sequence[Row]:
        with RawCursor(connection) as cursor:
            parameters = [_typed(value) if type(value) is list else value for value in statement.parameters]
            cursor.execute(_encoded(statement.sql), parameters, prepare=self._target.statement_cache, binary=True)
            return [()] * cursor.rowcount if statement.counted else cursor.fetchall()

    def _connect(self, deadline: float) -> DeadlineConnection:
        """A new connection to the first host that is a primary."""
        failure: Exception = _OutOfTime()
        for host, until in shares(self._target, monotonic(), deadline):
            try:
                return self._connect_to(host, until)
            except (psycopg.Error, _OutOfTime, StoreUnavailable) as error:
                failure = error
        raise failure

    def _connect_to(self, host: str | Maker, deadline: float) -> DeadlineConnection:
        connection = connect(host, deadline, self._target.settings(self._timeout))
        connection.deadline = deadline
        try:
            if not self._target.statement_cache:
                connection.prepare_threshold = None
            (row,) = connection.execute(self._target.check.encode()).fetchall()
            check_server(*row)
        except BaseException:
            connection.close()
            raise
        return connection

    def _discard_idle(self) -> None:
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return


class _Dead(Exception):
    """The connection was lost."""

    def __init__(self, cause: OperationalError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def transaction(target: PostgresTarget, plan: Callable[[], Plan[T]]) -> T:
    """Run a plan in one transaction on a connection of its own, without a limit on its time but for connecting."""
    try:
        connection = _connect_to_primary(target)
        try:
            with connection.transaction():
                return pump(plan(), lambda statement: _fetch_any(connection, statement))
        finally:
            connection.close()
    except _OutOfTime as error:
        raise timed_out(CONNECT_TIMEOUT) from error
    except psycopg.Error as error:
        raise explain(error, error.sqlstate) from error


def _connect_to_primary(target: PostgresTarget) -> DeadlineConnection:
    failure: Exception = _OutOfTime()
    for host, until in shares(target, monotonic(), monotonic() + CONNECT_TIMEOUT):
        try:
            connection = connect(host, until, {})
            try:
                check_primary(connection.execute("SELECT pg_is_in_recovery()").fetchall()[0][0])
            except BaseException:
                connection.close()
                raise
        except (psycopg.Error, _OutOfTime, StoreUnavailable) as error:
            failure = error
        else:
            connection.deadline = float("inf")
            return connection
    raise failure


def _fetch_any(connection: DeadlineConnection, statement: Statement) -> Sequence[Row]:
    with RawCursor(connection) as cursor:
        cursor.execute(statement.sql.encode(), statement.parameters)
        return cursor.fetchall() if cursor.description else []
