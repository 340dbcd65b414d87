"""The database that a relay or an operator of inbox or outbox works on: by URL, with connections of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.sql.callers import sqlstate_of
from retryproof.sql.inbox import InboxPlans
from retryproof.sql.outbox import OutboxPlans
from retryproof.sql.plan import Plan
from retryproof.sql.postgres.dialect import POSTGRES
from retryproof.sql.postgres.outbox import CHANNEL
from retryproof.sql.postgres.url import parse
from retryproof.sql.sqlite.dialect import SQLITE
from retryproof.sql.sqlite.file import SqliteFile
from retryproof.sql.sqlite.url import parse as parse_file

T = TypeVar("T")
SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")
TIMEOUT = 5.0
FORBIDDEN = "42501"  # insufficient_privilege


class Listener(Protocol):
    """Hears notifications over a connection of its own."""

    async def lost(self) -> None:
        """Wait until the connection is gone."""

    def close(self) -> None:
        """Cut the connection."""


class OwnDatabase(Protocol):
    """Runs plans, each as one transaction, within a time-out; raises StoreUnavailable."""

    plans: OutboxPlans
    inbox: InboxPlans
    listens: bool
    """Whether it has notifications at all."""

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan; it may be run again where the connection was dead."""

    async def listen(self, heard: Callable[[str], None]) -> Listener:
        """Have `heard` called with the payload of each notification; raises StoreUnavailable."""

    async def aclose(self) -> None:
        """Close the connections."""


class PostgresDatabase:
    """PostgreSQL, on asyncpg."""

    listens = True

    def __init__(self, url: str, timeout: float) -> None:
        try:
            from retryproof.sql.postgres.asyncpg import AsyncpgPool
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                "A relay on PostgreSQL needs asyncpg: pip install 'retryproof[postgres]'"
            ) from error
        target = parse(url)
        self.plans: OutboxPlans = POSTGRES.outbox(target.prefix)
        self.inbox = POSTGRES.inbox(target.prefix)
        self._pool = AsyncpgPool(target, timeout, target.check)
        self._url, self._timeout = url, timeout

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan; raises ConfigurationError where the role lacks a right."""
        try:
            return await self._pool.perform(plan)
        except StoreUnavailable as error:
            if sqlstate_of(error.__cause__) == FORBIDDEN:
                raise ConfigurationError(
                    f"This role lacks a right: {error.__cause__}. docs/howto/outbox-and-relay.md has the GRANTs of a "
                    "relay's role."
                ) from error
            raise

    async def listen(self, heard: Callable[[str], None]) -> Listener:
        """Listen on a connection of its own."""
        from retryproof.sql.postgres.asyncpg_listener import AsyncpgListener

        return await AsyncpgListener.open(self._url, CHANNEL, heard, self._timeout)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class SqliteDatabase:
    """A SQLite file, in a thread of its own."""

    listens = False

    def __init__(self, file: SqliteFile) -> None:
        self.plans: OutboxPlans = SQLITE.outbox("")
        self.inbox = SQLITE.inbox("")
        self._file = file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retryproof-outbox")

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._file.write(plan))

    async def listen(self, heard: Callable[[str], None]) -> Listener:
        """SQLite has no notifications."""
        raise ConfigurationError("SQLite has no notifications")

    async def aclose(self) -> None:
        """Close the file and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close)
        self._thread.shutdown(wait=False)


def open_database(url: str, *, timeout: float = TIMEOUT) -> OwnDatabase:
    """The database of a URL; nothing is connected before the first plan."""
    scheme = url.partition("://")[0].lower()
    if scheme in SCHEMES:
        return PostgresDatabase(url, timeout)
    if scheme == "sqlite":
        return SqliteDatabase(SqliteFile(parse_file(url, timeout)))
    raise ConfigurationError(
        "Inbox and outbox are in PostgreSQL or SQLite: postgresql://user@host/database, sqlite:///file.db"
    )
