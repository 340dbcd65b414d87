"""A process that uses a store and forks, and whose child goes on with the same store, for `tests/crash/test_forks.py`.

    python -m tests.crash.forking '{"store": "sqlite:///keys.db", "effects": "effects", "parent": "closes", …}'

The child uses the store at once, then waits until the parent has closed it, has ended, or works on beside it, and until
`retryproof keys list` has opened and closed the store. It says on standard output what it met, a JSON object, and ends
with its standard input.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import retryproof.sql.sqlite.file as sqlite_file
from retryproof import Idempotency, Policy
from retryproof.core.errors import ConfigurationError, IdempotencyError
from retryproof.sql.plan import Plan, Statement
from retryproof.stores import open_store
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.transaction import Outbox
from tests.crash.prefork_app import append


def say(document: dict[str, str]) -> None:
    """One line in one write: brothers say theirs at the same time."""
    os.write(1, json.dumps(document).encode() + b"\n")


def run_all(engine: Idempotency, keys: list[str], effects: Path, scope: str) -> dict[str, str]:
    """Every operation, whose effect is a line; what was met by key, in place of a result."""
    met: dict[str, str] = {}
    for key in keys:

        def effect(key: str = key) -> str:
            append(effects, f"{key} {os.getpid()}\n")
            return key

        try:
            engine.run(key, effect, scope=scope)
        except IdempotencyError as error:
            met[key] = f"{type(error).__name__}: {error}"
    return met


def work_in_threads(
    engine: Idempotency, effects: Path, life: dict[str, Any], ended: threading.Event
) -> list[threading.Thread]:
    """Threads of the parent that run one operation after the other."""

    def work(name: int) -> None:
        count = 0
        while not ended.is_set():
            run_all(engine, [f"busy-{name}-{count}"], effects, life["scope"])
            count += 1

    threads = [threading.Thread(target=work, args=(name,)) for name in range(life.get("threads", 0))]
    for thread in threads:
        thread.start()
    return threads


def hold_the_lock(path: str) -> tuple[threading.Event, threading.Thread]:
    """A thread that stays in mid-transaction until the event is set."""
    inside, leave = threading.Event(), threading.Event()

    def plan() -> Plan[None]:
        yield Statement("SELECT 1")
        inside.set()
        leave.wait()

    store = open_store(f"sqlite:///{path}")
    assert isinstance(store, SqliteStore)
    thread = threading.Thread(target=store.perform, args=(plan,))
    thread.start()
    inside.wait()
    return leave, thread


def connect(path: str) -> sqlite3.Connection:
    """A connection of the application's own, which has read the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    return connection


def add_message(connection: sqlite3.Connection) -> str:
    """What an outbox says to a message in this connection's transaction."""
    connection.execute("BEGIN")
    try:
        Outbox().add(connection, topic="orders", payload=b"")
    except ConfigurationError as error:
        return str(error)
    finally:
        connection.execute("ROLLBACK")
    return "added"


def in_child(life: dict[str, Any], engine: Idempotency, others: sqlite3.Connection | None, ready: int, go: int) -> None:
    effects = Path(life["effects"])
    early = run_all(engine, ["early"], effects, life["scope"])
    os.write(ready, b"1")
    os.read(go, 1)
    visitor = subprocess.run(
        [sys.executable, "-m", "retryproof.cli", "keys", "list", life["store"]],
        capture_output=True,
        text=True,
        check=False,
    )
    if visitor.returncode != 0:
        say({"visitor": visitor.stderr})
    met = {**early, **run_all(engine, life["keys"], effects, life["scope"])}
    if others is not None:
        met["outbox"] = add_message(others)
        met["outbox, connected here"] = add_message(connect(life["store"].removeprefix("sqlite:///")))
    say(met)
    sys.stdin.read()
    sys.exit(0)


def main() -> None:
    life = json.loads(sys.argv[1])
    effects, path = Path(life["effects"]), life["store"].removeprefix("sqlite:///")
    engine, ended = Idempotency(life["store"], policy=Policy(wait=10.0)), threading.Event()
    run_all(engine, ["before"], effects, life["scope"])
    threads = work_in_threads(engine, effects, life, ended)
    others = connect(path) if life.get("others") else None
    leave = None
    if life.get("locked"):
        sqlite_file.FORK_PATIENCE = 0.2
        leave, holder = hold_the_lock(path)
        threads.append(holder)
    (is_ready, ready), (go, going) = os.pipe(), os.pipe()
    for _ in range(life.get("children", 1)):
        if os.fork() == 0:
            os.close(going)
            in_child(life, engine, others, ready, go)
    for _ in range(life.get("children", 1)):
        os.read(is_ready, 1)
    if leave is not None:
        leave.set()
    if life["parent"] == "closes":
        engine.close()
    if life["parent"] != "ends":
        os.close(going)
    if life["parent"] == "works":
        run_all(engine, life["keys"], effects, life["scope"])
    if life["parent"] != "ends":
        sys.stdin.read()
        ended.set()
        for thread in threads:
            thread.join()
        for _ in range(life.get("children", 1)):
            os.wait()


if __name__ == "__main__":
    main()
