"""The store protocol: what every store does, and what third parties implement.

A store keeps one record for each operation (`core.record.Record`), and changes it only through these calls.

- A call takes a batch without duplicate ids, of at most `capabilities.max_batch` items. It answers each item in order,
  with a reply, or with an exception for that item alone. If the call itself raises, the whole batch has failed, and the
  commands may have been done.
- The table in `core.record` decides what a claim finds.
- A fenced command changes nothing unless nonce and token are both current and the record is in progress. Otherwise the
  answer is `Lost`; but a command that is repeated after a lost reply gets `Done` (C3).
- If the store cannot read a record, that item fails with `errors.Unreadable`. Unlike after `StoreUnavailable`, a caller
  never runs without the store then (C21).

Rules for authors:

- Time is the store's own, read when the statement runs (C9).
- No call waits for a lock that somebody else holds for long: a claim of a locked record gets `Running` (T2).
- Every call ends within the store's time-out. The driver does not retry by itself.
- A bad item must not fail the others.
- A blocking or an async store is enough: a blocking store serves async callers through one thread.
- A store need not be safe for concurrent calls of the same method from several threads, unless
`capabilities.concurrent`
  says so; the opened store (`stores.opened`) makes sure of it.

`retryproof.testing.StoreConformance` and `AsyncStoreConformance` check all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from retryproof.core.batch import Batch, Reaped
from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State

__all__ = ["AsyncStore", "Batch", "Capabilities", "DatabaseEngine", "HasCommitGroup", "HasKeeper", "Reaped", "Store"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store can do, and its limits.

    name: for events and messages, like "redis".
    max_batch: how many items a call may have.
    max_result: how many bytes a result may have, or None if the store has no limit of its own.
    native_ttl: settled records disappear by themselves at the end of their retention.
    transactions: completing can be part of the caller's own transaction.
    clock: whose clock counts, for people: "server", "host".
    blocking: a call may block its thread. A store that never blocks is called from the event loop itself.
    concurrent: calls may come from several threads at once. Otherwise they come one at a time.
    batches_in_flight: how many batches of one kind an async store gets at a time. An engine that takes a batch in one
        statement is fastest with one; an engine that takes it item by item needs more. No two have the same id.
    """

    name: str
    max_batch: int = 256
    max_result: int | None = None
    native_ttl: bool = False
    transactions: bool = False
    clock: str = "server"
    blocking: bool = True
    concurrent: bool = False
    batches_in_flight: int = 1


@runtime_checkable
class Store(Protocol):
    """A store that blocks its caller."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""

    def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""

    def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result; retention starts."""

    def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Release each operation; keep its row, token and checkpoints."""

    def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease; never shorten one."""

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Store each value under its name."""

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it is now, with the store's time in `read_at`; None for an expired one."""

    def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of unexpired records in the order of their ids, after the id `after`; for operators, not for speed.

        An empty page is the end. Results may be left out.
        """

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Delete each record, unless its lease is live; return whether it is gone."""

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Delete settled records past their retention. Find records without an outcome and without a live lease that
        are past their unsettled retention; these are not deleted yet. Both together are at most `limit`.

        told: unsettled records that an earlier call returned, and whose end was reported since. Each is deleted if its
            nonce and token are unchanged and its time is still over. With a limit of 0, nothing else is done.
        It never blocks claims. Any number of processes may do it; then an end may be reported twice, but never missed.
        """

    def close(self) -> None:
        """Close connections that the store made. Called once; not after a fork."""


@runtime_checkable
class AsyncStore(Protocol):
    """A store for one event loop; the contract is Store's."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]: ...

    async def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]: ...

    async def release(self, commands: Sequence[Release]) -> Batch[FenceReply]: ...

    async def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]: ...

    async def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]: ...

    async def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]: ...

    async def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]: ...

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]: ...

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped: ...

    async def aclose(self) -> None: ...


@runtime_checkable
class HasKeeper(Protocol):
    """An async store that can renew from another thread, so that a blocked event loop loses no lease (C6)."""

    def keeper(self) -> Store:
        """A blocking store over the same records with its own connection; it is made, used and closed in one thread.

        `renew`, `complete`, `release`, `get` and `close` are called.
        """


@runtime_checkable
class HasCommitGroup(Protocol):
    """A store that can commit calls of several kinds together."""

    def commit_group(self, calls: Callable[[], T]) -> T:
        """Make calls of this store that are one commit; a failure among them fails them all.

        A function and no context manager: an interruption may come where that is entered or left.
        """


class DatabaseEngine(Protocol):
    """SQLAlchemy's Engine or AsyncEngine, which stands for the store in its database."""

    @property
    def dialect(self) -> Any: ...

    @property
    def url(self) -> Any: ...

    @property
    def pool(self) -> Any: ...
