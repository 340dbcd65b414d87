"""A request's body, read once and given again: small ones in memory, large ones in unlinked files (H7).

A body past SPOOL_FROM goes to a temporary file that has no name and is readable by this user alone. All such files of
a process together hold SPOOL_BUDGET bytes at most, so that many slow uploads cannot fill the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock
from typing import BinaryIO, cast

SPOOL_FROM = 1024 * 1024
SPOOL_BUDGET = 1024 * 1024 * 1024
CHUNK = 64 * 1024


class OverBudget(Exception):
    """The process holds as many spooled bytes as it may, or the disk is full; a later request may fit."""


class Budget:
    """Bytes that may be spooled at once in this process, over all its threads and loops."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._lock = Lock()

    def take(self, size: int) -> None:
        """Reserve bytes; raise OverBudget when there are not enough."""
        with self._lock:
            if size > self._left:
                raise OverBudget
            self._left -= size

    def give(self, size: int) -> None:
        """Return reserved bytes."""
        with self._lock:
            self._left += size


BUDGET = Budget(SPOOL_BUDGET)


class Body:
    """Takes a body chunk by chunk, and gives its bytes back as often as asked."""

    __slots__ = ("_budget", "_chunks", "_file", "_spooled", "size")

    def __init__(self, budget: Budget = BUDGET) -> None:
        self.size = 0
        self._chunks: list[bytes] = []
        self._file: BinaryIO | None = None
        self._spooled = 0
        self._budget = budget

    def append(self, chunk: bytes) -> None:
        """Take the next bytes; raises OverBudget."""
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
        self._budget.take(len(chunk))
        self._spooled += len(chunk)
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

    def close(self) -> None:
        """Let go of the file, if there is one; the bytes are gone then. May be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            self._budget.give(self._spooled)
            self._spooled = 0
            with suppress(OSError):  # what a full disk has not taken
                file.close()
        self._chunks = []


def _open_file() -> BinaryIO:
    try:
        return cast("BinaryIO", tempfile.TemporaryFile())  # closed by `close`
    except OSError as error:  # no room for files, or for descriptors
        raise OverBudget from error
