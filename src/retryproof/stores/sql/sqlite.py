"""The store on SQLite: the records' plans on one file.

A replay only reads, beside any writer. What changes is written in one transaction for a whole batch, of every kind that
waits (group commit).

The table has a rowid and a unique index: with WITHOUT ROWID a claim costs half as much again, since large results then
sit in the tree that every claim descends. It has no other index: reaping reads the table beside the writers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from retryproof.clock import wall_clock
from retryproof.core.batch import ItemError
from retryproof.core.commands import DONE, Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State
from retryproof.sql.plan import Plan
from retryproof.sql.sqlite import records
from retryproof.sql.sqlite.file import SqliteFile
from retryproof.sql.sqlite.url import PATIENCE, TIMEOUT, SqliteTarget, parse
from retryproof.stores.base import Batch, Capabilities, Reaped

T = TypeVar("T")


def from_url(url: str, *, timeout: float = TIMEOUT) -> SqliteStore:
    """The store of a URL."""
    target = parse(url, timeout)
    return SqliteStore(target.path, timeout=target.timeout, patience=target.patience, synchronous=target.synchronous)


class SqliteStore:
    """Records in a SQLite file, which is made at the first call.

    path: a file's path, or ":memory:". timeout: seconds to wait for other writers.
    patience: how many seconds claims, completions, releases, renewals and checkpoints wait for one writer that stays.
    synchronous: with FULL, answered calls survive a crash of the machine; with NORMAL, only a crash of the process.
    clock: microseconds since the epoch; the host's, as SQLite's own is.
    Safe for threads, and over a fork of the process between two calls; ":memory:" is empty in the child.
    """

    capabilities = Capabilities(name="sqlite", max_batch=512, transactions=True, clock="host", concurrent=True)

    def __init__(
        self,
        path: str,
        *,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        synchronous: str = "FULL",
        clock: Callable[[], int] = wall_clock,
    ) -> None:
        self._file = SqliteFile(SqliteTarget(path, timeout, patience, synchronous.upper()))
        self.path = path
        self._clock = clock
        self._expects_new = True  # as the last claim was: one that is new need not be looked for

    def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        """Take each operation or say why not."""
        if len(claims) == 1 and self._expects_new:
            now = self._clock()
            if self._file.changes_one(records.insertion(claims[0], now)):
                return [records.inserted(claims[0], now)]
        with self._file.held:
            if self._file.is_writing:  # and nothing is gained by looking first
                return self._file.write_batch(claims, lambda: records.claim(claims, self._clock()))
            replies: list[ClaimReply | ItemError | None] = [*self._file.read(records.peek(claims, self._clock()))]
            left = [place for place, reply in enumerate(replies) if reply is None]
            self._expects_new = bool(left)
            if left:
                asked = [claims[place] for place in left]
                taken = self._file.write_batch(asked, lambda: records.claim(asked, self._clock()))
                for place, reply in zip(left, taken, strict=True):
                    replies[place] = reply
            return [reply for reply in replies if reply is not None]

    def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        """Settle each operation with its result."""
        if len(commands) == 1:
            statement = records.completion(commands[0], self._clock())
            if statement is not None and self._file.changes_one(statement):
                return [DONE]
        return self._file.write_batch(commands, lambda: records.complete(commands, self._clock()))

    def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        """Give each operation back."""
        return self._file.write_batch(commands, lambda: records.release(commands, self._clock()))

    def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        """Extend each lease."""
        return self._file.write_batch(commands, lambda: records.renew(commands, self._clock()))

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        """Keep each value under its name."""
        return self._file.write_batch(commands, lambda: records.checkpoint(commands))

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands."""
        with self._file.held:
            return self._file.read(records.get(ids, self._clock()))

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
        with self._file.held:
            return self._file.read(records.scan(prefix, state, tenant, after, limit, self._clock()))

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Forget each record, unless its lease is live."""
        return self._file.write(lambda: records.evict(ids, self._clock()))

    def unmark(self, ids: Sequence[bytes]) -> None:
        """Remove the markers that callers' transactions left, of operations that somebody settled (T1)."""
        self._file.write(lambda: records.unmark(ids))

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """End what was told, remove what is settled and over; what is over is found without the write lock."""
        ended = self._file.write(lambda: records.end(told, self._clock())) if told else []
        with self._file.held:
            settled, unsettled, more = (
                self._file.read(records.find_over(limit, self._clock())) if limit else ([], [], False)
            )
        removed = self._file.write(lambda: records.remove_over(settled, self._clock())) if settled else 0
        return Reaped(removed, unsettled, more, ended)

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan over other tables than the records', in one transaction that holds the write lock."""
        return self._file.write(plan)

    def commit_group(self, calls: Callable[[], T]) -> T:
        """Make calls of this store that are one commit."""
        return self._file.commit_group(calls)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
