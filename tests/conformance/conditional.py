"""An engine of conditional writes in memory, and stores over it in both colours; it fails where a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

from retryproof.clock import wall_clock
from retryproof.core.errors import StoreUnavailable
from retryproof.core.findings import Finding, Verdict
from retryproof.stores.base import Capabilities
from retryproof.stores.conditional import (
    KEPT,
    WRITTEN,
    AsyncConditionalStore,
    ConditionalStore,
    EngineStep,
    Item,
    Kept,
    Over,
    PutItem,
    Read,
    RemoveItem,
    Scan,
    Write,
    Written,
)

T = TypeVar("T")
Answer = Written | Kept | StoreUnavailable
PAGE = 3
"""Items that a scan gives at once, however many are wanted: engines have pages of their own."""

CAPABILITIES = Capabilities(name="conditional", max_batch=25, clock="host", concurrent=True)


class Engine:
    """Items by id. fault: what goes wrong with the change of this number: "before" or "after" it was done."""

    def __init__(self, fault: Callable[[int], str] = lambda number: "") -> None:
        self.items: dict[bytes, Item] = {}
        self.steps: list[EngineStep] = []
        self._fault = fault
        self._changes = 0
        self._lock = Lock()

    def perform(self, step: EngineStep) -> Any:
        """Do a step; each change of a write stands on its own."""
        with self._lock:
            self.steps.append(step)
            match step:
                case Read(ids):
                    return [self.items.get(id) for id in ids]
                case Write(changes):
                    return [self._change(change) for change in changes]
                case Over(now, limit):
                    over = [item for item in self.items.values() if item.record.expires_at <= now]
                    return over[:limit]
                case Scan(after=after, limit=limit):
                    behind = sorted(id for id in self.items if id > after)
                    size = min(limit, PAGE)
                    return [self.items[id] for id in behind[:size]], len(behind) > size

    async def aperform(self, step: EngineStep) -> Any:
        """The same, awaited."""
        await asyncio.sleep(0)
        return self.perform(step)

    def _change(self, change: PutItem | RemoveItem) -> Answer:
        number, self._changes = self._changes, self._changes + 1
        fault = self._fault(number)
        lost = StoreUnavailable(f"change {number} failed {fault} it was done")
        if fault == "before":
            return lost
        answer = self._changed(change)
        return lost if fault == "after" else answer

    def _changed(self, change: PutItem | RemoveItem) -> Answer:
        id = change.id if isinstance(change, RemoveItem) else change.item.record.id
        there = self.items.get(id)
        if (None if there is None else there.stamp) != change.expected:
            return KEPT
        if isinstance(change, RemoveItem):
            del self.items[id]
        else:
            self.items[id] = change.item
        return WRITTEN


def store(engine: Engine, clock: Callable[[], int]) -> ConditionalStore:
    """A blocking store over the engine."""
    return ConditionalStore(engine.perform, CAPABILITIES, clock)


def async_store(engine: Engine, clock: Callable[[], int]) -> AsyncConditionalStore:
    """An async store over the engine."""
    return AsyncConditionalStore(engine.aperform, CAPABILITIES, clock)


def again_until_answered(target: ConditionalStore) -> Callable[..., Any]:
    """Calls of the store, in which each command without an answer is sent again, as the core does (C3)."""

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        answers = getattr(target, method)(*arguments, **options)
        if method not in ("claim", "complete", "release", "renew", "checkpoint"):
            return answers
        commands: Sequence[Any] = arguments[0]
        while lost := [place for place, answer in enumerate(answers) if isinstance(answer, Exception)]:
            again = getattr(target, method)([commands[place] for place in lost])
            for place, answer in zip(lost, again, strict=True):
                answers[place] = answer
        return answers

    return call


SHARED = Engine()


def from_url(url: str, *, timeout: float) -> AsyncConditionalStore:
    """The store of a URL, over items that this process shares."""
    return async_store(SHARED, wall_clock)


def diagnose(url: str, *, timeout: float) -> Sequence[Finding]:
    """What a doctor says."""
    return [Finding("items", Verdict.OK, "all is well")]
