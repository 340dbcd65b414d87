"""PostgreSQL by plain calls: one statement and one commit to claim, one to complete, from a pool."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import asyncpg

from benchmarks.ceilings.redis import FINGERPRINT, RESULT, record_id

_TABLE = """
CREATE TABLE IF NOT EXISTS bench_plain (
    id bytea PRIMARY KEY,
    fingerprint bytea NOT NULL,
    nonce bytea NOT NULL,
    token bigint NOT NULL,
    lease_end timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    result bytea
)
"""
_CLAIM = """
INSERT INTO bench_plain (id, fingerprint, nonce, token, lease_end, expires)
VALUES ($1, $2, $3, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
        clock_timestamp() + interval '10 s', clock_timestamp() + interval '30 days')
ON CONFLICT (id) DO NOTHING
RETURNING token
"""
_GET = "SELECT fingerprint, result FROM bench_plain WHERE id = $1"
_COMPLETE = """
UPDATE bench_plain SET result = $4, expires = clock_timestamp() + interval '1 day'
WHERE id = $1 AND nonce = $2 AND token = $3
"""


class PlainPostgres:
    """An operation in process with a commit to claim and a commit to complete."""

    name = "one commit a claim"

    def __init__(self, url: str, connections: int) -> None:
        self._url = url
        self._connections = connections

    async def open(self) -> None:
        self._pool = await asyncpg.create_pool(self._url, min_size=self._connections, max_size=self._connections)
        await self._pool.execute(_TABLE)

    async def operation(self, key: str, effect: Callable[[], Awaitable[object]]) -> bool:
        record, nonce = record_id("bench", key), os.urandom(16)
        token = await self._pool.fetchval(_CLAIM, record, FINGERPRINT, nonce)
        if token is None:
            row = await self._pool.fetchrow(_GET, record)
            if row is None or row["result"] is None:
                raise RuntimeError("not acquired")
            return True
        await effect()
        if await self._pool.execute(_COMPLETE, record, nonce, token, RESULT) != "UPDATE 1":
            raise RuntimeError("the lease was lost")
        return False

    async def close(self) -> None:
        await self._pool.close()
