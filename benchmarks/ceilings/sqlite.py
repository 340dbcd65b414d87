"""SQLite by plain calls (WAL, synchronous=FULL): one commit to claim, one to complete."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.ceilings.redis import FINGERPRINT, RESULT, record_id

_TABLE = """
CREATE TABLE IF NOT EXISTS bench_plain (
    id BLOB NOT NULL UNIQUE, fingerprint BLOB NOT NULL, nonce BLOB NOT NULL, token INTEGER NOT NULL,
    lease_end INTEGER NOT NULL, expires INTEGER NOT NULL, result BLOB
)
"""
_CLAIM = "INSERT INTO bench_plain VALUES (?, ?, ?, ?, ?, ?, NULL) ON CONFLICT (id) DO NOTHING"
_GET = "SELECT fingerprint, result FROM bench_plain WHERE id = ?"
_COMPLETE = "UPDATE bench_plain SET result = ?, expires = ? WHERE id = ? AND nonce = ? AND token = ?"
_DAY_MICROSECONDS = 86_400_000_000


class PlainSqlite:
    """An operation on the calling thread: each statement is a transaction of its own."""

    name = "one commit a claim, same thread"

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self) -> None:
        # Autocommit, and the one connection may be used from the subclass's thread.
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA busy_timeout = 2000")
        self._connection.execute(_TABLE)

    def operation(self, key: str, effect: Callable[[], object]) -> bool:
        record, nonce = record_id("bench", key), os.urandom(16)
        token = self.claim(record, nonce)
        if token is None:
            return True
        effect()
        self.complete(record, nonce, token)
        return False

    def claim(self, record: bytes, nonce: bytes) -> int | None:
        """The token, or None where the operation is completed."""
        now = time.time_ns() // 1000
        row = (record, FINGERPRINT, nonce, now, now + 10_000_000, now + 30 * _DAY_MICROSECONDS)
        if self._connection.execute(_CLAIM, row).rowcount == 1:
            return now
        found = self._connection.execute(_GET, (record,)).fetchone()
        if found is None or found[1] is None:
            raise RuntimeError("not acquired")
        return None

    def complete(self, record: bytes, nonce: bytes, token: int) -> None:
        row = (RESULT, time.time_ns() // 1000 + _DAY_MICROSECONDS, record, nonce, token)
        if self._connection.execute(_COMPLETE, row).rowcount != 1:
            raise RuntimeError("the lease was lost")

    def close(self) -> None:
        self._connection.close()


class PlainSqliteFromThread:
    """The same calls made by tasks through one thread that owns the connection."""

    name = "one commit a claim"

    def __init__(self, path: str) -> None:
        self._plain = PlainSqlite(path)
        self._thread = ThreadPoolExecutor(1)

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(self._thread, self._plain.open)

    async def operation(self, key: str, effect: Callable[[], Awaitable[object]]) -> bool:
        record, nonce = record_id("bench", key), os.urandom(16)
        token = await self._loop.run_in_executor(self._thread, self._plain.claim, record, nonce)
        if token is None:
            return True
        await effect()
        await self._loop.run_in_executor(self._thread, self._plain.complete, record, nonce, token)
        return False

    async def close(self) -> None:
        await self._loop.run_in_executor(self._thread, self._plain.close)
        self._thread.shutdown()
