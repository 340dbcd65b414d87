"""The store protocol: what every store does, and what third parties implement.

A store keeps one record for each operation (`core.record.Record`) and changes it only through these calls. Each takes
a batch that holds no id twice and answers each item in order, with a reply or with an exception for that item alone;
an exception that is raised fails the whole batch, and what was asked may have been done. A batch is bounded by
`capabilities.max_batch`. What a claim finds is decided by the table in `core.record`; fenced commands change nothing
unless nonce and token are both current and the record is in progress, and say `Lost` then, except that a command
repeated after a lost reply says `Done` (C3). A record that the store cannot read fails its item with
`errors.Unreadable`; unlike `StoreUnavailable` it never lets a caller run without the store (C21).

Rules for authors: time is the store's own, read at the moment of the statement (C9). Nothing waits for a lock that
somebody else holds for long: what is locked is answered `Running` (T2). Every call ends within the store's time-out.
Drivers' own retries are off. One bad item must not fail its neighbours. `retryproof.testing.StoreConformance` and
`AsyncStoreConformance` check all of this. One colour is enough: a sync store serves async callers through one thread.

A store need not be safe for concurrent calls of the same method from several threads unless it says so in
`capabilities.concurrent`; the opened store (`stores.opened`) sees to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from retryproof.core.batch import Batch, Reaped
from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State

__all__ = ["AsyncStore", "Batch", "Capabilities", "DatabaseEngine", "HasCommitGroup", "HasKeeper", "Reaped", "Store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store can do and how much it can hold.

    name: for events and messages, like "redis".
    max_batch: items a call may have.
    max_result: bytes a result may have, or None for no limit of the store's own.
    native_ttl: settled records vanish by themselves at the end of their retention.
    transactions: completion can be part of the caller's own transaction.
    clock: whose clock counts, for people: "server", "host".
    blocking: a call may block its thread; one that never does is called from the event loop itself.
    concurrent: calls may come from several threads at once. Otherwise they come one at a time.
    batches_in_flight: batches of one kind that an async store is sent at a time. An engine that takes a batch in one
        statement is fastest with one; one that takes it item by item wants more. No two hold the same id.
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
        """Give each operation back, keeping its row, token and checkpoints."""

    def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease; never shorten one."""

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Keep each value under its name."""

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands, expired ones as None, with `read_at` the store's time."""

    def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page of unexpired records in the order of their ids, from behind `after`; for operators, not for speed.

        An empty page is the end. Results may be left out.
        """

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Forget each record, unless its lease is live; whether it is gone."""

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Remove records that are settled and past their retention, and find those that have no outcome, no live lease,
        and are past their unsettled retention: these stay. Both together are at most `limit`.

        told: unsettled records that an earlier call handed back and whose end was told since. Each is removed if its
            nonce and token are unchanged and its time is still over. A limit of 0 does no more than that.
        Never blocks claims; any number of processes may do it, and then an end may be told twice, but never not at all.
        """

    def close(self) -> None:
        """Let go of connections that the store made. Called once; not after a fork."""


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
        """A blocking store over the same records with a connection of its own; made, used and closed in one thread.

        `renew`, `complete`, `release`, `get` and `close` are called.
        """


@runtime_checkable
class HasCommitGroup(Protocol):
    """A store that can commit calls of several kinds together."""

    def commit_group(self) -> AbstractContextManager[None]:
        """All calls inside are one commit; a failure inside fails them all."""


class DatabaseEngine(Protocol):
    """SQLAlchemy's Engine or AsyncEngine, which stands for the store in its database."""

    @property
    def dialect(self) -> Any: ...

    @property
    def url(self) -> Any: ...

    @property
    def pool(self) -> Any: ...
