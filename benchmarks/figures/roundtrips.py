"""Round trips of one operation at a time, counted between client and server and in the server's own statistics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg
from redis.asyncio import Redis

from benchmarks.ceilings.redis import BareCoalesced
from benchmarks.figures.engine import EngineSubject, Ours, charge
from benchmarks.link import CountingLink
from benchmarks.services import Services

OPERATIONS = 50


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """For one operation: round trips on the wire, and what the server says it did (`counted` names it)."""

    name: str
    round_trips: float
    server_count: float
    counted: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def redis_commands(client: Redis) -> int:
    """Scripts run since the server's start, without those that only inform or load."""
    statistics = await client.info("commandstats")
    return sum(int(entry["calls"]) for name, entry in statistics.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))


async def counts(
    name: str, link: CountingLink, server: Callable[[], Awaitable[int]], counted: str, subject: EngineSubject
) -> list[RoundTrips]:
    """New operations, then their replays, one after another."""
    await subject.operation(f"warm {name}", charge)
    taken = []
    for kind in ("new", "replay"):
        trips, calls = link.round_trips, await server()
        for number in range(OPERATIONS):
            await subject.operation(f"{name} {number}", charge)
        trips, calls = link.round_trips - trips, await server() - calls
        taken.append(RoundTrips(f"{name} {kind}", trips / OPERATIONS, calls / OPERATIONS, counted))
    return taken


async def redis_round_trips(services: Services, *, ours: bool) -> list[RoundTrips]:
    taken: list[RoundTrips] = []
    client = Redis.from_url(services.url("redis"))
    async with CountingLink(services.url("redis")) as link:
        subjects: list[EngineSubject] = [BareCoalesced(link.url), *([Ours(link.url)] if ours else [])]
        for subject in subjects:
            await subject.open()
            name = f"redis {subject.name}"
            taken += await counts(name, link, lambda: redis_commands(client), "scripts", subject)
            await subject.close()
    await client.aclose()
    return taken


async def postgres_round_trips(services: Services, *, ours: bool) -> list[RoundTrips]:
    if not ours:
        return []
    connection = await asyncpg.connect(services.url("postgres"))

    async def write_transactions() -> int:
        # Exact at once; pg_stat_database lags by up to ten seconds for a session that has gone idle.
        return int(await connection.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))

    async with CountingLink(services.url("postgres")) as link:
        subject = Ours(link.url)
        await subject.open()
        taken = await counts("postgres ours", link, write_transactions, "write transactions", subject)
        await subject.close()
    await connection.close()
    return taken
