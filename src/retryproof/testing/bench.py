"""What a store's cases are written with: the same functions for blocking and for async stores.

A case is written once, as a coroutine. For an async store it is awaited. For a blocking store it never suspends, so
`run_blocking` runs it to its end without an event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from retryproof.core.commands import (
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Release,
    Renew,
    StoreCommand,
)
from retryproof.core.record import Record
from retryproof.stores.base import AsyncStore, Capabilities, Reaped, Store

T = TypeVar("T")
BenchCall = Callable[["Bench"], Awaitable[T]]

LONG = 3_600.0
"""Seconds that are longer than any test."""
SHORT = 0.02
"""Seconds that are over at the next look; no case needs them to last longer."""
PATIENCE = 20.0
"""Seconds to wait for an event that must happen."""
LOOK_AGAIN = 0.003
"""Seconds between two looks at the store's clock."""


class Bench(ABC):
    """One store under test, and optionally a rival over the same records.

    advance: moves the store's clock by a number of seconds; without it, the bench waits until the clock has moved.
    """

    def __init__(self, capabilities: Capabilities, advance: Callable[[float], None] | None) -> None:
        self.capabilities = capabilities
        self._advance = advance

    # What differs between blocking and async stores

    @abstractmethod
    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the store."""

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Let time pass."""

    @abstractmethod
    async def together(self, calls: Sequence[BenchCall[T]]) -> list[T]:
        """Make all calls at once, from threads or tasks, half on the store and half on its rival."""

    # Commands

    async def one(self, command: StoreCommand) -> Any:
        """The reply to a batch of one: to a claim or a fenced command."""
        (reply,) = await self.batch([command])
        return reply

    async def batch(self, commands: Sequence[StoreCommand]) -> list[Any]:
        """The replies to a batch of one kind, in order; a reply that is an exception is returned, not raised."""
        replies = list(await self.call(_METHODS[type(commands[0])], commands))
        assert len(replies) == len(commands), "a store answers each item of a batch, in order"
        return replies

    async def claim(self, claim: Claim) -> ClaimReply:
        """The reply to a claim."""
        reply: ClaimReply = await self.one(claim)
        return reply

    async def fenced(self, command: Complete | Release | Renew | Checkpoint) -> FenceReply:
        """The reply to a fenced command."""
        reply: FenceReply = await self.one(command)
        return reply

    async def get(self, id: bytes) -> Record | None:
        """The record as it is now, or None."""
        found: Sequence[Record | None] = await self.call("get", [id])
        assert len(found) == 1, "get answers each id, in order"
        return found[0]

    async def record(self, id: bytes) -> Record:
        """The record, which must exist."""
        record = await self.get(id)
        assert record is not None, "the record is gone"
        return record

    async def frozen(self, id: bytes) -> Record:
        """The record without the time of reading, to compare it with an earlier one."""
        return replace(await self.record(id), read_at=0)

    async def evict(self, id: bytes) -> bool:
        """Whether the record is gone."""
        (gone,) = await self.call("evict", [id])
        assert isinstance(gone, bool)
        return gone

    async def reap(self) -> Reaped:
        """Do all passes of reaping, and in each report and end what it found."""
        settled = 0
        unsettled: list[Record] = []
        ended: list[bytes] = []
        while True:
            reaped: Reaped = await self.call("reap")
            settled += reaped.settled
            unsettled += reaped.unsettled
            ended += (await self.end(reaped.unsettled)).ended
            if not reaped.more:
                return Reaped(settled, unsettled, ended=ended)

    async def end(self, told: Sequence[Record]) -> Reaped:
        """End unsettled records whose end was reported."""
        reaped: Reaped = await self.call("reap", 0, told)
        return reaped

    # Situations

    async def held(self, claim: Claim) -> Acquired:
        """Claim an operation that is free."""
        reply = await self.claim(claim)
        assert isinstance(reply, Acquired), reply
        return reply

    async def dead(self, claim: Claim) -> Acquired:
        """Claim, and leave the record in progress until its lease is over."""
        acquired = await self.held(claim)
        await self.outlive(claim.id)
        return acquired

    async def held_again(self, claim: Claim) -> Acquired:
        """Take an operation over from an attempt that died."""
        await self.outlive(claim.id)
        return await self.held(again(claim))

    async def outlive(self, id: bytes) -> Record:
        """Wait until the record's lease is over by the store's clock."""
        return await self.wait_past(id, lambda record: record.lease_until)

    async def wait_past(self, id: bytes, moment: Callable[[Record], int]) -> Record:
        """Wait until a time of the record has passed, by the store's own clock."""
        record = await self.record(id)
        if self._advance is not None:
            self._advance(max(0.0, (moment(record) - record.read_at) / 1_000_000))
            return await self.record(id)
        end = time.monotonic() + PATIENCE
        while record.read_at < moment(record):
            assert time.monotonic() < end, "the store's clock stands still"
            await self.pause(LOOK_AGAIN)
            record = await self.record(id)
        return record

    async def wait_gone(self, id: bytes) -> None:
        """Wait until a settled record's retention is over."""
        end = time.monotonic() + PATIENCE
        while (record := await self.get(id)) is not None:
            if self._advance is not None:
                self._advance(max(0.0, (record.expires_at - record.read_at) / 1_000_000))
                continue
            assert time.monotonic() < end, "the record is still there"
            await self.pause(LOOK_AGAIN)


_METHODS: dict[type[Any], str] = {
    Claim: "claim",
    Complete: "complete",
    Release: "release",
    Renew: "renew",
    Checkpoint: "checkpoint",
}


class BlockingBench(Bench):
    """For a blocking store; rivals are threads."""

    def __init__(
        self, store: Store, rival: Store | None = None, advance: Callable[[float], None] | None = None
    ) -> None:
        super().__init__(store.capabilities, advance)
        self._store = store
        self._rival = rival
        self._turn = nullcontext() if store.capabilities.concurrent else threading.Lock()

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        with self._turn:
            return getattr(self._store, method)(*arguments, **options)

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - there is no event loop here

    async def together(self, calls: Sequence[BenchCall[T]]) -> list[T]:
        stores = [self, self if self._rival is None else BlockingBench(self._rival, None, self._advance)]
        start = threading.Barrier(len(calls), timeout=PATIENCE)

        def run(number: int) -> T:
            start.wait()
            return run_blocking(calls[number](stores[number % 2]))

        with ThreadPoolExecutor(len(calls)) as threads:
            return list(threads.map(run, range(len(calls))))


class AsyncBench(Bench):
    """For an async store; rivals are tasks."""

    def __init__(
        self, store: AsyncStore, rival: AsyncStore | None = None, advance: Callable[[float], None] | None = None
    ) -> None:
        super().__init__(store.capabilities, advance)
        self._store = store
        self._rival = rival
        self._turn = nullcontext() if store.capabilities.concurrent else asyncio.Lock()

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        async with self._turn:
            return await getattr(self._store, method)(*arguments, **options)

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def together(self, calls: Sequence[BenchCall[T]]) -> list[T]:
        stores = [self, self if self._rival is None else AsyncBench(self._rival, None, self._advance)]
        return list(await asyncio.gather(*(call(stores[number % 2]) for number, call in enumerate(calls))))


def run_blocking(work: Awaitable[T]) -> T:
    """Run a coroutine that never suspends."""
    assert isinstance(work, Coroutine)
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("a case over a blocking store awaited something that was not ready")


def new_claim(**changes: Any) -> Claim:
    """A claim for a new operation, with a lease and retention of LONG."""
    claim = Claim(
        id=secrets.token_bytes(32),
        fingerprint=b"\1" + secrets.token_bytes(32),
        nonce=secrets.token_bytes(16),
        lease=LONG,
        retention=LONG,
        unsettled_retention=LONG,
    )
    return replace(claim, **changes)


def again(claim: Claim, **changes: Any) -> Claim:
    """Another attempt at the same operation; its lease and retention are LONG."""
    later = replace(claim, nonce=secrets.token_bytes(16), lease=LONG, retention=LONG, unsettled_retention=LONG)
    return replace(later, **changes)


def other_input(claim: Claim, **changes: Any) -> Claim:
    """The same key, used again with other input."""
    return again(claim, fingerprint=b"\1" + secrets.token_bytes(32), **changes)


def complete(claim: Claim, acquired: Acquired, result: bytes | None = b"result") -> Complete:
    """The command that settles a held claim."""
    return Complete(claim.id, claim.nonce, acquired.token, result)


def release(claim: Claim, acquired: Acquired) -> Release:
    """The command that releases a held claim."""
    return Release(claim.id, claim.nonce, acquired.token)


def renew(claim: Claim, acquired: Acquired, lease: float = LONG, *, alone: bool = True) -> Renew:
    """The command that extends a held claim."""
    return Renew(claim.id, claim.nonce, acquired.token, lease, alone)


def checkpoint(claim: Claim, acquired: Acquired, name: str = "step", value: bytes = b"value") -> Checkpoint:
    """The command that stores a step's result."""
    return Checkpoint(claim.id, claim.nonce, acquired.token, name, value)
