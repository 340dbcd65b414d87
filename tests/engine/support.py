"""Stores that do as a test says, and what else the engine's tests share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from retryproof.core.commands import Acquired, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.hold import Hold
from retryproof.core.record import Record
from retryproof.drive import clock
from retryproof.observe import Event
from retryproof.stores.base import Capabilities
from retryproof.stores.memory import MemoryStore

T = TypeVar("T")
SECONDS = 10.0
"""How long anything in these tests may take before it counts as hung."""


def make_id(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def make_claim(name: str = "a", *, fingerprint: bytes = b"\0\0one", nonce: bytes | None = None, **more: Any) -> Claim:
    given = {"lease": 10.0, "retention": 60.0, "unsettled_retention": 60.0, **more}
    return Claim(id=make_id(name), fingerprint=fingerprint, nonce=os.urandom(16) if nonce is None else nonce, **given)


def hold_of(store: MemoryStore, claim: Claim) -> Hold:
    """The hold of a claim that this store grants."""
    acquired = store.claim([claim])[0]
    assert isinstance(acquired, Acquired)
    return Hold(claim, acquired, clock())


def wait_until(condition: Callable[[], bool]) -> None:
    """Block until it is so."""
    for _ in range(int(SECONDS * 200)):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come to that")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run it in a thread of its own; an interruption is an outcome like any other."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # the thread's outcome, raised where the test asks for it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Events(list[Event]):
    """A listener that remembers, and can be waited for from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._news:
            self.append(event)
            self._news.notify_all()

    @property
    def kinds(self) -> list[str]:
        return [str(event.kind) for event in self]

    def wait_for(self, kind: str, seconds: float = SECONDS) -> None:
        """Block until such an event has come."""
        with self._news:
            assert self._news.wait_for(lambda: kind in self.kinds, seconds), f"{kind} is not among {self.kinds}"


class Turnstile(MemoryStore):
    """A memory store that is treated as one that blocks; each batch of claims goes through `enter` first.

    enter: called with the batch, in the thread that sends it; may block or raise.
    """

    capabilities: Capabilities = replace(MemoryStore.capabilities, blocking=True, concurrent=False)

    def __init__(self, enter: Callable[[Sequence[Claim]], None] = lambda claims: None) -> None:
        super().__init__()
        self.enter = enter
        self.batches: list[int] = []
        self.renewals: list[int] = []

    def claim(self, claims: Sequence[Claim]) -> Sequence[ClaimReply]:
        self.batches.append(len(claims))
        self.enter(claims)
        return super().claim(claims)

    def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
        self.renewals.append(len(commands))
        return super().renew(commands)


class Shared(MemoryStore):
    """Another process's way to the same records."""

    def __init__(self, other: MemoryStore) -> None:
        super().__init__(other._clock)
        self._records = other._records
        self._lock = other._lock


class OnLoop:
    """A memory store as an async store; `gate`, when set, is awaited by each batch of claims before it is applied."""

    def __init__(self, store: MemoryStore | None = None, **capabilities: Any) -> None:
        self.store = MemoryStore() if store is None else store
        self.capabilities = replace(MemoryStore.capabilities, blocking=True, **capabilities)
        self.before: Callable[[str, Sequence[Any]], Any] | None = None
        self.sent: list[tuple[str, int]] = []

    async def _call(self, name: str, commands: Sequence[Any]) -> Sequence[Any]:
        self.sent.append((name, len(commands)))
        if self.before is not None:
            await self.before(name, commands)
        answers: Sequence[Any] = getattr(self.store, name)(commands)
        return answers

    async def claim(self, claims: Sequence[Claim]) -> Sequence[Any]:
        return await self._call("claim", claims)

    async def complete(self, commands: Sequence[Complete]) -> Sequence[Any]:
        return await self._call("complete", commands)

    async def release(self, commands: Sequence[Release]) -> Sequence[Any]:
        return await self._call("release", commands)

    async def renew(self, commands: Sequence[Renew]) -> Sequence[Any]:
        return await self._call("renew", commands)

    async def checkpoint(self, commands: Sequence[Any]) -> Sequence[Any]:
        return await self._call("checkpoint", commands)

    async def get(self, ids: Sequence[bytes]) -> Sequence[Any]:
        return self.store.get(ids)

    async def scan(self, **options: Any) -> Sequence[Any]:
        return self.store.scan(**options)

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        return self.store.evict(ids)

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Any:
        return self.store.reap(limit, told)

    async def aclose(self) -> None:
        """Nothing to close."""

    def keeper(self) -> MemoryStore:
        return self.store


def in_child(work: Callable[[], bool]) -> None:
    """Run it in a forked process, which must say yes."""
    pid = os.fork()
    if pid == 0:
        answer = 2
        try:
            answer = 0 if work() else 1
        finally:
            os._exit(answer)
    for _ in range(int(SECONDS * 100)):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
