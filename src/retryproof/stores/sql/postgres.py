"""The PostgreSQL store for callers that block: the records' plans, on a pool of whichever driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from retryproof.sql.plan import Plan
from retryproof.sql.pool import Pool
from retryproof.sql.postgres.records import RecordPlans
from retryproof.stores.base import Capabilities
from retryproof.stores.forwarding import ForwardingStore

T = TypeVar("T")

CAPABILITIES = Capabilities(name="postgresql", max_batch=256, transactions=True, concurrent=True)


class PostgresStore(ForwardingStore):
    """Records in PostgreSQL. table: of the operations, as it stands in SQL."""

    capabilities = CAPABILITIES

    def __init__(self, pool: Pool, table: str) -> None:
        self._pool = pool
        self._calls = RecordPlans(table)
        self.table = table

    def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._pool.perform(lambda: call(*arguments, **options))

    def unmark(self, ids: Sequence[bytes]) -> None:
        """Remove the markers that callers' transactions left, of operations that somebody settled (T1)."""
        self._pool.perform(lambda: self._calls.unmark(ids))

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan over other tables than the records'; as it may be run twice, it has to bear that."""
        return self._pool.perform(plan)

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its call ends."""
        self._pool.close()
