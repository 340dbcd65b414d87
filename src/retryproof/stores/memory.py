"""The store in this process's memory: for tests, for development, and for work that ends with the process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock

from retryproof.clock import wall_clock
from retryproof.core import record as table
from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.record import Record, State
from retryproof.stores.base import Capabilities, Reaped

__all__ = ["MemoryStore", "wall_clock"]


class MemoryStore:
    """Every record in a dictionary under one lock; safe for threads and tasks, never blocks for long.

    clock: microseconds since the epoch; tests inject one.
    Each claim also deletes a few records past their retention, so that memory stays bounded.
    """

    capabilities = Capabilities(name="memory", max_batch=1_024, clock="host", blocking=False, concurrent=True)

    def __init__(self, clock: Callable[[], int] = wall_clock) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, Record] = OrderedDict()  # oldest write first, for the sweep
        self._lock = Lock()

    def claim(self, claims: Sequence[Claim]) -> Sequence[ClaimReply]:
        """Take each operation or say why not."""
        with self._lock:
            now = self._clock()
            replies = []
            for claim in claims:
                self._sweep(now, 2)
                written, reply = table.decide(self._records.get(claim.id), claim, now)
                self._write(written)
                replies.append(reply)
            return replies

    def complete(self, commands: Sequence[Complete]) -> Sequence[FenceReply]:
        """Settle each operation with its result."""
        return self._settle(commands)

    def release(self, commands: Sequence[Release]) -> Sequence[FenceReply]:
        """Release each operation."""
        return self._settle(commands)

    def _settle(self, commands: Sequence[Complete] | Sequence[Release]) -> Sequence[FenceReply]:
        with self._lock:
            now = self._clock()
            return [self._reply(*table.settle(self._records.get(command.id), command, now)) for command in commands]

    def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
        """Extend each lease."""
        with self._lock:
            now = self._clock()
            return [self._reply(*table.renew(self._records.get(command.id), command, now)) for command in commands]

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Sequence[FenceReply]:
        """Store each value under its name."""
        with self._lock:
            return [self._reply(*table.checkpoint(self._records.get(command.id), command)) for command in commands]

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it is now."""
        with self._lock:
            now = self._clock()
            return [self._read(self._records.get(id), now) for id in ids]

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
        with self._lock:
            now = self._clock()
            found = [
                record
                for id, record in self._records.items()
                if id > after
                and id.startswith(prefix)
                and state in (None, record.state)
                and tenant in (None, record.tenant)
                and not record.expired(now)
            ]
        page = sorted(found, key=lambda record: record.id)[:limit]
        return [replace(record, read_at=now) for record in page]

    def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        """Delete each record, unless its lease is live."""
        with self._lock:
            now = self._clock()
            return [self._evict(id, now) for id in ids]

    def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        """Delete settled records past their time, find unsettled ones, and delete those in `told`."""
        with self._lock:
            now = self._clock()
            ended = [record.id for record in told if self._end(record, now)]
            over = [record for record in self._records.values() if record.over(now)]
            settled = [record for record in over[:limit] if record.settled]
            for record in settled:
                del self._records[record.id]
        unsettled = [replace(record, read_at=now) for record in over[:limit] if not record.settled]
        return Reaped(len(settled), unsettled, more=len(over) > limit, ended=ended)

    def close(self) -> None:
        """Do nothing: a named store outlives the engine that opened it."""

    def _evict(self, id: bytes, now: int) -> bool:
        record = self._records.get(id)
        if record is not None and record.live(now):
            return False
        self._records.pop(id, None)
        return True

    def _end(self, told: Record, now: int) -> bool:
        record = self._records.get(told.id)
        if record is None or (record.nonce, record.token) != (told.nonce, told.token) or not record.over(now):
            return False
        del self._records[told.id]
        return True

    def _write(self, record: Record | None) -> None:
        if record is not None:
            self._records[record.id] = record
            self._records.move_to_end(record.id)

    def _reply(self, written: Record | None, reply: FenceReply) -> FenceReply:
        self._write(written)
        return reply

    def _read(self, record: Record | None, now: int) -> Record | None:
        if record is None or record.expired(now):
            return None
        return replace(record, read_at=now)

    def _sweep(self, now: int, most: int) -> None:
        """Check the oldest records; since retentions differ, one whose time is not over goes to the end."""
        for _ in range(min(most, len(self._records))):
            id, record = next(iter(self._records.items()))
            if not record.expired(now):
                self._records.move_to_end(id)
                return
            del self._records[id]
