"""A record that is gone after the work (the store lost it), and one that somebody took after a release (C3, C10)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.commands import FenceReply, Release
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import AsgiScope, Receive, Send
from retryproof.observe import Event
from retryproof.stores.memory import MemoryStore
from tests.engine.conftest import MakeCaller
from tests.engine.support import make_claim
from tests.http.harness import call, new_key


def forget(store: MemoryStore) -> None:
    """What FLUSHALL does."""
    store._records.clear()


def test_c10_a_record_that_is_gone_after_the_work_costs_its_caller_nothing(make_caller: MakeCaller) -> None:
    store = MemoryStore()
    caller = make_caller(store)

    def charge() -> int:
        forget(store)
        return 7

    outcome = caller.run("k", charge)
    assert (outcome.value, outcome.replayed) == (7, False)
    assert [(event.kind, event.note) for event in caller.events] == [("never_stored", "the record is gone")]


def test_c10_an_error_stays_the_caller_s_own_where_the_record_is_gone(make_caller: MakeCaller) -> None:
    store = MemoryStore()

    def charge() -> int:
        forget(store)
        raise ValueError("no money")

    with pytest.raises(ValueError, match="no money"):
        make_caller(store).run("k", charge)


async def test_c10_a_step_whose_record_goes_meanwhile_tells_nobody_to_ask_again() -> None:
    """Nobody took over, and an attempt under a new record would have the effect again."""
    store, events = MemoryStore(), list[Event]()

    def charge(key: UUID) -> int:
        forget(store)
        return 7

    async def acharge(key: UUID) -> int:
        return charge(key)

    async def work() -> int:
        return await current_operation().astep("charge", acharge)

    engine = Idempotency(store, events=[events.append])
    outcome = engine.run("k", lambda: current_operation().step("charge", charge), scope="s")
    engine.close()
    async with AsyncIdempotency(store, events=[events.append]) as on_loop:
        awaited = await on_loop.run("k", work, scope="s")
    assert [(outcome.value, outcome.replayed), (awaited.value, awaited.replayed)] == [(7, False)] * 2
    assert [(event.kind, event.note) for event in events] == [("never_stored", "the record is gone")] * 2


async def test_c10_a_response_is_sent_although_the_record_is_gone() -> None:
    store, events = MemoryStore(), list[Event]()

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        forget(store)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"paid"})

    layer = IdempotencyMiddleware(app, store=store, scope=single_tenant, events=[events.append])
    answer = await call(layer, key=new_key())
    assert (answer.status, answer.body, [event.kind for event in events]) == (201, b"paid", ["never_stored"])


async def test_c8_work_that_was_stopped_since_its_record_is_gone_has_an_unknown_outcome() -> None:
    """Nobody took over, so "ask again" would invite a second effect."""
    store = MemoryStore()
    policy = Policy(lease=0.1, max_run=60.0)
    engine = AsyncIdempotency(store, policy=policy)

    async def charge() -> None:
        forget(store)
        await asyncio.Event().wait()

    with pytest.raises(errors.OutcomeUnknown):
        await asyncio.wait_for(engine.run("k", charge, scope="s"), 10)

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await charge()

    layer = IdempotencyMiddleware(app, store=store, scope=single_tenant, policy=policy)
    answer = await asyncio.wait_for(call(layer, key=new_key()), 10)
    assert (answer.status, answer.code) == (409, "outcome-unknown")


class LosesTheReply(MemoryStore):
    """A release is applied, its reply is lost, and a rival takes the record before it is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0

    def release(self, commands: Sequence[Release]) -> Sequence[FenceReply]:
        replies = super().release(commands)
        if not self.lost:
            self.lost += 1
            (record,) = self.get([commands[0].id])
            assert record is not None
            super().claim([replace(make_claim(fingerprint=record.fingerprint), id=record.id)])
            raise ConnectionError("the reply was lost")
        return replies


def test_c3_a_release_repeated_after_somebody_took_the_record_leaves_the_caller_s_error(
    make_caller: MakeCaller,
) -> None:
    store = LosesTheReply()

    def charge() -> int:
        raise ValueError("no money")

    with pytest.raises(ValueError, match="no money"):
        make_caller(store).run("k", charge)
    assert store.lost == 1


def test_c6_a_handler_that_ends_after_max_run_completes(make_caller: MakeCaller) -> None:
    caller = make_caller(MemoryStore(), lease=0.1, max_run=0.1)

    def charge() -> int:
        caller.events.wait_for("overrun")
        threading.Event().wait(0.15)
        return 7

    assert caller.run("k", charge).value == 7
    assert caller.run("k", charge).replayed
