"""Attempts without a background: all is settled before they return, since the process may freeze then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from retryproof import Policy, errors
from retryproof.attempt import Attempts, BlockingAttempt, LoopAttempt
from retryproof.core.commands import Claim, ClaimReply, Complete, FenceReply, Returned
from retryproof.core.flow import Completed, Down, Replayed
from retryproof.core.record import State
from retryproof.foreground import Foreground, LoopForeground
from retryproof.stores.memory import MemoryStore
from retryproof.stores.opened import open_blocking, open_on_loop
from tests.engine.support import Events, OnLoop, make_claim, make_id

POLICY = Policy(lease=30.0, complete_timeout=0.05, store_timeout=0.5)
ID, FINGERPRINT = make_id("a"), make_claim().fingerprint


class Failing(MemoryStore):
    """Applies what it is asked, and fails so often to say so."""

    capabilities = replace(MemoryStore.capabilities, blocking=True)

    def __init__(self, *, claims: int = 0, completes: int = 0) -> None:
        super().__init__()
        self.claims, self.completes = claims, completes

    def claim(self, claims: Sequence[Claim]) -> Sequence[ClaimReply]:
        replies = super().claim(claims)
        if self.claims:
            self.claims -= 1
            raise errors.StoreUnavailable("the reply is lost")
        return replies

    def complete(self, commands: Sequence[Complete]) -> Sequence[FenceReply]:
        if self.completes:
            self.completes -= 1
            raise errors.StoreUnavailable("away")
        return super().complete(commands)


def keepers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "retryproof-keeper"]


def begin(store: MemoryStore, events: Events) -> Any:
    attempts = Attempts((events,))
    return attempts.begin(Foreground(open_blocking(store), POLICY.store_timeout), POLICY, ID, FINGERPRINT)


def state(store: MemoryStore) -> State | None:
    [record] = store.get([ID])
    return None if record is None else record.state


def test_an_attempt_is_claimed_and_settled_without_a_thread() -> None:
    store, before = Failing(), keepers()
    attempt = begin(store, Events())
    assert isinstance(attempt, BlockingAttempt)
    assert isinstance(attempt.finish(Returned(b"1")), Completed)
    attempt.leave()
    assert keepers() == before
    assert state(store) is State.COMPLETED
    assert isinstance(begin(store, Events()), Replayed)


def test_c10_a_result_is_stored_by_the_last_call_before_it_returns() -> None:
    store, events, before = Failing(completes=1), Events(), keepers()
    attempt = begin(store, events)
    attempt.finish(Returned(b"1"))
    attempt.leave()
    assert state(store) is State.COMPLETED
    assert keepers() == before


def test_c10_a_result_that_nobody_stores_is_its_callers_and_its_record_stays(caplog: pytest.LogCaptureFixture) -> None:
    store, events, before = Failing(completes=100), Events(), keepers()
    attempt = begin(store, events)
    conclusion = attempt.finish(Returned(b"1"))
    attempt.leave()
    assert conclusion == Completed(attempt.hold, b"1", stored=False)
    assert events.kinds == ["unstored"]
    assert "given up" in caplog.text
    assert state(store) is State.IN_PROGRESS
    assert keepers() == before


def test_c3_a_claim_without_an_answer_is_released_before_it_returns() -> None:
    store, events, before = Failing(claims=2), Events(), keepers()
    assert isinstance(begin(store, events), Down)
    assert state(store) is State.RELEASED
    assert keepers() == before


async def test_on_a_loop_all_is_settled_before_settled_returns() -> None:
    """C4: a cancellation while the result is stored included."""
    store, under_way, go = OnLoop(), asyncio.Event(), asyncio.Event()

    async def before(name: str, commands: Sequence[Any]) -> None:
        if name == "complete":
            under_way.set()
            await go.wait()

    store.before = before
    opened, threads = open_on_loop(store), keepers()
    foreground = LoopForeground(opened, POLICY.store_timeout)
    attempt = await Attempts(()).abegin(foreground, POLICY, ID, FINGERPRINT)
    assert isinstance(attempt, LoopAttempt)
    finishing = asyncio.ensure_future(attempt.finish(Returned(b"1")))
    await under_way.wait()
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    attempt.leave()
    asyncio.get_running_loop().call_soon(go.set)
    await foreground.settled()
    assert state(store.store) is State.COMPLETED
    assert keepers() == threads
    await opened.aclose()


async def test_on_a_loop_a_claim_without_an_answer_is_released() -> None:
    """C3."""
    store = OnLoop(Failing(claims=2))
    opened = open_on_loop(store)
    foreground = LoopForeground(opened, POLICY.store_timeout)
    assert isinstance(await Attempts(()).abegin(foreground, POLICY, ID, FINGERPRINT), Down)
    await foreground.settled()
    assert state(store.store) is State.RELEASED
    await opened.aclose()
