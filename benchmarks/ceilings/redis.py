"""The ceiling on Redis: one script claims a batch, one fenced script completes it, and nothing else is done."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from redis.asyncio import Redis

LEASE_MICROSECONDS = 10_000_000
RETENTION_MILLISECONDS = 86_400_000
UNSETTLED_RETENTION_MILLISECONDS = 30 * 86_400_000
BATCH_LIMIT = 512

_SCRIPTS = Path(__file__).parent

Item = TypeVar("Item")
Reply = TypeVar("Reply")


class Coalescer(Generic[Item, Reply]):
    """Sends what arrives while a batch is on its way in the next batch."""

    def __init__(self, send: Callable[[list[Item]], Awaitable[list[Reply]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Item, asyncio.Future[Reply]]] = []
        self._drain_task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def submit(self, item: Item) -> asyncio.Future[Reply]:
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting.append((item, future))
        if self._drain_task is None:
            self._drain_task = self._loop.create_task(self._drain())
        return future

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH_LIMIT], self._waiting[BATCH_LIMIT:]
            try:
                replies = await self._send([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - each caller gets it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), reply in zip(batch, replies, strict=True):
                    if not future.done():
                        future.set_result(reply)
        self._drain_task = None


Claim = tuple[bytes, bytes, bytes]
"""Record, fingerprint, nonce."""

Completion = tuple[bytes, bytes, bytes, bytes]
"""Record, nonce, token, result."""


class RedisScripts:
    """The two scripts over redis-py asyncio, each call one EVALSHA for a whole batch."""

    def __init__(self, url: str, connections: int) -> None:
        self._client = Redis.from_url(url, max_connections=connections)
        self._claim = self._complete = ""

    async def open(self) -> None:
        self._claim = await self._client.script_load((_SCRIPTS / "claim.lua").read_text())
        self._complete = await self._client.script_load((_SCRIPTS / "complete.lua").read_text())

    async def claim(self, claims: list[Claim]) -> list[bytes]:
        arguments: list[Any] = [record for record, _, _ in claims]
        arguments += (LEASE_MICROSECONDS, UNSETTLED_RETENTION_MILLISECONDS)
        for _, fingerprint, nonce in claims:
            arguments += (fingerprint, nonce)
        replies: list[bytes] = await self._client.execute_command("EVALSHA", self._claim, len(claims), *arguments)
        return replies

    async def complete(self, completions: list[Completion]) -> list[int]:
        arguments: list[Any] = [record for record, _, _, _ in completions]
        arguments.append(RETENTION_MILLISECONDS)
        for _, nonce, token, result in completions:
            arguments += (nonce, token, result)
        replies: list[int] = await self._client.execute_command("EVALSHA", self._complete, len(completions), *arguments)
        return replies

    async def close(self) -> None:
        await self._client.aclose()


class CoalescedRedis:
    """The scripts behind a coalescer each: at most one batch of claims and one of completions on their way."""

    def __init__(self, url: str) -> None:
        self._scripts = RedisScripts(url, connections=4)

    async def open(self) -> None:
        await self._scripts.open()
        self.claims: Coalescer[Claim, bytes] = Coalescer(self._scripts.claim)
        self.completions: Coalescer[Completion, int] = Coalescer(self._scripts.complete)

    async def close(self) -> None:
        await self._scripts.close()


FINGERPRINT = bytes(32)
RESULT = b'{"charged":100}'


def record_id(scope: str, key: str) -> bytes:
    return hashlib.sha256(f"{len(scope)}:{scope}{len(key)}:{key}".encode()).digest()


class BareCoalesced:
    """An operation in process on the coalesced scripts: no flow, no codec."""

    name = "bare coalesced script"

    def __init__(self, url: str) -> None:
        self._redis = CoalescedRedis(url)

    async def open(self) -> None:
        await self._redis.open()

    async def operation(self, key: str, effect: Callable[[], Awaitable[object]]) -> bool:
        """Run effect unless the key is completed; true when it was a replay."""
        record, nonce = record_id("bench", key), os.urandom(16)
        reply = await self._redis.claims.submit((record, FINGERPRINT, nonce))
        if reply[:1] == b"C":
            return True
        if reply[:1] != b"A":
            raise RuntimeError(f"not acquired: {reply!r}")
        await effect()
        if not await self._redis.completions.submit((record, nonce, reply[1:], RESULT)):
            raise RuntimeError("the lease was lost")
        return False

    async def close(self) -> None:
        await self._redis.close()


class PlainRedis:
    """An operation in process with one EVALSHA to claim and one to complete, nothing shared between operations."""

    name = "plain calls"

    def __init__(self, url: str, connections: int) -> None:
        self._scripts = RedisScripts(url, connections)

    async def open(self) -> None:
        await self._scripts.open()

    async def operation(self, key: str, effect: Callable[[], Awaitable[object]]) -> bool:
        record, nonce = record_id("bench", key), os.urandom(16)
        (reply,) = await self._scripts.claim([(record, FINGERPRINT, nonce)])
        if reply[:1] == b"C":
            return True
        if reply[:1] != b"A":
            raise RuntimeError(f"not acquired: {reply!r}")
        await effect()
        (stored,) = await self._scripts.complete([(record, nonce, reply[1:], RESULT)])
        if not stored:
            raise RuntimeError("the lease was lost")
        return False

    async def close(self) -> None:
        await self._scripts.close()
