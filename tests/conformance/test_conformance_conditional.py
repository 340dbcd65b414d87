"""The conformance suite over conditional writes alone, in both colours, and what happens where one of them fails."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from retryproof import AsyncIdempotency, Idempotency, Outcome
from retryproof.core.commands import DONE, LOST, Acquired, Finished, Running
from retryproof.core.errors import StoreUnavailable
from retryproof.core.record import State
from retryproof.stores import InLoop, url
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.conditional import PutItem, Read, RemoveItem, Write
from retryproof.stores.diagnosis import diagnose
from retryproof.stores.memory import wall_clock
from retryproof.testing import AsyncStoreConformance, ManualClock, StoreConformance
from retryproof.testing.bench import again, checkpoint, complete, new_claim, release, renew
from retryproof.testing.conformance import Advance
from tests.conformance.conditional import Engine, again_until_answered, async_store, store
from tests.conformance.model import check


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine() -> Engine:
    return Engine()


class TestConditionalStore(StoreConformance):
    @pytest.fixture
    def store(self, engine: Engine, clock: ManualClock) -> Store:
        return store(engine, clock)

    @pytest.fixture
    def rival(self, engine: Engine, clock: ManualClock) -> Store:
        return store(engine, clock)

    @pytest.fixture
    def advance(self, clock: ManualClock) -> Advance:
        return clock.advance


class TestAsyncConditionalStore(AsyncStoreConformance):
    @pytest.fixture
    def store(self, engine: Engine, clock: ManualClock) -> AsyncStore:
        return async_store(engine, clock)

    @pytest.fixture
    def rival(self, engine: Engine, clock: ManualClock) -> AsyncStore:
        return async_store(engine, clock)

    @pytest.fixture
    def advance(self, clock: ManualClock) -> Advance:
        return clock.advance


class TestAsyncStoreInALoopOfItsOwn(StoreConformance):
    """An async store serves blocking callers, from any number of threads."""

    @pytest.fixture
    def store(self, engine: Engine, clock: ManualClock) -> Iterator[Store]:
        store = InLoop(lambda: async_store(engine, clock))
        yield store
        store.close()

    @pytest.fixture
    def advance(self, clock: ManualClock) -> Advance:
        return clock.advance


def test_a_sync_engine_runs_on_a_store_that_is_only_async(engine: Engine, clock: ManualClock) -> None:
    with Idempotency(InLoop(lambda: async_store(engine, clock))) as engine_:
        outcomes = [engine_.run("key", lambda: 1, scope="s") for _ in range(2)]
    assert [(outcome.value, outcome.replayed) for outcome in outcomes] == [(1, False), (1, True)]


def test_a_url_whose_store_is_only_async_serves_both_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry is all that a new kind of store needs."""
    entry = url.Entry(("conditional",), None, "tests.conformance.conditional:from_url", "tests.conformance.conditional")
    monkeypatch.setitem(url.SCHEMES, "conditional", entry)
    with Idempotency("conditional://shared") as engine:
        first = engine.run("key", lambda: 1, scope="s")

    async def again() -> Outcome[int]:
        async with AsyncIdempotency("conditional://shared") as engine:
            return await engine.run("key", lambda: 2, scope="s")

    second = asyncio.run(again())
    assert [(it.value, it.replayed) for it in (first, second)] == [(1, False), (1, True)]
    assert [finding.says for finding in diagnose("conditional://shared")] == ["all is well"]


def test_it_agrees_with_the_model(engine: Engine) -> None:
    target = store(engine, wall_clock)
    check(lambda method, *arguments, **options: getattr(target, method)(*arguments, **options))


@pytest.mark.parametrize("seed", range(3))
def test_c3_it_agrees_with_the_model_where_changes_fail_and_are_sent_again(seed: int) -> None:
    """Half of those that fail were done."""
    random_fault = random.Random(seed)
    engine = Engine(lambda number: random_fault.choice(["", "", "before", "after"]))
    removals = again_until_answered(store(engine, wall_clock))

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        if method not in ("claim", "complete", "release", "renew", "checkpoint"):
            engine._fault, kept = (lambda number: ""), engine._fault
            try:
                return removals(method, *arguments, **options)
            finally:
                engine._fault = kept
        return removals(method, *arguments, **options)

    check(call, examples=40)


def test_the_usual_operation_takes_one_write_to_claim_and_one_to_complete(engine: Engine, clock: ManualClock) -> None:
    target = store(engine, clock)
    claim = new_claim()
    (acquired,) = target.claim([claim])
    assert isinstance(acquired, Acquired)
    assert target.renew([renew(claim, acquired, 60.0)]) == [DONE]
    assert target.checkpoint([checkpoint(claim, acquired, "step", b"1")]) == [DONE]
    assert target.complete([complete(claim, acquired, b"result")]) == [DONE]
    assert [type(step) for step in engine.steps] == [Write] * 4


def test_i5_nothing_is_answered_on_what_is_only_remembered(engine: Engine, clock: ManualClock) -> None:
    """The record was taken over by another process since this one wrote it."""
    here, there = store(engine, clock), store(engine, clock)
    claim = new_claim(lease=10.0)
    (mine,) = here.claim([claim])
    assert isinstance(mine, Acquired)
    clock.advance(11.0)
    other = again(claim)
    (theirs,) = there.claim([other])
    assert isinstance(theirs, Acquired)
    assert here.complete([complete(claim, mine, b"late")]) == [LOST]
    assert isinstance(here.claim([again(claim)])[0], Running)
    there.complete([complete(other, theirs, b"theirs")])
    (replay,) = here.claim([again(claim)])
    assert isinstance(replay, Finished)
    assert replay.result == b"theirs"


FAULTS = [
    dict(zip(numbers, kinds, strict=True))
    for numbers in itertools.combinations(range(4), 2)
    for kinds in itertools.product(("before", "after"), repeat=2)
]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
@pytest.mark.parametrize("settles", ["complete", "release"])
def test_c3_each_change_may_fail_before_or_after_it_was_done(
    faults: dict[int, str], settles: str, clock: ManualClock
) -> None:
    """Whatever fails, the same command sent again ends as if nothing had, and a rival never has it meanwhile (I1)."""
    engine = Engine(lambda number: faults.get(number, ""))
    here, there = again_until_answered(store(engine, clock)), store(engine, clock)
    claim = new_claim(lease=10.0)
    (acquired,) = here("claim", [claim])
    assert isinstance(acquired, Acquired)
    (rival,) = there.claim([again(claim)])
    assert not isinstance(rival, Acquired)
    last = complete(claim, acquired, b"result") if settles == "complete" else release(claim, acquired)
    assert here(settles, [last]) == [DONE]
    assert here(settles, [last]) == [DONE]
    (record,) = there.get([claim.id])
    assert record is not None
    assert record.state is (State.COMPLETED if settles == "complete" else State.RELEASED)


def test_i2_a_write_that_arrives_late_changes_nothing(engine: Engine, clock: ManualClock) -> None:
    """Its item was written by somebody since, or removed and made anew, even with the same content."""
    target = store(engine, clock)
    claim = new_claim(lease=10.0)
    (acquired,) = target.claim([claim])
    assert isinstance(acquired, Acquired)
    target.complete([complete(claim, acquired, b"result")])
    late = next(step for step in reversed(engine.steps) if isinstance(step, Write)).changes[0]
    clock.advance(claim.retention + 1)
    assert target.evict([claim.id]) == [True]
    (anew,) = store(engine, clock).claim([claim])
    assert isinstance(anew, Acquired)
    before = dict(engine.items)
    engine.perform(Write([late, RemoveItem(claim.id, late.expected or b"")]))
    assert engine.items == before


def test_a_record_that_others_write_all_the_time_is_an_error_in_the_end(clock: ManualClock) -> None:
    class Contended(Engine):
        def perform(self, step: Any) -> Any:
            if isinstance(step, Write):
                for id, item in list(self.items.items()):
                    self.items[id] = type(item)(item.record, bytes([len(self.steps) % 256]) * 16)
            return super().perform(step)

    engine = Contended()
    target = store(engine, clock)
    claim = new_claim(lease=10.0)
    (acquired,) = target.claim([claim])
    assert isinstance(acquired, Acquired)
    (reply,) = target.complete([complete(claim, acquired, b"result")])
    assert isinstance(reply, StoreUnavailable)
    assert engine.items[claim.id].record.state is State.IN_PROGRESS


def test_c12_what_was_claimed_again_since_its_end_was_told_is_not_removed(engine: Engine, clock: ManualClock) -> None:
    """Between the look and the removal."""
    target, rival = store(engine, clock), store(engine, clock)
    claim = new_claim(lease=1.0, unsettled_retention=5.0)
    target.claim([claim])
    clock.advance(6.0)
    (ended,) = target.reap(10).unsettled
    perform = engine.perform

    def claims_first(step: Any) -> Any:
        if isinstance(step, Write) and any(isinstance(change, RemoveItem) for change in step.changes):
            engine.perform = perform  # type: ignore[method-assign]  # once
            (reply,) = rival.claim([again(claim, lease=60.0)])
            assert isinstance(reply, Acquired)
        return perform(step)

    hurried = store(engine, clock)
    hurried._perform = claims_first
    assert hurried.reap(0, told=[ended]).ended == []
    assert [record is not None for record in target.get([claim.id])] == [True]


def test_reads_and_writes_of_a_batch_travel_together(engine: Engine, clock: ManualClock) -> None:
    claims = [new_claim() for _ in range(20)]
    store(engine, clock).claim(claims)
    other = store(engine, clock)
    engine.steps.clear()
    assert all(isinstance(reply, Running) for reply in other.claim([again(claim) for claim in claims]))
    assert [
        (type(step), len(step.changes if isinstance(step, Write) else step.ids))
        for step in engine.steps
        if isinstance(step, Read | Write)
    ] == [(Write, 20), (Read, 20)]
    assert all(isinstance(change, PutItem) for change in engine.steps[0].changes)  # type: ignore[union-attr]  # a Write
