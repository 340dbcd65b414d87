"""The coalescers under pressure: who wakes whom, who is told in time, and what is left over afterwards."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from retryproof.core.commands import Acquired, Claim, FenceReply, Renew, Unreachable
from retryproof.core.hold import Hold
from retryproof.stores.coalesce import Bridge, TaskCoalescer, ThreadCoalescer
from retryproof.stores.keeper import Keeper
from tests.engine.support import SECONDS, OnLoop, Turnstile, make_claim


class Door:
    """Lets no batch in before it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, claims: Sequence[Claim]) -> None:
        self.entered.set()
        assert self.open.wait(SECONDS)


class Tracked(Bridge):
    """A bridge that remembers whose claims nobody reads."""

    def __init__(self, store: Turnstile) -> None:
        self.orphans: list[Claim] = []
        super().__init__(ThreadCoalescer(store, self.orphans.append), self.orphans.append)


# In time


async def test_c10_a_short_time_out_on_the_bridge_does_not_wait_for_a_longer_one() -> None:
    door = Door()
    crossing = Tracked(Turnstile(door))
    end = crossing.end()
    patient = end.perform(make_claim("patient"), SECONDS)
    began = time.monotonic()
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await end.perform(make_claim("late"), 0.05), Unreachable)
    assert time.monotonic() - began >= 0.05
    door.open.set()
    assert isinstance(await patient, Acquired)
    await asyncio.to_thread(crossing.close)


async def test_c10_a_short_time_out_of_a_task_does_not_wait_for_a_longer_one() -> None:
    store, go = OnLoop(), asyncio.Event()

    async def hold(name: str, commands: Sequence[object]) -> None:
        await go.wait()

    store.before = hold
    lanes = TaskCoalescer(store, lambda claim: None)
    patient = lanes.perform(make_claim("patient"), SECONDS)
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await lanes.perform(make_claim("late"), 0.05), Unreachable)
        assert isinstance(await lanes.perform(make_claim("patient"), 0.05), Unreachable)
    go.set()
    assert isinstance(await patient, Acquired)


# Threads that do not start, or do not last


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As under a limit on processes: no thread starts until `undo`."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield patch


async def test_c10_a_thread_that_does_not_start_is_a_definite_answer_and_started_later(
    no_threads: pytest.MonkeyPatch,
) -> None:
    store = Turnstile()
    crossing = Tracked(store)
    end = crossing.end()
    assert isinstance(await end.perform(make_claim("refused"), SECONDS), Unreachable)
    no_threads.undo()
    async with asyncio.timeout(SECONDS):
        assert isinstance(await end.perform(make_claim(), SECONDS), Acquired)
    assert store.get([make_claim("refused").id]) == [None]
    await asyncio.to_thread(crossing.close)


def test_c6_a_keeper_whose_thread_did_not_start_renews_once_it_can(no_threads: pytest.MonkeyPatch) -> None:
    store = Turnstile()
    keeper = Keeper(lambda: store, owns=False, max_batch=16)
    hold = hold_of(store, make_claim(lease=0.3))
    keeper.watch(hold)
    no_threads.undo()
    other = hold_of(store, make_claim("other", lease=0.3))
    keeper.watch(other)
    wait_until(lambda: len(store.renewals) >= 2)
    keeper.close()
    assert store.renewals[0] == 2


class Panic(BaseException):
    """What a driver in another language may raise past every `except Exception`."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bridge_whose_thread_dies_gets_another() -> None:
    panics = [Panic("broken")]

    def fail_once(claims: Sequence[Claim]) -> None:
        if panics:
            raise panics.pop()

    crossing = Tracked(Turnstile(fail_once))
    end = crossing.end()
    first = make_claim("first")
    assert isinstance(await end.perform(first, 0.2), Unreachable)
    async with asyncio.timeout(SECONDS):
        assert isinstance(await end.perform(make_claim(), SECONDS), Acquired)
    assert crossing.orphans == [first]
    await asyncio.to_thread(crossing.close)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_c6_a_keeper_whose_thread_dies_gets_another() -> None:
    died = threading.Event()

    class Fragile(Turnstile):
        def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
            if not died.is_set():
                died.set()
                raise Panic("broken")
            return super().renew(commands)

    store = Fragile()
    keeper = Keeper(lambda: store, owns=False, max_batch=16)
    kept = hold_of(store, make_claim(lease=0.3))
    deadline = kept.deadline
    keeper.watch(kept)
    assert died.wait(SECONDS)
    wait_until(lambda: keeper._thread is None)
    keeper.watch(hold_of(store, make_claim("other", lease=0.3)))
    wait_until(lambda: kept.deadline > deadline)
    keeper.close()


def hold_of(store: Turnstile, claim: Claim) -> Hold:
    acquired = store.claim([claim])[0]
    assert isinstance(acquired, Acquired)
    return Hold(claim, acquired, time.monotonic())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(int(SECONDS * 200)):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it did not come to that")
