"""A clock that moves only when a test moves it."""

from __future__ import annotations

from datetime import UTC, datetime
from threading import Lock

from retryproof.core.record import microseconds

_START = datetime(2030, 1, 1, tzinfo=UTC)


class ManualClock:
    """A clock for `MemoryStore(clock=…)`: when called, it gives microseconds since the epoch. Safe for threads.

    start: its first time; a test should not depend on it.
    """

    def __init__(self, start: datetime = _START) -> None:
        self._now = microseconds(start.timestamp())
        self._lock = Lock()

    def __call__(self) -> int:
        """The time, in microseconds since the epoch."""
        with self._lock:
            return self._now

    def seconds(self) -> float:
        """The time in seconds: a monotonic clock that agrees with this one."""
        return self() / 1_000_000

    def advance(self, seconds: float) -> None:
        """Move the clock forward by `seconds`, zero or more.

        Raises ValueError for a negative duration.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds}) would turn the clock back; give zero or more seconds")
        with self._lock:
            self._now += microseconds(seconds)
