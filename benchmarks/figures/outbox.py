"""The outbox on PostgreSQL: relays with a publisher that does nothing, and what writing a message costs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import uuid4

import asyncpg

from benchmarks.ceilings import outbox as by_hand
from benchmarks.measure import Figure, Pace, Run, Sample, interleave
from benchmarks.services import Services
from retryproof.core.message import PARTITIONS, partition_of, queue_of
from retryproof.publishers import DELIVERED, Batch, Outcome
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Outbox, Relay, RelayPolicy

BATCH = 100
FILL = 12_000
"""Messages put in before each sample, outside of its time: more than a sample relays."""
KEYS = 500
WRITERS = 16
PAYLOAD = b'{"order": 1, "amount": 100, "currency": "EUR"}' * 4
_BUSINESS = "CREATE TABLE IF NOT EXISTS bench_orders (id bigint PRIMARY KEY, amount bigint NOT NULL)"
_ORDER = "INSERT INTO bench_orders (id, amount) VALUES ($1, 100)"
_numbers = itertools.count(1)


class NoOp:
    """A publisher that delivers everything at once."""

    max_payload: int | None = None

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        return [DELIVERED] * len(batch.messages)

    def close(self) -> None:
        pass


async def nothing(rows: Sequence[Any]) -> None:
    """The same for the hand-written loop."""


def relay(url: str) -> Relay:
    return Relay(url, NoOp(), policy=RelayPolicy(batch=BATCH))


async def fill(connection: asyncpg.Connection[Any], count: int, keys: int) -> None:
    """Messages for so many keys in turn, in transactions of a thousand, with the chains that an Outbox gives them."""
    chains = [queue_of(f"k{number}", uuid4()) for number in range(keys)]
    records = [(number, f"k{number}", chain, partition_of(chain, PARTITIONS)) for number, chain in enumerate(chains)]
    await connection.execute("CREATE TEMP TABLE IF NOT EXISTS bench_keys (number int, key text, chain bytea, part int)")
    await connection.execute("TRUNCATE bench_keys")
    await connection.copy_records_to_table("bench_keys", records=records)
    for first in range(0, count, 1_000):
        await connection.execute(
            "INSERT INTO retryproof_outbox (id, topic, payload, key, chain, partition) "
            "SELECT gen_random_uuid(), 'orders', $1::bytea, k.key, k.chain, k.part "
            "FROM generate_series($2::int, $3::int) AS i JOIN bench_keys k ON k.number = i % $4::int",
            PAYLOAD, first, min(count, first + 1_000) - 1, keys,
        )  # fmt: skip


async def timed(step: Callable[[], Awaitable[int]], seconds: float) -> Sample:
    """Batches until the time is over, or nothing is left."""
    operations = 0
    cpu, started = time.process_time(), time.perf_counter()
    while time.perf_counter() - started < seconds:
        done = await step()
        operations += done
        if not done:
            break
    return Sample(operations, time.perf_counter() - started, time.process_time() - cpu)


def ours(url: str, connection: asyncpg.Connection[Any], working: Relay, keys: int) -> Run:
    async def step() -> int:
        totals = await working.run_once()
        return totals.delivered if totals else 0

    async def run(seconds: float) -> Sample:
        while await step():
            pass
        await fill(connection, FILL, keys)
        await connection.execute("VACUUM ANALYZE retryproof_outbox")
        return await timed(step, seconds)

    return run


def hand_written(connection: asyncpg.Connection[Any], loop: by_hand.LeaseLoop) -> Run:
    async def run(seconds: float) -> Sample:
        await connection.execute("DELETE FROM bench_outbox")
        await connection.execute(by_hand.FILL, FILL, KEYS, PAYLOAD)
        await connection.execute("VACUUM ANALYZE bench_outbox")
        return await timed(loop.run_once, seconds)

    return run


async def relay_figure(url: str, pace: Pace) -> Figure:
    connection = await asyncpg.connect(url)
    loop = by_hand.LeaseLoop(url, nothing, BATCH)
    await loop.open()
    working = relay(url)
    runs = {
        "lease loop": hand_written(connection, loop),
        "ours": ours(url, connection, working, KEYS),
        "ours, one key": ours(url, connection, working, 1),
    }
    method = f"batch {BATCH}, a publisher that does nothing, {KEYS} keys or one; synchronous_commit on"
    try:
        return await interleave("outbox relay", method, runs, pace)
    finally:
        await working.aclose()
        await loop.close()
        await connection.close()


async def enqueue_figure(url: str, pace: Pace) -> Figure:
    pool = await asyncpg.create_pool(url, min_size=WRITERS, max_size=WRITERS)
    outbox = Outbox()

    async def by_outbox(connection: Any, number: int) -> None:
        await outbox.aadd(connection, topic="orders", payload=PAYLOAD, key=f"k{number % KEYS}")

    async def by_insert(connection: Any, number: int) -> None:
        await connection.execute(by_hand.INSERT, uuid4(), "orders", f"k{number % KEYS}", PAYLOAD)

    def writing(write: Callable[[Any, int], Awaitable[None]]) -> Run:
        async def run(seconds: float) -> Sample:
            return await together(pool, write, seconds)

        return run

    method = f"{WRITERS} tasks on asyncpg; a transaction of one business row and one message"
    runs = {"hand-written": writing(by_insert), "ours": writing(by_outbox)}
    try:
        return await interleave("outbox enqueue", method, runs, pace)
    finally:
        await pool.close()


async def together(pool: Any, write: Callable[[Any, int], Awaitable[None]], seconds: float) -> Sample:
    """Transactions side by side until the time is over."""
    operations = 0
    cpu, started = time.process_time(), time.perf_counter()

    async def work() -> None:
        nonlocal operations
        async with pool.acquire() as connection:
            while time.perf_counter() - started < seconds:
                async with connection.transaction():
                    number = next(_numbers)
                    await connection.execute(_ORDER, number)
                    await write(connection, number)
                operations += 1

    await asyncio.gather(*(work() for _ in range(WRITERS)))
    return Sample(operations, time.perf_counter() - started, time.process_time() - cpu)


async def figures(services: Services, pace: Pace) -> list[Figure]:
    url = services.url("postgres")
    migrate(url)
    connection = await asyncpg.connect(url)
    for table in (by_hand.TABLE, _BUSINESS):
        await connection.execute(table)
    await connection.close()
    return [await relay_figure(url, pace), await enqueue_figure(url, pace)]
