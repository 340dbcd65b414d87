"""A store that makes its nine calls in one way: with plans that a driver runs, or with methods of another store.

A driver's store defines what it calls (`_calls`, an object with a function for each call of the protocol) and how
(`_make`). Nothing else differs between a plan on a connection, a blocking store in a thread, and an async store that is
called through its event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State
from retryproof.stores.base import Batch, Reaped

T = TypeVar("T")


class ForwardingStore(ABC):
    """The calls of a blocking store, each made by `_make`."""

    _calls: Any

    @abstractmethod
    def _make(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Make one call, and give its result."""

    def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        return self._make(self._calls.claim, claims)

    def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        return self._make(self._calls.complete, commands)

    def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Release each operation."""
        return self._make(self._calls.release, commands)

    def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return self._make(self._calls.renew, commands)

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Store each value under its name."""
        return self._make(self._calls.checkpoint, commands)

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it is now."""
        return self._make(self._calls.get, ids)

    def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of records in the order of their ids."""
        wanted = {"prefix": prefix, "state": state, "tenant": tenant, "after": after, "limit": limit}
        return self._make(self._calls.scan, **wanted)

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Delete each record, unless its lease is live."""
        return self._make(self._calls.evict, ids)

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Delete settled records past their time, find unsettled ones, and delete those in `told`."""
        reaped: Reaped = self._make(self._calls.reap, limit, told)
        return reaped


class AsyncForwardingStore(ABC):
    """The calls of a store that is awaited, each made by `_make`."""

    _calls: Any

    @abstractmethod
    async def _make(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Make one call, and give its result."""

    async def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        return await self._make(self._calls.claim, claims)

    async def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        return await self._make(self._calls.complete, commands)

    async def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Release each operation."""
        return await self._make(self._calls.release, commands)

    async def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return await self._make(self._calls.renew, commands)

    async def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Store each value under its name."""
        return await self._make(self._calls.checkpoint, commands)

    async def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it is now."""
        return await self._make(self._calls.get, ids)

    async def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of records in the order of their ids."""
        wanted = {"prefix": prefix, "state": state, "tenant": tenant, "after": after, "limit": limit}
        return await self._make(self._calls.scan, **wanted)

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Delete each record, unless its lease is live."""
        return await self._make(self._calls.evict, ids)

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Delete settled records past their time, find unsettled ones, and delete those in `told`."""
        reaped: Reaped = await self._make(self._calls.reap, limit, told)
        return reaped
