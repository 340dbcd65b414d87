"""One SQLite file, safe for every thread and process of one machine: its connection, its write lock, its forks.

WAL, and `synchronous=FULL`: what was answered survives a crash of the machine. A replay only reads, beside any writer.
What changes is written in one transaction for a whole batch, of every kind that waits (group commit).

Who has to wait for another writer polls, here and not in SQLite, which sleeps for up to 100 ms between two looks: among
busy processes some then never get a turn (with 4 of them 2 % of the claims failed after 0.25 s, and 1 % after 0.5 s;
polled so none did, at three times the rate). And it tells apart what SQLite does not: writers that come and go, whose
commits change `data_version`, are waited for up to the time-out; one that stays, such as a transaction which a handler
keeps open, for `patience` only. Then there is a definite error, and replays, which only read, get their turn (T2).

No connection is open across a fork, since SQLite would exclude nobody then (`forks`): it is closed before, when
it is between two calls, and opened again at the next call, in parent and child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from retryproof.core.batch import Batch
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.drive import pump
from retryproof.forks import abandon, check_not_inherited
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.sqlite import records
from retryproof.sql.sqlite.url import SqliteTarget

logger = logging.getLogger("retryproof")
T = TypeVar("T")
R = TypeVar("R")

IN_MEMORY = ":memory:"
_COMMIT = Statement("COMMIT")
_DATA_VERSION = Statement("PRAGMA data_version")
FIRST_NAP, LAST_NAP = 0.0005, 0.008
"""Seconds between two looks at a locked file; a commit takes one to ten milliseconds."""
FORK_PATIENCE = 5.0
"""Seconds that a fork waits for calls that are under way, of all files together; a child refuses what stays open."""


class SqliteFile:
    """A SQLite file, which is made at the first call.

    Safe for threads, and over a fork of the process between two calls; ":memory:" is empty in the child.
    """

    def __init__(self, target: SqliteTarget) -> None:
        self.target = target
        self.path = target.path
        self._timeout = target.timeout
        self._patience = min(target.patience, target.timeout)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[str, tuple[int, int]] | None = None  # the file that is open: its whole path, its identity
        self._grouped = False
        self._shut_out: StoreUnavailable | None = None  # why the group that is open may not write
        with _forking:
            _files.add(self)

    @property
    def held(self) -> threading.RLock:
        """What keeps other threads out. Taken by `with` alone: no interruption leaves it with its thread."""
        return self._lock

    @property
    def is_writing(self) -> bool:
        """Whether the group that is open has the write lock."""
        return self._grouped and self._connected().in_transaction

    def read(self, plan: Plan[T]) -> T:
        """Run a plan that only reads, beside any writer."""
        with self._lock:
            self._stay_with_the_path()
            return pump(plan, self._execute)

    def changes_one(self, statement: Statement) -> bool:
        """Run a statement that changes one row or none, as a transaction of its own: whether it changed one.

        What triggers of somebody else's change does not count. False too where a group is open, and where SQLite
        refuses for whatever reason: ask the plan then, which waits for others and says what is wrong.
        """
        with self._lock:
            self._stay_with_the_path()
            connection = self._connected()
            if self._grouped or connection.in_transaction:
                return False
            try:
                return connection.execute(statement.sql, statement.parameters).rowcount == 1
            except sqlite3.Error:
                return False

    def write(self, plan: Callable[[], Plan[T]], patience: float | None = None) -> T:
        """Run a plan in one transaction that holds the write lock; inside a group, in the group's.

        patience: the time-out, unless given.
        """
        with self._lock:
            try:
                self._stay_with_the_path()
                if not self._connected().in_transaction:
                    self._begin(self._timeout if patience is None else patience)
                result = pump(plan(), self._execute)
                if not self._grouped:
                    self._execute(_COMMIT)
                return result
            finally:  # without a call of ours, at whose begin an interruption might come
                connection = self._connection
                if not self._grouped and connection is not None and connection.in_transaction:
                    connection.rollback()

    def write_batch(self, commands: Sequence[object], plan: Callable[[], Plan[Sequence[R]]]) -> Batch[R]:
        """The plan's replies. In a group that gets no write lock, errors: what travels with it may only read (T2)."""
        with self._lock:
            if self._grouped and not self._connected().in_transaction:
                self._shut_out = self._shut_out or self._why_shut_out()  # a group waits once
                if self._shut_out is not None:
                    return [self._shut_out] * len(commands)
            return self.write(plan, self._patience)

    def _why_shut_out(self) -> StoreUnavailable | None:
        """Take the write lock, or say why it is not to be had."""
        try:
            self._begin(self._patience)
        except StoreUnavailable as error:
            return error
        return None

    def commit_group(self, calls: Callable[[], T]) -> T:
        """Make calls of this file that are one commit."""
        with self._lock:
            try:
                self._grouped, self._shut_out = True, None
                result = calls()
                if self._connected().in_transaction:
                    self._execute(_COMMIT)
                return result
            finally:  # as in `write`
                self._grouped = False
                connection = self._connection
                if connection is not None and connection.in_transaction:
                    connection.rollback()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    # Over a fork

    def suspend(self, deadline: float) -> bool:
        """Before a fork: keep all others out from now on, and have no connection. deadline: of the monotonic clock.

        False where that cannot be: a call is under way, for longer than that or in this very thread.
        """
        if _is_held_here(self._lock) or not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        if self.path != IN_MEMORY:
            with contextlib.suppress(sqlite3.Error):  # what it leaves open, the child refuses
                self.close()
        return True

    def resume(self) -> None:
        """In the parent, after what `suspend` began."""
        self._lock.release()

    def disinherit(self) -> None:
        """In the child: what is still open is the parent's, and whoever held the lock is not here."""
        if self._connection is not None:
            abandon(self._connection)
        self._lock, self._connection, self._grouped = threading.RLock(), None, False

    # The connection

    def _stay_with_the_path(self) -> None:
        """Close a file that was deleted or replaced: who opens the path now would claim what is claimed in it (C1).

        Not inside a transaction. SQLite leaves the log of the new file alone.
        """
        if self._opened is None or self._connection is None or self._connection.in_transaction:
            return
        path, identity = self._opened
        try:
            found = _identity_of(path)
        except OSError as error:
            raise self._unavailable(error) from error
        if found != identity:
            logger.error(
                "The SQLite database %s was deleted or replaced while it was in use. Its records are lost, and what "
                "runs may run twice. Stop all processes before you remove a database.",
                path,
            )
            self.close()

    def _begin(self, patience: float) -> None:
        """Take the write lock, however many others want it, unless one of them stays for longer than the patience."""
        began = stays_since = time.monotonic()
        naps: Iterator[float]
        version: object = None
        while True:
            try:
                self._connected().execute("BEGIN IMMEDIATE")
                return
            except sqlite3.Error as error:
                now = time.monotonic()
                if not _is_busy(error) or now - began >= self._timeout or now - stays_since >= patience:
                    raise self._unavailable(error) from error
            seen = self._execute(_DATA_VERSION)[0][0]
            if seen != version:  # somebody has committed since the last look
                version, stays_since = seen, now
                naps = _naps()
            time.sleep(next(naps))

    def _execute(self, statement: Statement) -> Sequence[Row]:
        connection = self._connected()
        try:
            if statement.many:
                return [(connection.executemany(statement.sql, statement.parameters).rowcount,)]
            return connection.execute(statement.sql, statement.parameters).fetchall()
        except sqlite3.Error as error:
            if not _is_busy(error) or statement.many:
                raise self._unavailable(error) from error
            return self._execute_later(connection, statement)

    def _execute_later(self, connection: sqlite3.Connection, statement: Statement) -> Sequence[Row]:
        """For the few times that others lock out even readers, as they do after a crash or when they close the file."""
        began, naps = time.monotonic(), _naps()
        while True:
            time.sleep(next(naps))
            try:
                return connection.execute(statement.sql, statement.parameters).fetchall()
            except sqlite3.Error as error:
                if not _is_busy(error) or time.monotonic() - began >= self._timeout:
                    raise self._unavailable(error) from error

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = None
        try:
            if self.path != IN_MEMORY and not os.path.exists(self.path):
                _make_private_file(os.path.realpath(self.path))  # where a symbolic link leads, SQLite would make it
            check_not_inherited(self.path)
            if self.path != IN_MEMORY:  # before it is opened: a file that takes its place meanwhile is found out
                path = os.path.abspath(self.path)
                self._opened = (path, _identity_of(path))
            connection = sqlite3.connect(
                self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False, cached_statements=512
            )
            self._use_wal(connection)
            connection.execute(f"PRAGMA synchronous = {self.target.synchronous}")
            self._make_schema(connection)
            connection.execute("PRAGMA busy_timeout = 0")  # from here on it is we who wait
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise self._unavailable(error) from error
            raise
        return connection

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL. For that alone SQLite does not wait while others open the file, so this does."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def _make_schema(self, connection: sqlite3.Connection) -> None:
        """Make what is missing; several processes may do it at once."""
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute(
            "SELECT count(*) FROM sqlite_schema WHERE name IN ('retryproof_operations', 'retryproof_markers')"
        ).fetchone()[0]
        if tables == 2 and found == records.SCHEMA_VERSION:
            return
        if tables and found > records.SCHEMA_VERSION:
            raise ConfigurationError(
                f"{self.path} was written by a later release (schema {found}; this one knows "
                f"{records.SCHEMA_VERSION}). Upgrade retryproof."
            )
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(records.SCHEMA)
        connection.execute(records.MARKERS_SCHEMA)  # earlier releases work beside it
        connection.execute(f"PRAGMA user_version = {records.SCHEMA_VERSION}")
        connection.execute("COMMIT")

    def _unavailable(self, error: sqlite3.Error | OSError) -> StoreUnavailable:
        locked = "is kept locked by another writer"
        what = locked if _is_busy(error) else f"cannot be used: {error}"
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            return StoreUnavailable(f"The SQLite database {self.path} {what}; make the folder {folder} first.")
        return StoreUnavailable(f"The SQLite database {self.path} {what}; try again.")


_files: weakref.WeakSet[SqliteFile] = weakref.WeakSet()
_suspended: list[SqliteFile] = []
_forking = threading.RLock()
"""Held by the one thread that forks, from before to after; two of them would wait for each other's files."""


def _before_fork() -> None:
    _forking.acquire()
    deadline = time.monotonic() + FORK_PATIENCE
    for file in list(_files):
        if file.suspend(deadline):
            _suspended.append(file)


def _after_in_parent() -> None:
    while _suspended:
        _suspended.pop().resume()
    _forking.release()


def _after_in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _suspended.clear()
    for file in list(_files):
        file.disinherit()


def _is_held_here(lock: threading.RLock) -> bool:
    """Whether this thread holds the lock: only then a condition over it may notify."""
    try:
        threading.Condition(lock).notify(0)
    except RuntimeError:
        return False
    return True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def _naps() -> Iterator[float]:
    """Seconds between two looks at a locked file, at random, so that two who wait do not keep meeting."""
    nap = FIRST_NAP
    while True:
        yield nap * random.uniform(0.5, 1.5)
        nap = min(2 * nap, LAST_NAP)


def _identity_of(path: str) -> tuple[int, int]:
    """What tells a file from the next one under its name; zeros where there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _is_busy(error: Exception) -> bool:
    name: str = getattr(error, "sqlite_errorname", "")
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _make_private_file(path: str) -> None:
    """Make the file, for its owner alone to read: what is stored may be anybody's response.

    It gets its name only once it is closed here: closing a file drops the locks that this process has on it, and
    SQLite holds its own so.
    """
    folder, name = os.path.split(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder or ".")
    os.close(descriptor)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
