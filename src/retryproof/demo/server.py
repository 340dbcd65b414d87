"""The payments API under uvicorn, in processes that may be told where to die.

    python -m retryproof.demo.server

Imports everything once and then forks, since a restart is to take no time: for each line on standard input, a JSON
object with `database`, `keys`, `dies` and `count`, a child serves the API. On standard output come a line with `pid`
and `port` once the child listens, and one with `exit` once it has ended. The end of the input ends everything in an
orderly way, so that a demo which is gone leaves no server behind.
"""

import itertools
import json
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import Any

import uvicorn

from retryproof import Policy
from retryproof.demo.app import create_app
from retryproof.demo.ledger import Charge, Ledger

LEASE = 2.0
"""Seconds after which a dead server's operations are taken over; short, so that the demo is."""
PATIENCE = 100
"""Attempts that may die at one operation; this server is killed more often than any bug would."""


class DeadlyLedger(Ledger):
    """A ledger whose process kills itself at the given charge, `before` or `after` it is booked."""

    def __init__(self, path: str, *, dies: str, count: int) -> None:
        super().__init__(path)
        self._dies = dies
        self._left = itertools.count(count, -1)

    def add_charge(self, charge: Charge) -> Charge:
        last = next(self._left) == 1
        if last and self._dies == "before":
            kill_me()
        booked = super().add_charge(charge)
        if last and self._dies == "after":
            kill_me()
        return booked


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
        keys=life["keys"],
        policy=Policy(lease=LEASE, max_attempts=PATIENCE),
        open_ledger=partial(DeadlyLedger, dies=life["dies"], count=life["count"]),
    )
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
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
