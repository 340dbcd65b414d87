"""The payments API under uvicorn, in processes that kill themselves at a given point.

    python -m retryproof.demo.server

This process imports everything once and then forks, so that a restart is fast. Each line on standard input is a JSON
object with `database`, `idempotent`, `dies` and `count`; a child then serves the API. Standard output gets a line with
`pid` and `port` when the child listens, and one with `exit` when it has ended. When the input ends, everything shuts
down. So a demo that is gone leaves no server behind.
"""

import itertools
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
from functools import partial
from typing import Any

import uvicorn

from retryproof import Policy
from retryproof.demo.app import create_app
from retryproof.demo.ledger import Charge, Database, Ledger

LEASE = 2.0
"""Seconds after which another server takes over a dead one's operations; short, to keep the demo short."""
PATIENCE = 100
"""How many attempts at an operation may die; this server dies more often than with any bug."""


class DeadlyConnection(sqlite3.Connection):
    """A connection whose process can kill itself right after the next commit, before anybody learns of it."""

    dies = False

    def commit(self) -> None:
        super().commit()
        if self.dies:
            kill_me()


class DeadlyLedger(Ledger):
    """A ledger that kills its process at a charge: `before` it is written, `within` its transaction, or `after`."""

    def __init__(self, connection: DeadlyConnection, dies: str) -> None:
        super().__init__(connection)
        self._doomed = connection
        self._dies = dies

    def add_charge(self, charge: Charge) -> Charge:
        if self._dies == "before":
            kill_me()
        super().add_charge(charge)
        if self._dies == "within":
            kill_me()
        self._doomed.dies = self._dies == "after"
        return charge


class DeadlyDatabase(Database):
    """A database that kills its process at the nth transaction that writes a charge."""

    factory = DeadlyConnection

    def __init__(self, path: str, *, dies: str, count: int) -> None:
        super().__init__(path)
        self._dies = dies
        self._left = itertools.count(count, -1)

    def ledger(self, connection: sqlite3.Connection) -> Ledger:
        if isinstance(connection, DeadlyConnection) and connection.in_transaction and next(self._left) == 1:
            return DeadlyLedger(connection, self._dies)
        return super().ledger(connection)


def kill_me() -> None:
    """`kill -9`: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent(server: uvicorn.Server) -> None:
    """Shut down when standard input ends; it has no other content while a child lives."""
    os.read(sys.stdin.fileno(), 1)
    server.should_exit = True


def serve(life: dict[str, Any]) -> None:
    """Serve until the planned end."""
    app = create_app(
        life["database"],
        idempotent=life["idempotent"],
        policy=Policy(lease=LEASE, max_attempts=PATIENCE),
        open_database=partial(DeadlyDatabase, dies=life["dies"], count=life["count"]),
    )
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        say({"pid": os.getpid(), "port": listener.getsockname()[1]})
        threading.Thread(target=end_with_parent, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def say(message: dict[str, int]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            serve(json.loads(line))
            sys.exit()
        say({"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


if __name__ == "__main__":
    main()
