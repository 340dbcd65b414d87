"""Phases on PostgreSQL: business transactions with their recovery points, against the bare transactions.

An operation has PHASES of them, as one that calls others in between: the claim and the completion are shared by all.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import asyncpg

from benchmarks.measure import Figure, Pace, Run, Sample, interleave
from benchmarks.services import Services
from retryproof import AsyncIdempotency, current_operation
from retryproof.sql.postgres import joined as joining
from retryproof.sql.postgres.statements import TABLE
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Phased

TASKS = 32
PHASES = 3
ACCOUNTS = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS bench_accounts (id integer PRIMARY KEY, balance bigint NOT NULL);
INSERT INTO bench_accounts SELECT generate_series(0, {last}), 1000000 ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS bench_rides (id uuid PRIMARY KEY, account integer NOT NULL, amount bigint NOT NULL);
CREATE TABLE IF NOT EXISTS bench_entries (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, ride uuid NOT NULL,
                                          account integer NOT NULL, amount bigint NOT NULL);
"""
JOIN = joining.join(TABLE)
FENCE = joining.checkpoint_joined(TABLE)
_numbers = itertools.count()


async def business(connection: Any, number: int) -> int:
    """Four statements: who it is, a ride, its entry in the books, the balance."""
    account, ride = number % ACCOUNTS, uuid4()
    await connection.fetchrow("SELECT balance FROM bench_accounts WHERE id = $1", account)
    await connection.execute("INSERT INTO bench_rides VALUES ($1, $2, 5)", ride, account)
    await connection.execute("INSERT INTO bench_entries (ride, account, amount) VALUES ($1, $2, 5)", ride, account)
    await connection.execute("UPDATE bench_accounts SET balance = balance - 5 WHERE id = $1", account)
    return number


def running(operation: Callable[[int], Awaitable[Any]]) -> Run:
    """TASKS tasks, one operation after another each."""

    async def run(seconds: float) -> Sample:
        cpu, started = time.process_time(), time.perf_counter()

        async def worker() -> int:
            done = 0
            while time.perf_counter() - started < seconds:
                await operation(next(_numbers))
                done += 1
            return done

        operations = sum(await asyncio.gather(*(worker() for _ in range(TASKS))))
        return Sample(operations, time.perf_counter() - started, time.process_time() - cpu)

    return run


async def figures(services: Services, pace: Pace) -> list[Figure]:
    url = services.url("postgres")
    await asyncio.to_thread(migrate, url)
    async with asyncpg.create_pool(url, min_size=TASKS, max_size=TASKS) as pool, AsyncIdempotency(url) as engine:
        await pool.execute(_SCHEMA.format(last=ACCOUNTS - 1))
        phased = Phased(engine, connect=pool.acquire)

        async def bare(number: int) -> None:
            for _ in range(PHASES):
                async with pool.acquire() as connection, connection.transaction():
                    await business(connection, number)

        async def by_hand(number: int) -> None:
            # The two statements of a phase, under a claim of ours, and nothing else: what fencing costs at the least.
            async def given() -> int:
                hold = current_operation()._hold
                fence = (hold.id, hold.nonce, hold.token)
                for name in range(PHASES):
                    async with pool.acquire() as connection, connection.transaction():
                        await connection.fetch(JOIN, *fence)
                        await business(connection, number)
                        kept = await connection.fetch(FENCE, *fence, b64encode(b"%d" % name).decode(), "MQ==")
                        if not kept:
                            raise RuntimeError("the lease was lost")
                return number

            await engine.run(str(uuid4()), given, scope="bench")

        async def work(number: int) -> int:
            for name in range(PHASES):
                async with current_operation().phase(str(name)) as phase:
                    phase.result = await business(phase.connection, number)
            return number

        book = phased.function("book")(work)

        async def listed(number: int) -> None:
            await book.run(str(uuid4()), number, scope="bench")

        async def unlisted(number: int) -> None:
            async def given() -> int:
                for name in range(PHASES):
                    async with current_operation().phase(str(name), pool.acquire()) as phase:
                        phase.result = await business(phase.connection, number)
                return number

            await engine.run(str(uuid4()), given, scope="bench")

        async def transactional(number: int) -> None:
            async def given() -> int:
                return await business(await current_operation().atransaction(pool.acquire()), number)

            for _ in range(PHASES):
                await engine.run(str(uuid4()), given, scope="bench")

        subjects = {
            "bare transactions": bare,
            "fenced by hand": by_hand,
            "ours": listed,
            "without a completer": unlisted,
            "an operation each": transactional,
        }
        method = f"{TASKS} tasks on asyncpg; {PHASES} business transactions of four statements; synchronous_commit on"
        return [await interleave("phases", method, {name: running(op) for name, op in subjects.items()}, pace)]
