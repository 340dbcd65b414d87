"""The PostgreSQL store for callers that block: the records' plans, on a pool of whichever driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State
from retryproof.sql.plan import Plan
from retryproof.sql.postgres import records
from retryproof.stores.base import Batch, Capabilities, Reaped

T = TypeVar("T")

CAPABILITIES = Capabilities(name="postgresql", max_batch=256, transactions=True, concurrent=True)


class Pool(Protocol):
    """Connections that block."""

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan before a deadline, twice where a connection was lost."""

    def close(self) -> None:
        """Close the connections."""


class PostgresStore:
    """Records in PostgreSQL. table: of the operations, as it stands in SQL."""

    capabilities = CAPABILITIES

    def __init__(self, pool: Pool, table: str) -> None:
        self._pool = pool
        self._table = self.table = table

    def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        return self._pool.perform(lambda: records.claim_plan(claims, self._table))

    def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        return self._pool.perform(lambda: records.settle_plan(commands, self._table))

    def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Give each operation back."""
        return self._pool.perform(lambda: records.release_plan(commands, self._table))

    def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return self._pool.perform(lambda: records.renew_plan(commands, self._table))

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Keep each value under its name."""
        return self._pool.perform(lambda: records.checkpoint_plan(commands, self._table))

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands."""
        return self._pool.perform(lambda: records.get_plan(ids, self._table))

    def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of records in the order of their ids, without results and checkpoints."""
        return self._pool.perform(
            lambda: records.scan_plan(
                prefix=prefix, state=state, tenant=tenant, after=after, limit=limit, table=self._table
            )
        )

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Forget each record, unless its lease is live or its row is locked."""
        return self._pool.perform(lambda: records.evict_plan(ids, self._table))

    def unmark(self, ids: Sequence[bytes]) -> None:
        """Remove the markers that callers' transactions left, of operations that somebody settled (T1)."""
        self._pool.perform(lambda: records.unmark_plan(ids, self._table))

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Remove records whose time is over."""
        return self._pool.perform(lambda: records.reap_plan(limit, told, self._table))

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan over other tables than the records'; as it may be run twice, it has to bear that."""
        return self._pool.perform(plan)

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its call ends."""
        self._pool.close()
