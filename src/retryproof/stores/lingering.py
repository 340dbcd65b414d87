"""What attempts came to that could not be stored: it is sent again until the store answers (C10).

The bytes of the results are counted, since they wait in memory for as long as the store is out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from retryproof.core.commands import Complete, Release
from retryproof.core.hold import NEVER, Hold
from retryproof.stores.base import Store

T = TypeVar("T")

OVERHEAD = 512
"""Bytes that a result costs beside its own."""


class Last:
    """The last command of an attempt, which is repeated until the store answers it."""

    __slots__ = ("command", "due", "hold")

    def __init__(self, hold: Hold, command: Complete | Release, due: float) -> None:
        self.hold = hold
        self.command = command
        self.due = due

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory."""
        result = self.command.result if isinstance(self.command, Complete) else None
        return OVERHEAD + len(result or b"")


class Lingering:
    """The last commands of attempts, by their holds. Changed under the keeper's mutex, and sent by its thread.

    max_bytes: of results that may wait.
    """

    def __init__(self, max_batch: int, max_bytes: int) -> None:
        self._max_batch = max_batch
        self._max_bytes = max_bytes
        self._all: dict[Hold, Last] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether no more results may wait."""
        return self.bytes >= self._max_bytes

    @property
    def holds(self) -> list[Hold]:
        """Of all that waits."""
        return list(self._all)

    @property
    def due(self) -> float:
        """When the next is to be sent."""
        return min((last.due for last in list(self._all.values())), default=NEVER)

    def add(self, hold: Hold, command: Complete | Release, due: float) -> None:
        """Send this command until it is answered, in place of one that was to be sent."""
        self.remove(hold)
        last = self._all[hold] = Last(hold, command, due)
        self.bytes += last.size

    def remove(self, hold: Hold) -> None:
        """It is answered."""
        last = self._all.pop(hold, None)
        if last is not None:
            self.bytes -= last.size

    def last_of(self, hold: Hold) -> Complete | Release | None:
        """The command that waits to be answered."""
        last = self._all.get(hold)
        return None if last is None else last.command

    def hurry(self) -> None:
        """Send all of them now."""
        for last in list(self._all.values()):
            last.due = 0.0

    def due_by(self, now: float, asked: Collection[Hold]) -> list[Last]:
        """What is to be sent, the longest due first. asked: those that somebody waits for."""
        due = [last for last in list(self._all.values()) if last.due <= now or last.hold in asked]
        return sorted(due, key=lambda last: last.due)

    def send(self, store: Store, due: Sequence[Last]) -> Iterator[list[tuple[Last, Any]]]:
        """Send these, one batch at a time; each with its reply, or with the exception that came instead."""
        calls: tuple[tuple[type, Callable[[Any], Sequence[Any]]], ...] = (
            (Complete, store.complete),
            (Release, store.release),
        )
        for kind, call in calls:
            alone = {last.command.id: last for last in due if type(last.command) is kind}  # an id once in a batch
            for batch in chunks(list(alone.values()), self._max_batch):
                yield list(zip(batch, replies_of(call, [last.command for last in batch]), strict=True))


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    """The items in runs of this size at most."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def replies_of(call: Callable[[Any], Sequence[Any]], commands: Sequence[Any]) -> Sequence[Any]:
    """What the store says to each command, or the exception that it raised, for each."""
    try:
        return call(commands)
    except Exception as error:  # noqa: BLE001  # what a store raises is tried again, whatever it is
        return [error] * len(commands)


def no_answer(replies: Iterable[Any]) -> bool:
    """Whether the store gave no answer to any of these."""
    return all(isinstance(reply, Exception) for reply in replies)
