"""The rides API in processes that die, or stop, at a given point.

    python -m tests.transaction.rides

Imports everything once and then forks: each line on standard input is a life, a JSON object with `database`, `stripe`,
`crash` (a point, as in `retryproof.testing.crash`) and `stops` (stop there instead of dying). A child serves the API
and says `port` and `pid`; when it was ended, by more input, it says which points it `reached`, and the parent how it
went (`exit`).

The points are before and after every call of the store, every statement of a phase, commits included, and every charge.
"""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import uvicorn

from examples.rides.app import Rides, create_app, stripe_at
from retryproof import AsyncIdempotency, Policy
from retryproof.stores.url import open_async
from retryproof.testing.crash import CrashPoints

LEASE = 0.5
points = CrashPoints()


class Deadly(asyncpg.Connection):
    """A connection whose statements are points."""

    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        with passing(query):
            return await super().execute(query, *args, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> list[Any]:
        with passing(query):
            rows: list[Any] = await super().fetch(query, *args, **options)
            return rows


@contextmanager
def passing(query: str) -> Iterator[None]:
    """The points of a statement, by its first word."""
    word = query.split()[0].strip(";")
    points.reach(f"before {word}")
    yield
    points.reach(f"after {word}")


class DeadlyRides(Rides):
    """Rides whose charges are points."""

    async def charge(self, *args: Any) -> str | None:
        points.reach("before charge")
        made = await super().charge(*args)
        points.reach("after charge")
        return made


@asynccontextmanager
async def opened(life: dict[str, Any], rides: type[Rides] = DeadlyRides) -> AsyncIterator[Rides]:
    """What a life is to serve; a completer's is of plain Rides."""
    deadly = rides is DeadlyRides
    # One connection, so that the points of a life are always the same.
    options: dict[str, Any] = {"connection_class": Deadly, "min_size": 1, "max_size": 1} if deadly else {"min_size": 1}
    store: Any = points.wrap(open_async(life["database"])) if deadly else life["database"]
    engine = AsyncIdempotency(store, policy=Policy(lease=LEASE, max_attempts=50))
    charging = stripe_at(life["stripe"], "sk_test_rides")
    async with asyncpg.create_pool(life["database"], **options) as pool, engine, charging as client:
        yield rides(pool, client, engine)


def stop() -> None:
    """As a machine that is suspended."""
    print(json.dumps({"stopped": True}), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def serve(life: dict[str, Any]) -> None:
    global points
    app = create_app(lambda: opened(life))
    points = CrashPoints(life["crash"], die=stop) if life.get("stops") else CrashPoints(life["crash"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        print(json.dumps({"pid": os.getpid(), "port": listener.getsockname()[1]}), flush=True)
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
        server.run(sockets=[listener])
    print(json.dumps({"reached": points.reached}), flush=True)


def end_with_input(server: uvicorn.Server) -> None:
    os.read(sys.stdin.fileno(), 1)
    server.should_exit = True


def main() -> None:
    lives = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115  # read no further than a line
    while line := lives.readline():
        if not line.strip():  # it was to end a life that was over
            continue
        pid = os.fork()
        if pid == 0:
            serve(json.loads(line))
            sys.stdout.flush()
            os._exit(0)
        print(json.dumps({"exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
