"""A request's body, read once and given again: small ones in memory, large ones in unlinked files (H7).

A body larger than SPOOL_FROM goes to a temporary file without a name that only this user can read. All bodies that come
in several messages may have BUDGET bytes together in a process, and those of one caller SHARE. So many uploads fill
neither memory nor disk, and one caller leaves room for the others. A body that stalls is given up.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from threading import Lock
from typing import BinaryIO, cast

SPOOL_FROM = 1024 * 1024
LIMIT = 1024 * 1024 * 1024
SHARE = LIMIT // 4
SLOWEST = 16 * 1024
"""The lowest average rate of a body, in bytes a second, after its first seconds."""
CHUNK = 64 * 1024


class OverBudget(Exception):
    """The process or the caller has reached its limit, or the disk is full; a later request may succeed."""


class Budget:
    """Bytes of bodies that may be held at once in this process, over all its threads and loops."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._held: dict[object, int] = {}
        self._lock = Lock()
        self._dropped: deque[tuple[int, object]] = deque()

    def take(self, size: int, owner: object = None, share: int = 0) -> None:
        """Reserve bytes, of which this owner may hold `share`; without an owner, any. Raises OverBudget."""
        self._give_dropped()
        with self._lock:
            held = 0 if owner is None else self._held.get(owner, 0) + size
            if size > self._left or held > share:
                raise OverBudget
            self._left -= size
            if held:
                self._held[owner] = held

    def give(self, size: int, owner: object = None) -> None:
        """Return reserved bytes."""
        with self._lock:
            self._left += size
            if owner is not None:
                self._held[owner] -= size
                if not self._held[owner]:
                    del self._held[owner]

    def give_later(self, size: int, owner: object) -> None:
        """Return bytes from a collection of garbage, which may come while this thread holds the lock."""
        self._dropped.append((size, owner))

    def _give_dropped(self) -> None:
        while self._dropped:
            with suppress(IndexError):  # another thread was first
                self.give(*self._dropped.popleft())


BUDGET = Budget(LIMIT)


def deadline(began: float, now: float, size: int, patience: float) -> float:
    """When the next part of a body must have come, of which `size` bytes have: it neither stalls nor drips."""
    return min(now, began + size / SLOWEST) + patience


class Body:
    """Takes a body chunk by chunk; its bytes can be read several times.

    owner: whose share of the budget it counts towards, None for none. share: bytes.
    """

    __slots__ = ("_budget", "_chunks", "_file", "_owner", "_share", "_taken", "size")

    def __init__(self, budget: Budget = BUDGET, owner: object = None, share: int = SHARE) -> None:
        self.size = 0
        self._chunks: list[bytes] = []
        self._file: BinaryIO | None = None
        self._taken = 0
        self._budget = budget
        self._owner = owner
        self._share = share

    def append(self, chunk: bytes) -> None:
        """Take the next bytes; raises OverBudget."""
        self._budget.take(len(chunk), self._owner, self._share)
        self._taken += len(chunk)
        self.size += len(chunk)
        if self._file is not None:
            self._spool(chunk)
        elif self.size > SPOOL_FROM:
            self._file = _open_file()
            self._spool(b"".join([*self._chunks, chunk]))
            self._chunks = []
        else:
            self._chunks.append(chunk)

    def _spool(self, chunk: bytes) -> None:
        try:
            cast("BinaryIO", self._file).write(chunk)
        except OSError as error:  # the disk is full
            raise OverBudget from error

    def read(self) -> bytes:
        """All of it, in memory."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The bytes in order, at least one chunk, which may be empty."""
        if self._file is None:
            yield b"".join(self._chunks)
            return
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            yield chunk

    def file(self) -> BinaryIO:
        """A file that holds the bytes, at its beginning, until `close`."""
        if self._file is None:
            return BytesIO(b"".join(self._chunks))
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Free the bytes, and the file if there is one. May be called twice."""
        taken, self._taken = self._taken, 0
        if taken:
            self._budget.give(taken, self._owner)
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # what a full disk has not taken
                file.close()
        self._chunks = []

    def __del__(self) -> None:
        """Nobody has closed it: its bytes must not count for ever."""
        if self._taken:
            self._budget.give_later(self._taken, self._owner)


def _open_file() -> BinaryIO:
    try:
        return cast("BinaryIO", tempfile.TemporaryFile())  # closed by `close`
    except OSError as error:  # no room for files, or for descriptors
        raise OverBudget from error
