"""One timer of an event loop for the deadlines of many commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retryproof.stores.lanes.replies import clock

NEVER = float("inf")
_AFTER = 0.001
"""It rings this many seconds late, so that the deadline is over on a coarser clock too."""


class Alarm:
    """Calls `ring` in the loop, which answers callers that have waited too long, and returns the next deadline.

    Nearly every command has a later deadline than the commands before it, and costs one comparison with `due`. But
    callers that share a store may have different time-outs.
    """

    __slots__ = ("_loop", "_ring", "_timer", "due")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], float]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self.due = NEVER

    def wake_by(self, deadline: float) -> None:
        """Ring at this deadline at the latest."""
        if deadline < self.due:
            self.set(deadline)

    def set(self, deadline: float) -> None:
        """Ring at this deadline, which is before `due`."""
        if self._timer is not None:
            self._timer.cancel()
        self.due = deadline
        self._timer = self._loop.call_later(deadline - clock() + _AFTER, self._rung)

    def _rung(self) -> None:
        self._timer, self.due = None, NEVER
        earliest = self._ring()
        if earliest < NEVER:
            self.set(earliest)
