"""C1: connections of the caller's to a SQLite file that was open over a fork exclude nobody, so they are refused."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import create_engine, text

from retryproof import errors
from retryproof.transaction import Outbox
from tests.engine.support import SECONDS, in_child, in_thread


def begun_in_sqlite3(path: Path) -> Any:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def begun_in_sqlalchemy(path: Path) -> Any:
    connection = create_engine(f"sqlite:///{path}").connect()
    connection.execute(text("SELECT 1"))
    return connection


def refused_with(words: str, add: Callable[[], object]) -> bool:
    try:
        add()
    except errors.ConfigurationError as error:
        return words in str(error)
    return False


@pytest.mark.parametrize("begin", [begun_in_sqlite3, begun_in_sqlalchemy])
def test_c1_a_connection_from_before_the_fork_is_refused(begin: Callable[[Path], Any], tmp_path: Path) -> None:
    connection = begin(tmp_path / "app.db")

    def add() -> object:
        return Outbox().add(connection, topic="orders", payload=b"")

    in_child(lambda: refused_with("was open when this process was forked", add))
    add()
    connection.rollback()
    connection.close()


async def test_c1_an_aiosqlite_connection_from_before_the_fork_is_refused(tmp_path: Path) -> None:
    """It would wait for a thread that the child has not."""
    async with aiosqlite.connect(tmp_path / "app.db", isolation_level=None) as connection:
        await connection.execute("BEGIN IMMEDIATE")

        def add() -> object:
            async def add_on_loop() -> object:
                return await Outbox().aadd(connection, topic="orders", payload=b"")

            return in_thread(lambda: asyncio.run(add_on_loop())).result(SECONDS)  # here the parent's loop runs

        in_child(lambda: refused_with("before this process was forked", add))
        await Outbox().aadd(connection, topic="orders", payload=b"")
        await connection.rollback()
