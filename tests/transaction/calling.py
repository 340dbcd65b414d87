"""A process whose operation calls somebody else's API, and which dies at a given point.

    python -m tests.transaction.calling MODE KEYS DATABASE API POINT

MODE is plain, transactional or phases; KEYS are derived or random.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psycopg

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation
from retryproof.testing.crash import CrashPoints
from retryproof.transaction import Phased

LEASE = 0.5


def call(key: uuid.UUID | None = None) -> str:
    """The foreign call, which the server at the other end may not let us survive."""
    if keys == "random":
        key = uuid.uuid4()
    points.reach("before the call")
    answered = httpx.post(api, headers={"idempotency-key": str(key)}, content=b"{}", timeout=10.0)
    points.reach("after the call")
    return answered.headers["x-charge"]


def plain() -> str:
    return call(current_operation().derive("charge"))


def transactional(connection: "psycopg.Connection[Any]") -> str:
    current_operation().transaction(connection)
    connection.execute("INSERT INTO charges VALUES (1)")
    return call(current_operation().derive("charge"))


async def phases() -> str:
    phased = Phased(AsyncIdempotency(database, policy=Policy(lease=LEASE)), connect=connected)

    @phased.function("charge")
    async def charge(number: int) -> str:
        operation = current_operation()
        async with operation.phase("ordered") as phase:
            if phase.pending:
                await phase.connection.execute(f"INSERT INTO charges VALUES ({number})")

        async def called(key: uuid.UUID) -> str:
            return call(key)

        made = await operation.astep("charge", called)
        points.reach("after it is noted")
        return made

    async with phased.engine:
        return (await charge.run("k", 1, scope="calls")).value


@asynccontextmanager
async def connected() -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(database) as connection:
        yield connection


def main() -> str:
    if mode == "phases":
        return asyncio.run(phases())
    with Idempotency(database, policy=Policy(lease=LEASE)) as engine, psycopg.connect(database) as connection:
        work = plain if mode == "plain" else lambda: transactional(connection)
        return engine.run("k", work, scope="calls").value


if __name__ == "__main__":
    mode, keys, database, api, point = sys.argv[1:]
    points = CrashPoints(point)
    print(main(), flush=True)
