"""The PostgreSQL store on asyncpg, for one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.errors import ConfigurationError
from retryproof.core.record import Record, State
from retryproof.sql.plan import Plan
from retryproof.sql.postgres import records
from retryproof.sql.postgres.asyncpg import AsyncpgPool
from retryproof.sql.postgres.statements import TABLE
from retryproof.sql.postgres.url import TIMEOUT, Target, check_statement, parse
from retryproof.stores.base import Batch, Reaped, Store
from retryproof.stores.sql.postgres import CAPABILITIES, PostgresStore

if TYPE_CHECKING:
    from retryproof.sql.postgres.asyncpg import Pool

T = TypeVar("T")


def from_url(url: str, *, timeout: float = TIMEOUT) -> AsyncpgStore:
    """The store of a URL."""
    return AsyncpgStore(url, timeout=timeout)


class AsyncpgStore:
    """Records in PostgreSQL for one event loop, over a few connections of its own or a pool of the caller's.

    target: `postgresql://user@host/database` with the options of `PsycopgStore`, or an asyncpg pool, which stays the
    caller's to close. keeper_url: beside a pool, where the renewer's own connection goes. timeout: seconds for each
    call, connecting included.
    """

    capabilities = CAPABILITIES

    def __init__(self, target: str | Pool, *, keeper_url: str | None = None, timeout: float = TIMEOUT) -> None:
        self._url = target if isinstance(target, str) else keeper_url
        self._timeout = timeout
        parsed = parse(self._url) if self._url else None
        self._table = self.table = parsed.table if parsed else TABLE
        if isinstance(target, str):
            self._pool = _own_pool(parse(target), timeout)
        else:
            self._pool = AsyncpgPool(target, timeout, parsed.check if parsed else check_statement())

    async def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        return await self._pool.perform(lambda: records.claim_plan(claims, self._table))

    async def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        return await self._pool.perform(lambda: records.settle_plan(commands, self._table))

    async def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Give each operation back."""
        return await self._pool.perform(lambda: records.release_plan(commands, self._table))

    async def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return await self._pool.perform(lambda: records.renew_plan(commands, self._table))

    async def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Keep each value under its name."""
        return await self._pool.perform(lambda: records.checkpoint_plan(commands, self._table))

    async def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands."""
        return await self._pool.perform(lambda: records.get_plan(ids, self._table))

    async def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of records in the order of their ids, without results and checkpoints."""
        return await self._pool.perform(
            lambda: records.scan_plan(
                prefix=prefix, state=state, tenant=tenant, after=after, limit=limit, table=self._table
            )
        )

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Forget each record, unless its lease is live or its row is locked."""
        return await self._pool.perform(lambda: records.evict_plan(ids, self._table))

    async def unmark(self, ids: Sequence[bytes]) -> None:
        """Remove the markers that callers' transactions left, of operations that somebody settled (T1)."""
        await self._pool.perform(lambda: records.unmark_plan(ids, self._table))

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Remove records whose time is over."""
        return await self._pool.perform(lambda: records.reap_plan(limit, told, self._table))

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan over other tables than the records'; as it may be run twice, it has to bear that."""
        return await self._pool.perform(plan)

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed when its call ends. A caller's pool stays open."""
        await self._pool.aclose()

    def keeper(self) -> Store:
        """A blocking store over the same records with a connection of its own: on psycopg, or else on asyncpg."""
        if self._url is None:
            raise ConfigurationError(
                "AsyncpgStore(pool) renews over a connection of its own; give its URL: "
                "AsyncpgStore(pool, keeper_url='postgresql://…')"
            )
        try:
            from retryproof.stores.sql.psycopg import PsycopgStore
        except ModuleNotFoundError:
            return PostgresStore(_BlockingPool(parse(self._url), self._timeout), self._table)
        return PsycopgStore(self._url, timeout=self._timeout)


def _own_pool(target: Target, timeout: float) -> AsyncpgPool:
    return AsyncpgPool(target, timeout, target.check)


class _BlockingPool:
    """A pool for a thread that blocks, on an event loop of its own: for renewing where psycopg is not installed."""

    def __init__(self, target: Target, timeout: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._pool = _own_pool(target, timeout)

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        return self._loop.run_until_complete(self._pool.perform(plan))

    def close(self) -> None:
        self._loop.run_until_complete(self._pool.aclose())
        self._loop.close()
