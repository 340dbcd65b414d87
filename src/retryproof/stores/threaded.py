"""A blocking store for async callers, through one thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State
from retryproof.stores.base import Batch, Reaped, Store

T = TypeVar("T")


class InThread:
    """An AsyncStore over a blocking one; calls are made one at a time in a thread of its own.

    An engine that is given it uses the blocking store beneath, with its batches.
    """

    def __init__(self, blocking: Store) -> None:
        self.blocking = blocking
        self.capabilities = blocking.capabilities
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retryproof-store")

    async def _call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        if self._process != os.getpid():  # forked, without the thread
            self._start()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **options))

    async def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        return await self._call(self.blocking.claim, claims)

    async def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        return await self._call(self.blocking.complete, commands)

    async def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Give each operation back."""
        return await self._call(self.blocking.release, commands)

    async def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return await self._call(self.blocking.renew, commands)

    async def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Keep each value under its name."""
        return await self._call(self.blocking.checkpoint, commands)

    async def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands."""
        return await self._call(self.blocking.get, ids)

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
        return await self._call(self.blocking.scan, prefix=prefix, state=state, tenant=tenant, after=after, limit=limit)

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Forget each record, unless its lease is live."""
        return await self._call(self.blocking.evict, ids)

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Remove records whose time is over."""
        return await self._call(self.blocking.reap, limit, told)

    async def aclose(self) -> None:
        """Close the store and end the thread."""
        await self._call(self.blocking.close)
        self._thread.shutdown(wait=False)
