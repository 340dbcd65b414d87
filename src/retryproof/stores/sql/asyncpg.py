"""The PostgreSQL store on asyncpg, for one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from retryproof.core.errors import ConfigurationError
from retryproof.sql.plan import Plan
from retryproof.sql.postgres.asyncpg import AsyncpgPool
from retryproof.sql.postgres.records import RecordPlans
from retryproof.sql.postgres.statements import TABLE
from retryproof.sql.postgres.url import TIMEOUT, PostgresTarget, check_statement, parse
from retryproof.stores.base import Store
from retryproof.stores.forwarding import AsyncForwardingStore
from retryproof.stores.sql.postgres import CAPABILITIES, PostgresStore

if TYPE_CHECKING:
    from retryproof.sql.postgres.asyncpg import Pool

T = TypeVar("T")


def from_url(url: str, *, timeout: float = TIMEOUT) -> AsyncpgStore:
    """The store of a URL."""
    return AsyncpgStore(url, timeout=timeout)


class AsyncpgStore(AsyncForwardingStore):
    """Records in PostgreSQL for one event loop, over a few connections of its own or a pool of the caller's.

    target: `postgresql://user@host/database` with the options of `PsycopgStore`, or what an engine leads to; or an
    asyncpg pool, which stays the caller's to close. keeper_url: beside a pool, where the renewer's own connection goes.
    timeout: seconds for each call, connecting included.
    """

    capabilities = CAPABILITIES

    def __init__(
        self, target: str | PostgresTarget | Pool, *, keeper_url: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self._timeout = timeout
        self._own: PostgresTarget | None = None
        if isinstance(target, PostgresTarget):
            self._own = target
        elif isinstance(target, str) or keeper_url:
            self._own = parse(target if isinstance(target, str) else keeper_url or "")
        self.table = self._own.table if self._own else TABLE
        self._calls = RecordPlans(self.table)
        if self._own and isinstance(target, str | PostgresTarget):
            self._pool = _own_pool(self._own, timeout)
        else:
            pool = cast("Pool", target)
            self._pool = AsyncpgPool(pool, timeout, self._own.check if self._own else check_statement())

    async def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await self._pool.perform(lambda: call(*arguments, **options))

    async def unmark(self, ids: Sequence[bytes]) -> None:
        """Remove the markers that callers' transactions left, of operations that somebody settled (T1)."""
        await self._pool.perform(lambda: self._calls.unmark(ids))

    async def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan over other tables than the records'; as it may be run twice, it has to bear that."""
        return await self._pool.perform(plan)

    async def aclose(self) -> None:
        """Close what is idle; what is in use is closed when its call ends. A caller's pool stays open."""
        await self._pool.aclose()

    def keeper(self) -> Store:
        """A blocking store over the same records with a connection of its own: on psycopg, or else on asyncpg."""
        if self._own is None:
            raise ConfigurationError(
                "AsyncpgStore(pool) renews over a connection of its own; give its URL: "
                "AsyncpgStore(pool, keeper_url='postgresql://…')"
            )
        if self._own.driver != "asyncpg":
            with contextlib.suppress(ModuleNotFoundError):
                from retryproof.stores.sql.psycopg import PsycopgStore

                return PsycopgStore(self._own, timeout=self._timeout)
        return PostgresStore(_BlockingPool(self._own, self._timeout), self.table)


def _own_pool(target: PostgresTarget, timeout: float) -> AsyncpgPool:
    return AsyncpgPool(target, timeout, target.check)


class _BlockingPool:
    """A pool for a thread that blocks, on an event loop of its own: for renewing where psycopg is not installed."""

    def __init__(self, target: PostgresTarget, timeout: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._pool = _own_pool(target, timeout)

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        return self._loop.run_until_complete(self._pool.perform(plan))

    def close(self) -> None:
        self._loop.run_until_complete(self._pool.aclose())
        self._loop.close()
