"""Both engines over every store, behind one way to call them."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from retryproof import AsyncIdempotency, Idempotency, Outcome, Policy
from retryproof.stores.sql.migrate import migrate
from tests.engine.support import SECONDS, Events, in_thread

T = TypeVar("T")
Colour = Literal["sync", "async"]


class Caller:
    """An engine of either colour, called from threads; the async one lives on a loop in a thread of its own.

    Functions are plain; the async engine runs each in a thread, so that they may block.
    """

    def __init__(self, store: Any, colour: Colour, scope: str, policy: Policy | None = None) -> None:
        self.events = Events()
        self.scope = scope
        self.sync: Idempotency | None = None
        self.task: AsyncIdempotency | None = None
        if colour == "sync":
            self.sync = Idempotency(store, policy=policy, events=(self.events,))
            return
        self.task = AsyncIdempotency(store, policy=policy, events=(self.events,))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, key: str, fn: Callable[[], T], **options: Any) -> Outcome[T]:
        given = {"scope": self.scope, **options}
        if self.sync is not None:
            return self.sync.run(key, fn, **given)
        assert self.task is not None

        async def in_a_thread() -> T:
            return await asyncio.to_thread(fn)

        running = asyncio.run_coroutine_threadsafe(self.task.run(key, in_a_thread, **given), self.loop)
        outcome: Outcome[T] = running.result(2 * SECONDS)
        return outcome

    def start(self, key: str, fn: Callable[[], T], **options: Any) -> Future[Outcome[T]]:
        """`run`, in the background."""
        return in_thread(lambda: self.run(key, fn, **options))

    def close(self) -> None:
        if self.sync is not None:
            self.sync.close(drain=1.0)
            return
        assert self.task is not None
        asyncio.run_coroutine_threadsafe(self.task.aclose(drain=1.0), self.loop).result(SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SECONDS)
        self.loop.close()


MakeCaller = Callable[..., Caller]


@pytest.fixture(params=["memory", "sqlite", "redis", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL of each store, which all engines of a test share."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'keys.db'}"
    url: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "postgres":
        migrate(url)
    return url


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    chosen: Colour = request.param
    return chosen


@pytest.fixture
def make_caller(colour: Colour, unique: str) -> Iterator[MakeCaller]:
    """Makes engines of this colour; they share a scope that no other test uses."""
    made: list[Caller] = []

    def make(store: Any, **policy: Any) -> Caller:
        made.append(Caller(store, colour, unique, Policy(**policy) if policy else None))
        return made[-1]

    yield make
    for caller in made:
        caller.close()
