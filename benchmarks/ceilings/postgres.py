"""PostgreSQL by hand: one statement and one commit to claim, one to complete; from a pool, or a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import asyncpg

from benchmarks.ceilings.redis import FINGERPRINT, RESULT, Coalescer, record_id

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


_SETTINGS = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "jit": "off"}
_CLAIM_BATCH = """
INSERT INTO bench_plain (id, fingerprint, nonce, token, lease_end, expires)
SELECT asked.id, asked.fingerprint, asked.nonce, (extract(epoch FROM clock.now) * 1000000)::bigint,
       clock.now + interval '10 s', clock.now + interval '30 days'
FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS asked (id, fingerprint, nonce)
CROSS JOIN (SELECT clock_timestamp() AS now OFFSET 0) AS clock
ORDER BY asked.id
ON CONFLICT (id) DO NOTHING
RETURNING id, token
"""
_COMPLETE_BATCH = """
UPDATE bench_plain AS o SET result = asked.result, expires = clock_timestamp() + interval '1 day'
FROM unnest($1::bytea[], $2::bytea[], $3::bigint[], $4::bytea[]) AS asked (id, nonce, token, result)
WHERE o.id = asked.id AND o.nonce = asked.nonce AND o.token = asked.token
RETURNING o.id
"""


class BareBatches:
    """The same in batches: without replays, and a rival that has not committed holds all of a batch up."""

    name = "bare batch"

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> None:
        self._claiming = await asyncpg.connect(self._url, server_settings=_SETTINGS)
        self._completing = await asyncpg.connect(self._url, server_settings=_SETTINGS)
        await self._claiming.execute(_TABLE)
        self._claims: Coalescer[tuple[bytes, bytes, bytes], int | None] = Coalescer(self._claim)
        self._completions: Coalescer[tuple[bytes, bytes, int, bytes], bool] = Coalescer(self._complete)

    async def _claim(self, items: list[tuple[bytes, bytes, bytes]]) -> list[int | None]:
        rows = await self._claiming.fetch(_CLAIM_BATCH, *map(list, zip(*items, strict=True)))
        tokens: dict[bytes, int] = {row[0]: row[1] for row in rows}
        return [tokens.get(record) for record, _, _ in items]

    async def _complete(self, items: list[tuple[bytes, bytes, int, bytes]]) -> list[bool]:
        rows = await self._completing.fetch(_COMPLETE_BATCH, *map(list, zip(*items, strict=True)))
        done = {row[0] for row in rows}
        return [record in done for record, _, _, _ in items]

    async def operation(self, key: str, effect: Callable[[], Awaitable[object]]) -> bool:
        record, nonce = record_id("bench", key), os.urandom(16)
        token = await self._claims.submit((record, FINGERPRINT, nonce))
        if token is None:
            raise RuntimeError("not acquired")
        await effect()
        if not await self._completions.submit((record, nonce, token, RESULT)):
            raise RuntimeError("the lease was lost")
        return False

    async def close(self) -> None:
        await self._claiming.close()
        await self._completing.close()
