"""How a relay's cost grows on PostgreSQL: many keys, many pending, a transaction that is held open for a minute."""

from __future__ import annotations

import asyncio
import resource
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from benchmarks.figures.outbox import BATCH, FILL, KEYS, NoOp, fill, ours, timed
from benchmarks.measure import Figure, OutOfTime, Pace, Run, Sample, interleave
from benchmarks.services import Services
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Relay, RelayPolicy

MANY_PENDING, MANY_KEYS = 1_000_000, 100_000
HELD, AROUND, WINDOW = 60, 10, 10
"""Seconds that the other transaction is held, that are measured before and after, and that are one subject."""
INFLOW = 1_000
"""Messages put in each second, into each outbox."""


async def database(url: str, name: str) -> str:
    """A migrated database of its own on the same server; its URL."""
    connection = await asyncpg.connect(url)
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    place = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    await asyncio.to_thread(migrate, place)
    return place


def relay(url: str, order: Any = "key") -> Relay:
    return Relay(url, NoOp(), policy=RelayPolicy(batch=BATCH, order=order))


async def figures(services: Services, pace: Pace) -> list[Figure]:
    """The same relay at an outbox of few keys, of many, and of many with a million pending; each in a database."""
    url = services.url("postgres")
    runs: dict[str, Run] = {}
    closing: list[Any] = []
    for name, keys in (("500 keys", KEYS), ("100,000 keys", MANY_KEYS)):
        place = await database(url, f"bench_{keys}")
        connection, working = await asyncpg.connect(place), relay(place)
        closing += [working.aclose, connection.close]
        runs[name] = ours(place, connection, working, keys)
    place = await database(url, "bench_pending")
    connection, working = await asyncpg.connect(place), relay(place)
    closing += [working.aclose, connection.close]
    await fill(connection, MANY_PENDING, MANY_KEYS)
    await connection.execute("VACUUM ANALYZE retryproof_outbox")
    await connection.execute("CHECKPOINT")  # what the fill left to be written is not the relay's

    async def many(seconds: float) -> Sample:
        await connection.execute("VACUUM retryproof_outbox")
        return await timed(lambda: delivered(working), seconds)

    runs["100,000 keys, 1 million pending"] = many
    method = f"batch {BATCH}, a publisher that does nothing; {FILL} pending and vacuumed unless said otherwise"
    try:
        return [await interleave("outbox growth", method, runs, pace)]
    finally:
        for close in closing:
            await close()


async def delivered(working: Relay) -> int:
    """How many messages a batch had."""
    totals = await working.run_once()
    return totals.delivered if totals else 0


@dataclass
class Steady:
    """A relay whose outbox gets INFLOW messages a second."""

    connection: Any
    working: Relay

    async def second(self) -> Sample:
        """Put in what comes in a second, and relay what can be; the time is the relay's alone."""
        await fill(self.connection, INFLOW, KEYS)
        cpu, started = time.process_time(), time.perf_counter()
        operations = 0
        while count := await delivered(self.working):
            operations += count
        return Sample(operations, time.perf_counter() - started, time.process_time() - cpu)


async def held_figures(services: Services, pace: Pace) -> list[Figure]:
    """A relay by key and one in strict order, before, beside and after a writer that does not commit for a minute."""
    if pace.over:
        raise OutOfTime("held transaction")
    url = services.url("postgres")
    steadies = {}
    for order in ("key", "strict"):
        place = await database(url, f"bench_held_{order}")
        steadies[order] = Steady(await asyncpg.connect(place), relay(place, order))
    samples: dict[str, list[Sample]] = {}
    strict: dict[str, int] = {}
    memory: dict[str, int] = {}

    async def measure(name: str, seconds: int) -> None:
        for _ in range(seconds):
            began = time.monotonic()
            samples.setdefault(name, []).append(await steadies["key"].second())
            strict[name] = strict.get(name, 0) + (await steadies["strict"].second()).operations
            await asyncio.sleep(began + 1 - time.monotonic())
        memory[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    await measure("before", AROUND)
    other = await asyncpg.connect(url)
    await other.execute("CREATE TABLE IF NOT EXISTS bench_held (id int)")
    transaction = other.transaction()
    await transaction.start()
    await other.execute("INSERT INTO bench_held VALUES (1)")
    names = [f"held for {start} to {start + WINDOW} s" for start in range(0, HELD - WINDOW, WINDOW)]
    for name in (*names, "last ten seconds of the minute"):
        await measure(name, WINDOW)
    await transaction.rollback()
    await measure("after", AROUND)
    for steady in steadies.values():
        await steady.working.aclose()
        await steady.connection.close()
    await other.close()
    while_held = sum(strict[name] for name in strict if name not in ("before", "after"))
    notes = (
        f"in strict order: {strict['before']} delivered before, {while_held} while held, {strict['after']} after",
        f"most memory of the process: {memory['before']} MB before, {memory['after']} MB after",
    )
    method = (
        f"{INFLOW} messages a second into each of two outboxes, by key and strict; shown is how fast the relay by key "
        "takes them; another transaction has written and is held open"
    )
    return [Figure("held transaction", method, samples, notes)]
