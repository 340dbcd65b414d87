"""The payments API under uvicorn, in processes that may be told where to die.

    python -m retryproof.demo.server

Imports everything once and then forks, since a restart is to take no time: for each line on standard input, a JSON
object with `database`, `idempotent`, `dies` and `count`, a child serves the API. On standard output come a line with
`pid` and `port` once the child listens, and one with `exit` once it has ended. The end of the input ends everything in
an orderly way, so that a demo which is gone leaves no server behind.
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
"""Seconds after which a dead server's operations are taken over; short, so that the demo is."""
PATIENCE = 100
"""Attempts that may die at one operation; this server is killed more often than any bug would."""


class DeadlyConnection(sqlite3.Connection):
    """A connection whose process may be told to kill itself after the next commit, before anybody hears of it."""

    dies = False

    def commit(self) -> None:
        super().commit()
        if self.dies:
            kill_me()


class DeadlyLedger(Ledger):
    """A ledger whose process kills itself at a charge: `before` it is written, `within` its transaction, or `after`."""

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
    """A database whose nth transaction, of those that write charges, is its process's last."""

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
    """`kill -9`: no handler, no clean-up, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent(server: uvicorn.Server) -> None:
    """Shut down when standard input ends: nothing else comes while a child lives."""
    os.read(sys.stdin.fileno(), 1)
    server.should_exit = True


def serve(life: dict[str, Any]) -> None:
    """Live that life to its end."""
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
