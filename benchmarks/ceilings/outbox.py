"""A hand-written outbox on PostgreSQL: an insert beside the caller's own, a relay that leases rows by the hundred."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg

TABLE = """
CREATE TABLE IF NOT EXISTS bench_outbox (
    sequence bigserial PRIMARY KEY,
    id uuid NOT NULL,
    topic text NOT NULL,
    key text,
    payload bytea NOT NULL,
    headers text,
    attempts integer NOT NULL DEFAULT 0,
    token bigint NOT NULL DEFAULT 0,
    lease_until timestamptz NOT NULL DEFAULT '-infinity'
)
"""
INSERT = "INSERT INTO bench_outbox (id, topic, key, payload) VALUES ($1, $2, $3, $4)"
FILL = """
INSERT INTO bench_outbox (id, topic, key, payload)
SELECT gen_random_uuid(), 'orders', 'k' || (i % $2::int), $3::bytea FROM generate_series(1, $1::int) AS i
"""
_CLAIM = """
UPDATE bench_outbox SET token = $1, attempts = attempts + 1, lease_until = clock_timestamp() + interval '15 s'
WHERE sequence IN (
    SELECT sequence FROM bench_outbox WHERE lease_until < clock_timestamp()
    ORDER BY sequence LIMIT $2 FOR UPDATE SKIP LOCKED
)
RETURNING sequence, id, topic, key, payload, headers
"""
_FINISH = "DELETE FROM bench_outbox WHERE sequence = ANY($1::bigint[]) AND token = $2"


class LeaseLoop:
    """Claims by a commit, publishes, deletes what it still holds by another; no order, no retries, no limits."""

    def __init__(self, url: str, publish: Callable[[Sequence[Any]], Awaitable[object]], batch: int = 100) -> None:
        self._url = url
        self._publish = publish
        self._batch = batch
        self._tokens = itertools.count(1)

    async def open(self) -> None:
        self._connection = await asyncpg.connect(self._url)
        await self._connection.execute(TABLE)

    async def run_once(self) -> int:
        """One batch; how many."""
        token = next(self._tokens)
        rows = await self._connection.fetch(_CLAIM, token, self._batch)
        if not rows:
            return 0
        await self._publish(rows)
        await self._connection.execute(_FINISH, [row["sequence"] for row in rows], token)
        return len(rows)

    async def close(self) -> None:
        await self._connection.close()
