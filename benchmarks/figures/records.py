"""What a batch of operations takes of the Redis server itself, and how much memory a record has there."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from typing import Protocol, cast

from redis.asyncio import Redis

from benchmarks.ceilings.redis import FINGERPRINT, RedisScripts
from benchmarks.measure import Figure, OutOfTime, Pace, Run, Sample, interleave
from benchmarks.services import Services
from retryproof.core.commands import Acquired, Claim, Complete, Finished
from retryproof.stores.redis import AsyncRedisStore

BATCH = 64
RESULT = b"r" * 120


class RecordSubject(Protocol):
    """One way to keep records: a batch is claimed and completed, or found completed."""

    name: str

    def key(self, id: bytes) -> bytes: ...

    async def open(self) -> None: ...

    async def finish(self, ids: Sequence[bytes]) -> None: ...

    async def replay(self, ids: Sequence[bytes]) -> None: ...

    async def close(self) -> None: ...


class BareScripts:
    """The ceiling's two scripts."""

    name = "bare script"

    def __init__(self, url: str) -> None:
        self._scripts = RedisScripts(url, connections=1)

    def key(self, id: bytes) -> bytes:
        return id

    async def open(self) -> None:
        await self._scripts.open()

    async def finish(self, ids: Sequence[bytes]) -> None:
        nonces = [os.urandom(16) for _ in ids]
        replies = await self._scripts.claim([(id, FINGERPRINT, nonce) for id, nonce in zip(ids, nonces, strict=True)])
        taken = zip(ids, nonces, replies, strict=True)
        stored = await self._scripts.complete([(id, nonce, reply[1:], RESULT) for id, nonce, reply in taken])
        if not all(stored):
            raise RuntimeError("not stored")

    async def replay(self, ids: Sequence[bytes]) -> None:
        replies = await self._scripts.claim([(id, FINGERPRINT, os.urandom(16)) for id in ids])
        if not all(reply[:1] == b"C" for reply in replies):
            raise RuntimeError("not replayed")

    async def close(self) -> None:
        await self._scripts.close()


class OurStore:
    """The store, without engine and lanes."""

    name = "ours"

    def __init__(self, url: str) -> None:
        self._store = AsyncRedisStore(url)

    def key(self, id: bytes) -> bytes:
        return b"retryproof:" + id.hex().encode()

    async def open(self) -> None:
        """It connects at the first call."""

    async def finish(self, ids: Sequence[bytes]) -> None:
        claims = [_claim(id) for id in ids]
        taken = zip(claims, await self._store.claim(claims), strict=True)
        commands = [Complete(one.id, one.nonce, cast("Acquired", reply).token, RESULT) for one, reply in taken]
        await self._store.complete(commands)

    async def replay(self, ids: Sequence[bytes]) -> None:
        replies = await self._store.claim([_claim(id) for id in ids])
        if not all(isinstance(reply, Finished) for reply in replies):
            raise RuntimeError("not replayed")

    async def close(self) -> None:
        await self._store.aclose()


def _claim(id: bytes) -> Claim:
    return Claim(id, FINGERPRINT, os.urandom(16), lease=10.0, retention=86_400.0, unsettled_retention=2_592_000.0)


async def figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    """New operations and replays, each with what its records take of the server's memory."""
    url = services.url("redis")
    subjects: list[RecordSubject] = [BareScripts(url), *([OurStore(url)] if ours else [])]
    method = f"batches of {BATCH}, one after another, result of {len(RESULT)} bytes; all times are the server's own: "
    method += "by CPU its process (INFO cpu), per second its scripts alone (INFO commandstats)"
    client = Redis.from_url(url)
    known, taken = {}, []
    try:
        notes = []
        for subject in subjects:
            await subject.open()
            known[subject.name] = [secrets.token_bytes(32) for _ in range(BATCH)]
            notes.append(f"{subject.name}: {await bytes_a_record(client, subject, known[subject.name])} bytes a record")
        new: dict[str, Run] = {subject.name: measured(client, subject, None) for subject in subjects}
        replays: dict[str, Run] = {one.name: measured(client, one, known[one.name]) for one in subjects}
        for kind, runs in (("new", new), ("replay", replays)):
            taken.append(await interleave(f"redis server {kind}", method, runs, pace, tuple(notes)))
            notes.clear()
    except OutOfTime:
        pass
    finally:
        for subject in subjects:
            await subject.close()
        await client.aclose()
    return taken


async def bytes_a_record(client: Redis, subject: RecordSubject, ids: Sequence[bytes]) -> int:
    """Of one completed record with its key, as MEMORY USAGE counts."""
    await subject.finish(ids)
    return int(await client.memory_usage(subject.key(ids[0]), samples=0) or 0)


def measured(client: Redis, subject: RecordSubject, known: Sequence[bytes] | None) -> Run:
    """Batch after batch of new operations, or of those that are known."""

    async def run(seconds: float) -> Sample:
        operations, deadline = 0, time.perf_counter() + seconds
        scripts, process = await _server_seconds(client)
        while time.perf_counter() < deadline:
            if known is None:
                await subject.finish([secrets.token_bytes(32) for _ in range(BATCH)])
            else:
                await subject.replay(known)
            operations += BATCH
        scripts_after, process_after = await _server_seconds(client)
        return Sample(operations, scripts_after - scripts, process_after - process)

    return run


async def _server_seconds(client: Redis) -> tuple[float, float]:
    """Seconds that scripts have taken, and that the process has used of the processor."""
    statistics = await client.info("commandstats")
    scripts = sum(statistics.get(f"cmdstat_{name}", {"usec": 0})["usec"] for name in ("evalsha", "eval"))
    used = await client.info("cpu")
    return scripts / 1e6, used["used_cpu_user"] + used["used_cpu_sys"]
