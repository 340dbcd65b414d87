"""Duplicates that wait for a running attempt (C18): how they wait, and how many may."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

from retryproof.core.commands import Pause, Paused

Stays = Callable[[float], Awaitable[bool]]
"""Waits for some seconds; False says that the caller has left meanwhile."""


class Waiters:
    """The duplicates of one engine that wait. count: how many there are now."""

    __slots__ = ("_mutex", "count")

    def __init__(self) -> None:
        self.count = 0
        self._mutex = threading.Lock()

    def pause(self, pause: Pause, most: int) -> Paused:
        """Sleep in this thread; a duplicate sleeps only if fewer than `most` wait."""
        if pause.waiting and not self._admit(most):
            return Paused(on=False)
        try:
            time.sleep(pause.seconds)
        finally:
            if pause.waiting:
                self._dismiss()
        return Paused()

    async def apause(self, pause: Pause, most: int, stays: Stays | None) -> Paused:
        """`pause` on the event loop. stays: how a duplicate waits whose caller may leave meanwhile."""
        if pause.waiting and not self._admit(most):
            return Paused(on=False)
        try:
            if pause.waiting and stays is not None:
                return Paused(on=await stays(pause.seconds))
            await asyncio.sleep(pause.seconds)
            return Paused()
        finally:
            if pause.waiting:
                self._dismiss()

    def _admit(self, most: int) -> bool:
        with self._mutex:
            if self.count >= most:
                return False
            self.count += 1
            return True

    def _dismiss(self) -> None:
        with self._mutex:
            self.count -= 1
