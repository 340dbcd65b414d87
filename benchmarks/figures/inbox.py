"""The inbox on PostgreSQL: batches in one transaction, against one message a transaction."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from benchmarks.ceilings import inbox as by_hand
from benchmarks.measure import Figure, Pace, Run, Sample, interleave
from benchmarks.services import Services
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Inbox

BATCH = 100
SOURCE = "orders"
PAYLOAD = b'{"order": 1, "amount": 100, "currency": "EUR"}' * 4
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS bench_received (message_id text NOT NULL, amount bigint NOT NULL);
{by_hand.TABLE}
"""
_EFFECT = "INSERT INTO bench_received (message_id, amount) VALUES ($1, 100)"
_EFFECTS = "INSERT INTO bench_received (message_id, amount) SELECT id, 100 FROM unnest($1::text[]) AS m (id)"
_numbers = itertools.count(1)

Incoming = tuple[str, bytes]
Consume = Callable[[Any, Sequence[Incoming]], Awaitable[int]]
"""Takes messages in a transaction that it begins and commits; how many were new."""


class Consumers:
    """The subjects; each has the same effect, a row for each new message."""

    def __init__(self) -> None:
        self._inbox = Inbox("bench")

    async def by_hand(self, connection: Any, messages: Sequence[Incoming]) -> int:
        """One transaction for all, nothing but what is needed."""
        async with connection.transaction():
            fresh = await by_hand.take_many(connection, SOURCE, messages)
            return await _effects(connection, [message_id for message_id, _ in messages if message_id in fresh])

    async def ours(self, connection: Any, messages: Sequence[Incoming]) -> int:
        """The same with an Inbox."""
        async with connection.transaction():
            answers = await self._inbox.areceive_many(connection, SOURCE, messages)
            pairs = zip(messages, answers, strict=True)
            return await _effects(connection, [message_id for (message_id, _), answer in pairs if answer.fresh])

    async def handled(self, connection: Any, messages: Sequence[Incoming]) -> int:
        """`aprocess`, whose handler sees one message after another and writes its row by itself."""
        count = 0

        async def handle(connection: Any, message: Incoming) -> None:
            nonlocal count
            await connection.execute(_EFFECT, message[0])
            count += 1

        await self._inbox.aprocess(lambda: _transaction(connection), SOURCE, messages, handle)
        return count


@asynccontextmanager
async def _transaction(connection: Any) -> AsyncIterator[Any]:
    async with connection.transaction():
        yield connection


async def _effects(connection: Any, fresh: Sequence[str]) -> int:
    if len(fresh) == 1:
        await connection.execute(_EFFECT, fresh[0])
    elif fresh:
        await connection.execute(_EFFECTS, fresh)
    return len(fresh)


def consuming(connection: Any, consume: Consume, size: int, *, again: bool = False) -> Run:
    """One consumer, one transaction of `size` messages after another. again: each came before."""

    async def run(seconds: float) -> Sample:
        operations = errors = 0
        known = [(f"m{next(_numbers)}", PAYLOAD) for _ in range(size)]
        if again:
            await consume(connection, known)
        cpu, started = time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            messages = known if again else [(f"m{next(_numbers)}", PAYLOAD) for _ in range(size)]
            errors += await consume(connection, messages) != (0 if again else size)
            operations += size
        return Sample(operations, time.perf_counter() - started, time.process_time() - cpu, errors)

    return run


async def figures(services: Services, pace: Pace) -> list[Figure]:
    url = services.url("postgres")
    migrate(url)
    connection = await asyncpg.connect(url)
    await connection.execute(_SCHEMA)
    consumers = Consumers()
    method = f"one connection of asyncpg; a row written for each new message; batches of {BATCH}; fsync on"
    fresh = {
        "one a transaction, by hand": consuming(connection, consumers.by_hand, 1),
        "batch by hand": consuming(connection, consumers.by_hand, BATCH),
        "ours": consuming(connection, consumers.ours, BATCH),
        "ours, a handler a message": consuming(connection, consumers.handled, BATCH),
        "ours, one a transaction": consuming(connection, consumers.ours, 1),
    }
    known = {
        "batch by hand": consuming(connection, consumers.by_hand, BATCH, again=True),
        "ours": consuming(connection, consumers.ours, BATCH, again=True),
    }
    try:
        return [
            await interleave("inbox", method, fresh, pace),
            await interleave("inbox duplicates", method, known, pace),
        ]
    finally:
        await connection.close()
