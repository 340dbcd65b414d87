"""The caller's own database, as the tests of transactional mode use it."""

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

CREATE = "CREATE TABLE charges (id integer)"
WAITING = (
    "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid IN ("
    "SELECT pid FROM pg_locks WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
)
"""How many wait for a lock in this database. PostgreSQL lists those of other databases, and so of other tests, too."""


@dataclass(frozen=True)
class Database:
    """A database with the store's tables and one of the caller's. store: its URL for the store."""

    store: str
    path: Path | None = None

    @property
    def postgres(self) -> bool:
        return self.path is None

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """A plain connection, with autocommit."""
        if self.path is None:
            with psycopg.connect(self.store, autocommit=True) as connection:
                yield connection
        else:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as found:
                yield found

    def prepare(self) -> None:
        with self.connect() as connection:
            connection.execute(CREATE)

    def charges(self) -> list[int]:
        """What was committed."""
        with self.connect() as connection:
            return [row[0] for row in connection.execute("SELECT id FROM charges ORDER BY id").fetchall()]

    def execute(self, sql: str) -> None:
        with self.connect() as connection:
            connection.execute(sql)

    def engine(self, driver: str, **options: Any) -> Engine:
        return create_engine(self.address(driver), **options)

    def address(self, driver: str) -> Any:
        if self.path is None:
            return make_url(self.store).set(drivername=f"postgresql+{driver}")
        return f"sqlite+{driver}:///{self.path}"

    @contextlib.asynccontextmanager
    async def aconnection(self, driver: str, **options: Any) -> AsyncIterator[AsyncConnection]:
        engine = create_async_engine(self.address(driver), **options)
        try:
            async with engine.connect() as connection:
                yield connection
        finally:
            await engine.dispose()


def insert(number: int = 1) -> str:
    return f"INSERT INTO charges VALUES ({number})"


__all__ = ["WAITING", "Database", "insert", "text"]


@contextlib.contextmanager
def transaction(database: Database) -> Iterator[Any]:
    if database.path is None:
        with psycopg.connect(database.store) as connection:
            yield connection
    else:
        with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
