"""Servers whose handlers work in the operation's transaction, and which die, or stop, at a given point.

    python -m tests.transaction.http_lives

Lives as in `tests.crash.lives`, each a fork: a line on standard input has `store`, `table`, `driver`, `policy` and the
point, `crash` or `stop`. A handler writes one row, with its attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any

import aiosqlite
import asyncpg
import psycopg
import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import retryproof.stores.sql.asyncpg
import retryproof.stores.sql.psycopg
import retryproof.stores.sql.sqlite  # noqa: F401  # all stores are imported before the fork
from retryproof import Policy, current_operation
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.fastapi import transaction
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from retryproof.sql.callers.aiosqlite import Aiosqlite
from retryproof.sql.callers.asyncpg import Asyncpg
from retryproof.sql.callers.psycopg import AsyncPsycopg, Psycopg
from retryproof.sql.callers.sqlalchemy import OfAsync
from retryproof.sql.callers.sqlite import Sqlite
from retryproof.sql.plan import Statement
from retryproof.stores import open_store
from retryproof.stores.url import open_async
from retryproof.testing.crash import CrashPoints
from tests.crash.lives import end_with_input, say

BLOCKING: tuple[Any, ...] = (Psycopg, Sqlite)
ON_LOOP: tuple[Any, ...] = (AsyncPsycopg, Asyncpg, Aiosqlite, OfAsync)


def stop_this_process() -> None:
    """Stay where one is until somebody says otherwise."""
    say({"stopped": os.getpid()})
    os.kill(os.getpid(), signal.SIGSTOP)


# Points on the caller's connection: around the fenced completion, and around the commit


def has_points(statement: Statement) -> bool:
    return "SET state" in statement.sql


def arm_blocking(adapter: Any, crash: CrashPoints) -> None:
    execute, commit = adapter.execute, adapter.commit

    def executing(self: Any, statement: Statement) -> Any:
        if not has_points(statement):
            return execute(self, statement)
        crash.reach("before complete")
        rows = execute(self, statement)
        crash.reach("before commit")
        return rows

    def committing(self: Any) -> None:
        commit(self)
        crash.reach("after commit")

    adapter.execute, adapter.commit = executing, committing


def arm_on_loop(adapter: Any, crash: CrashPoints) -> None:
    execute, commit = adapter.execute, adapter.commit

    async def executing(self: Any, statement: Statement) -> Any:
        if not has_points(statement):
            return await execute(self, statement)
        crash.reach("before complete")
        rows = await execute(self, statement)
        crash.reach("before commit")
        return rows

    async def committing(self: Any) -> None:
        await commit(self)
        crash.reach("after commit")

    adapter.execute, adapter.commit = executing, committing


class Answering:
    """Points on the way of the answer."""

    def __init__(self, app: App, crash: CrashPoints) -> None:
        self._app = app
        self._crash = crash

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def sending(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                self._crash.reach("before answer")
            await send(message)
            if message["type"] == "http.response.start":
                self._crash.reach("within answer")

        await self._app(scope, receive, sending)


# Handlers, one a library


@contextlib.asynccontextmanager
async def of_psycopg(url: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection


@contextlib.asynccontextmanager
async def of_asyncpg(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def of_aiosqlite(url: str) -> AsyncIterator[Any]:
    async with aiosqlite.connect(url.removeprefix("sqlite:///")) as connection:
        yield connection


@contextlib.contextmanager
def of_psycopg_blocking(url: str) -> Iterator[Any]:
    with psycopg.connect(url) as connection:
        yield connection


@contextlib.contextmanager
def of_sqlite3(url: str) -> Iterator[Any]:
    path = url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        yield connection


def awaited(life: dict[str, Any], crash: CrashPoints, connect: Callable[[str], Any]) -> Callable[[], Awaitable[Any]]:
    async def create_charge() -> dict[str, int]:
        operation = current_operation()
        crash.reach("before join")
        connection = await operation.atransaction(connect(life["store"]))
        crash.reach("before work")
        await connection.execute(f"INSERT INTO {life['table']} VALUES ({operation.attempt})")
        crash.reach("after work")
        return {"attempt": operation.attempt}

    return create_charge


def blocking(life: dict[str, Any], crash: CrashPoints, connect: Callable[[str], Any]) -> Callable[[], Any]:
    def create_charge() -> dict[str, int]:
        operation = current_operation()
        crash.reach("before join")
        connection = operation.transaction(connect(life["store"]))
        crash.reach("before work")
        connection.execute(f"INSERT INTO {life['table']} VALUES ({operation.attempt})")
        crash.reach("after work")
        return {"attempt": operation.attempt}

    return create_charge


def dependent(life: dict[str, Any], crash: CrashPoints) -> Callable[..., Awaitable[Any]]:
    address = make_url(life["store"]).set(drivername="postgresql+asyncpg")
    sessions = async_sessionmaker(create_async_engine(address))

    async def before() -> None:
        crash.reach("before join")

    async def create_charge(session: AsyncSession) -> dict[str, int]:
        operation = current_operation()
        crash.reach("before work")
        await session.execute(text(f"INSERT INTO {life['table']} VALUES ({operation.attempt})"))
        crash.reach("after work")
        return {"attempt": operation.attempt}

    async def handler(before: Any, session: Any) -> dict[str, int]:
        return await create_charge(session)

    # The dependencies are local, where FastAPI does not find them by the annotations' text.
    handler.__annotations__ = {
        "before": Annotated[None, Depends(before)],
        "session": Annotated[AsyncSession, Depends(transaction(sessions))],
    }
    return handler


HANDLERS: dict[str, Callable[[dict[str, Any], CrashPoints], Callable[..., Any]]] = {
    "psycopg": lambda life, crash: awaited(life, crash, of_psycopg),
    "psycopg-blocking": lambda life, crash: blocking(life, crash, of_psycopg_blocking),
    "asyncpg": lambda life, crash: awaited(life, crash, of_asyncpg),
    "sqlalchemy-asyncpg": dependent,
    "sqlite3": lambda life, crash: blocking(life, crash, of_sqlite3),
    "aiosqlite": lambda life, crash: awaited(life, crash, of_aiosqlite),
}


def create_app(life: dict[str, Any]) -> Answering:
    """The API, armed."""
    crash = CrashPoints(life["stop"], die=stop_this_process) if life["stop"] else CrashPoints(life["crash"])
    for adapter in BLOCKING:
        arm_blocking(adapter, crash)
    for adapter in ON_LOOP:
        arm_on_loop(adapter, crash)
    app, url = FastAPI(), life["store"]
    app.post("/charges", status_code=201)(HANDLERS[life["driver"]](life, crash))
    store: Any = crash.wrap(open_store(url)) if url.startswith("sqlite") else crash.wrap(open_async(url))
    covered = IdempotencyMiddleware(
        app, store=store, scope=single_tenant, policy=Policy(**life["policy"]), required=True
    )
    return Answering(covered, crash)


def serve(life: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(life), log_level="error", lifespan="on"))
        say({"pid": os.getpid(), "port": listener.getsockname()[1]})
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def main() -> None:
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lives:  # reads no further than a line
        while line := lives.readline():
            pid = os.fork()
            if pid == 0:
                serve(json.loads(line))
                sys.exit()
            say({"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


if __name__ == "__main__":
    main()
