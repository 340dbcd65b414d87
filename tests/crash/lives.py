"""Processes that run a given scenario, and die at a given point.

    python -m tests.crash.lives

Imports everything once and then forks, so that a life starts at once. Each line on standard input is a life, a JSON
object; a forked child lives it and says on standard output what happens. When it has ended, a line says how: `exit`.

A life serves the payments API (`kind` "http") or makes one call of a function ("function"). Its effect is a row in the
ledger, whose id is derived from the operation, and one in `runs` for each time that the handler got there.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

import retryproof.stores.redis.asynchronous
import retryproof.stores.redis.blocking
import retryproof.stores.sql.asyncpg
import retryproof.stores.sql.psycopg
import retryproof.stores.sql.sqlite  # noqa: F401  # all stores are imported before the fork
from retryproof import Idempotency, Policy, current_operation
from retryproof.core.errors import IdempotencyError
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.stores import open_store
from retryproof.stores.url import open_async
from retryproof.testing.crash import CrashPoints

SCHEMA = """
CREATE TABLE IF NOT EXISTS charges (id TEXT PRIMARY KEY, reference TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (reference TEXT NOT NULL, attempt INTEGER NOT NULL);
"""


def connect(ledger: str) -> sqlite3.Connection:
    """The ledger, whose every statement is a transaction of its own."""
    connection = sqlite3.connect(ledger, isolation_level=None, check_same_thread=False, timeout=10.0)
    connection.executescript(SCHEMA)
    return connection


def charge(ledger: sqlite3.Connection, reference: str, crash: CrashPoints) -> dict[str, Any]:
    """The effect: one row, however often it is repeated by attempts at one operation."""
    operation = current_operation()
    id = str(operation.derive("charge"))
    ledger.execute("INSERT INTO runs VALUES (?, ?)", (reference, operation.attempt))
    crash.reach("before effect")
    ledger.execute("INSERT INTO charges VALUES (?, ?) ON CONFLICT DO NOTHING", (id, reference))
    crash.reach("after effect")
    return {"id": id, "attempt": operation.attempt}


def create_app(life: dict[str, Any]) -> IdempotencyMiddleware:
    """The API over a store that has crash points."""
    crash, ledger, app = CrashPoints(life["crash"]), connect(life["ledger"]), FastAPI()

    @app.post("/charges", status_code=201)
    async def create_charge(wanted: dict[str, str]) -> dict[str, Any]:
        return charge(ledger, wanted["reference"], crash)

    url = life["store"]
    store: Any = open_store(url) if url.startswith(("sqlite", "memory")) else open_async(url)
    return IdempotencyMiddleware(app, store=crash.wrap(store), scope=single_tenant, policy=Policy(**life["policy"]))


def serve(life: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(life), log_level="error", lifespan="on"))
        say({"pid": os.getpid(), "port": listener.getsockname()[1]})
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def call(life: dict[str, Any]) -> None:
    crash, ledger = CrashPoints(life["crash"]), connect(life["ledger"])
    engine = Idempotency(crash.wrap(open_store(life["store"])), policy=Policy(**life["policy"]))
    try:
        outcome = engine.run(life["key"], lambda: charge(ledger, life["key"], crash), scope="crash")
    except IdempotencyError as error:
        say({"error": type(error).__name__})
    else:
        say({"value": outcome.value, "replayed": outcome.replayed, "attempt": outcome.attempt})


def end_with_input(server: uvicorn.Server) -> None:
    """Any more input ends a server's life in an orderly way."""
    os.read(sys.stdin.fileno(), 1)
    server.should_exit = True


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lives:  # reads no further than a line
        while line := lives.readline():
            pid = os.fork()
            if pid == 0:
                life = json.loads(line)
                (serve if life["kind"] == "http" else call)(life)
                sys.exit()
            say({"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


if __name__ == "__main__":
    main()
