"""How many messages of one partition a claim takes (T6)."""

from __future__ import annotations

from collections.abc import Mapping

SPREAD = 8
"""Partitions that a full batch comes from at least, where so many have messages: keys are published side by side."""
RARELY = 32
"""Full batches between two tries of a smaller quota, where one was too small before."""


class Quota:
    """Small, so that a batch comes from many partitions; as large as a batch where only one has messages.

    A quota that is too small makes a batch that is not full, so a smaller one is tried less and less often where that
    was in vain. size: messages of a partition.
    """

    def __init__(self, batch: int) -> None:
        self.size = self._least = max(1, batch // SPREAD)
        self._batch = batch
        self._pause = self._left = 1
        self._narrowed = False

    def learn(self, found: Mapping[int, int], owned: int) -> None:
        """Take note of a batch. found: messages by partition; owned: how many partitions were asked."""
        narrowed, self._narrowed = self._narrowed, False
        if sum(found.values()) < self._batch:
            if found and max(found.values()) >= self.size < self._batch:
                self._widen()
            return
        if narrowed or len(found) >= SPREAD:
            self._pause = self._left = 1
        if len(found) < SPREAD < owned:
            self._left -= 1
            if not self._left:
                self._narrow()

    def _widen(self) -> None:
        self.size = min(self._batch, 2 * self.size)
        self._pause = self._left = min(RARELY, 2 * self._pause)

    def _narrow(self) -> None:
        self._narrowed = self.size > self._least
        self.size = max(self._least, self.size // 2)
        self._left = self._pause
