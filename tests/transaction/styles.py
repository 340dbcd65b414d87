"""The styles of connections that an operation joins, each with what begins and reads a transaction."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiosqlite
import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from retryproof import Idempotency, Policy, errors
from tests.transaction.support import Database, insert

Write = Callable[[int], Any]


Blocking = contextlib.AbstractContextManager[tuple[Any, Write]]


OnLoop = contextlib.AbstractAsyncContextManager[tuple[Any, Write]]


@contextlib.contextmanager
def of_psycopg(database: Database) -> Iterator[tuple[Any, Write]]:
    with psycopg.connect(database.store) as connection:
        yield connection, lambda number: connection.execute(insert(number).encode())


@contextlib.contextmanager
def of_sqlite3(database: Database) -> Iterator[tuple[Any, Write]]:
    with contextlib.closing(sqlite3.connect(str(database.path), isolation_level=None)) as connection:
        yield connection, lambda number: connection.execute(insert(number))


def of_sqlalchemy(driver: str, *, session: bool) -> Callable[[Database], Blocking]:
    @contextlib.contextmanager
    def opened(database: Database) -> Iterator[tuple[Any, Write]]:
        engine = database.engine(driver)
        with Session(engine) if session else engine.connect() as connection:
            yield connection, lambda number: connection.execute(text(insert(number)))
        engine.dispose()

    return opened


def begin(connection: Any) -> None:
    """On SQLite inside the operation: with one writer, nothing can be claimed while a transaction is open."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("BEGIN IMMEDIATE")


async def abegin(connection: Any) -> None:
    if isinstance(connection, aiosqlite.Connection):
        await connection.execute("BEGIN IMMEDIATE")


BLOCKING = {
    "psycopg": ("postgres", of_psycopg),
    "sqlite3": ("sqlite", of_sqlite3),
    "sqlalchemy-connection-psycopg": ("postgres", of_sqlalchemy("psycopg", session=False)),
    "sqlalchemy-session-psycopg": ("postgres", of_sqlalchemy("psycopg", session=True)),
    "sqlalchemy-connection-sqlite": ("sqlite", of_sqlalchemy("pysqlite", session=False)),
    "sqlalchemy-session-sqlite": ("sqlite", of_sqlalchemy("pysqlite", session=True)),
}


@contextlib.asynccontextmanager
async def of_async_psycopg(database: Database) -> AsyncIterator[tuple[Any, Write]]:
    async with await psycopg.AsyncConnection.connect(database.store) as connection:
        yield connection, lambda number: connection.execute(insert(number).encode())


@contextlib.asynccontextmanager
async def of_asyncpg(database: Database) -> AsyncIterator[tuple[Any, Write]]:
    connection = await asyncpg.connect(database.store)
    await connection.transaction().start()
    yield connection, lambda number: connection.execute(insert(number))
    await connection.close()


@contextlib.asynccontextmanager
async def of_aiosqlite(database: Database) -> AsyncIterator[tuple[Any, Write]]:
    async with aiosqlite.connect(str(database.path)) as connection:
        yield connection, lambda number: connection.execute(insert(number))


def of_async_sqlalchemy(driver: str, *, session: bool) -> Callable[[Database], OnLoop]:
    @contextlib.asynccontextmanager
    async def opened(database: Database) -> AsyncIterator[tuple[Any, Write]]:
        async with database.aconnection(driver) as connection:
            if session:
                async with AsyncSession(connection.engine) as made:
                    yield made, lambda number: made.execute(text(insert(number)))
            else:
                yield connection, lambda number: connection.execute(text(insert(number)))

    return opened


ON_LOOP = {
    "psycopg": ("postgres", of_async_psycopg),
    "asyncpg": ("postgres", of_asyncpg),
    "aiosqlite": ("sqlite", of_aiosqlite),
    "sqlalchemy-connection-asyncpg": ("postgres", of_async_sqlalchemy("asyncpg", session=False)),
    "sqlalchemy-session-asyncpg": ("postgres", of_async_sqlalchemy("asyncpg", session=True)),
    "sqlalchemy-session-psycopg": ("postgres", of_async_sqlalchemy("psycopg", session=True)),
    "sqlalchemy-session-aiosqlite": ("sqlite", of_async_sqlalchemy("aiosqlite", session=True)),
}


BRIEF = Policy(lease=0.2)


def refused_for_good(engine: Idempotency, database: Database) -> None:
    """No attempt takes the operation over, under `rerun` neither, until an operator has settled it."""
    database.execute("UPDATE retryproof_operations SET lease_until = 0")
    for _ in range(2):
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", lambda: "again", scope="s")
