"""Many attempts at once: one round trip to claim and one to settle, and an answer for each item."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from retryproof import Policy, batches, errors
from retryproof.attempt import Attempts, BlockingAttempt, LoopAttempt
from retryproof.batches import Item, abegin_many, afinish_many, begin_many, finish_many
from retryproof.core.commands import Claim, FenceReply, Raised, Renew, Returned, Stopped
from retryproof.core.flow import Busy, Completed, Down, Failed, Mismatched, Replayed, to_settle
from retryproof.core.record import State
from retryproof.stores.memory import MemoryStore
from retryproof.stores.opened import AsyncOpened, Opened, open_blocking, open_on_loop
from tests.engine.support import SECONDS, Events, OnLoop, Turnstile, in_thread, make_claim, make_id

POLICY = Policy(wait=30.0)
FINGERPRINT = make_claim().fingerprint


def items(*names: str) -> list[Item]:
    return [Item(make_id(name), FINGERPRINT, "consumer") for name in names]


def held(attempts: Sequence[object]) -> list[BlockingAttempt]:
    return [attempt for attempt in attempts if isinstance(attempt, BlockingAttempt)]


def run(attempts: Attempts, opened: Opened, names: str) -> list[object]:
    """A batch whose work returns its place."""
    begun = begin_many(attempts, opened, POLICY, items(*names))
    running = held(begun)
    ended = iter(finish_many([(one, Returned(b"%d" % place)) for place, one in enumerate(running)], opened))
    for one in running:
        one.leave()
    return [next(ended) if isinstance(one, BlockingAttempt) else one for one in begun]


def test_a_batch_is_one_claim_and_is_settled_together() -> None:
    store, events = Turnstile(), Events()
    opened, attempts = open_blocking(store), Attempts((events,))
    assert [type(one) for one in run(attempts, opened, "abc")] == [Completed] * 3
    assert store.batches == [3]
    assert events.kinds == ["fresh"] * 3
    assert opened.background.idle
    assert [type(one) for one in run(attempts, opened, "abcd")] == [Replayed] * 3 + [Completed]


@pytest.mark.parametrize("kind", [Turnstile, MemoryStore])
def test_each_item_has_its_own_answer_and_a_twin_does_not_wait(kind: type[MemoryStore]) -> None:
    """C1, C18: though the policy lets a duplicate wait, a batch does not."""
    opened = open_blocking(kind())
    attempts = Attempts(())
    [first] = begin_many(attempts, opened, POLICY, items("a"))
    other = Item(make_id("b"), b"\0\0two")
    begun = begin_many(attempts, opened, POLICY, [*items("a", "b", "b"), other, *items("c")])
    assert [type(one) for one in begun] == [Busy, BlockingAttempt, Busy, Mismatched, BlockingAttempt]
    for one in held([first, *begun]):
        one.finish(Stopped())
        one.leave()
    assert opened.background.idle


def test_work_that_was_told_to_stop_is_unknown_whatever_the_policy_says_of_cancellation() -> None:
    store = MemoryStore()
    opened, attempts = open_blocking(store), Attempts(())
    [attempt] = held(begin_many(attempts, opened, Policy(release_on_cancel=True), items("a")))
    assert finish_many([(attempt, Stopped())], opened) == [Failed(attempt.hold, released=False)]
    attempt.leave()
    [record] = store.get([make_id("a")])
    assert record is not None
    assert record.state is State.IN_PROGRESS


def test_a_store_out_of_reach_is_told_to_each_item() -> None:
    def enter(claims: Sequence[Claim]) -> None:
        raise errors.StoreUnavailable("away")

    opened = open_blocking(Turnstile(enter))
    begun = begin_many(Attempts(()), opened, POLICY, items("a", "b"))
    assert [type(one) for one in begun] == [Down, Down]


def test_an_interruption_while_a_batch_is_claimed_gives_back_what_was_acquired() -> None:
    """C3: the keeper releases it."""
    store = MemoryStore()
    opened = open_blocking(store)

    class Interrupting(Attempts):
        def begun(self, *given: Any, **more: Any) -> Any:
            if given[2].id == make_id("b"):
                raise KeyboardInterrupt
            return super().begun(*given, **more)

    with pytest.raises(KeyboardInterrupt):
        begin_many(Interrupting(()), opened, POLICY, items("a", "b", "c"))
    opened.close(5.0)
    states = [record.state for record in store.get([make_id("a"), make_id("c")]) if record is not None]
    assert states == [State.RELEASED, State.RELEASED]
    assert not opened.background._active


def test_an_interruption_while_a_batch_is_settled_leaves_it_to_the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """C4."""
    store = MemoryStore()
    opened, attempts = open_blocking(store), Attempts(())
    begun = held(begin_many(attempts, opened, POLICY, items("a", "b")))

    def interrupted(commands: Any, timeout: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(opened, "perform_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish_many([(begun[0], Returned(b"1")), (begun[1], Raised())], opened)
    for one in begun:
        one.leave()
    opened.close(5.0)
    found = store.get([make_id("a"), make_id("b")])
    assert [record and record.state for record in found] == [State.COMPLETED, State.RELEASED]


async def settle(opened: AsyncOpened, begun: Sequence[object]) -> list[object]:
    running = [one for one in begun if isinstance(one, LoopAttempt)]
    ended = iter(await afinish_many([(one, Returned(b"done")) for one in running]))
    for one in running:
        one.leave()
    return [next(ended) if isinstance(one, LoopAttempt) else one for one in begun]


async def test_a_batch_on_a_loop_is_one_round_trip_to_claim_and_one_to_settle() -> None:
    store, attempts = OnLoop(), Attempts(())
    opened = open_on_loop(store)
    begun = await abegin_many(attempts, opened, POLICY, items("a", "b", "b", "c"))
    assert [type(one) for one in begun] == [LoopAttempt, LoopAttempt, Busy, LoopAttempt]
    assert [type(one) for one in await settle(opened, begun)] == [Completed, Completed, Busy, Completed]
    assert store.sent == [("claim", 3), ("complete", 3)]
    await opened.aclose()


async def test_a_batch_that_is_cancelled_while_it_is_claimed_leaves_nothing_claimed() -> None:
    """C3."""
    store, under_way, go = OnLoop(), asyncio.Event(), asyncio.Event()

    async def before(name: str, commands: Sequence[Any]) -> None:
        if name == "claim":
            under_way.set()
            await go.wait()

    store.before = before
    opened = open_on_loop(store)
    batch = asyncio.ensure_future(abegin_many(Attempts(()), opened, POLICY, items("a", "b")))
    await under_way.wait()
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    go.set()
    async with asyncio.timeout(10):
        while True:
            found = store.store.get([make_id("a"), make_id("b")])
            if [record and record.state for record in found] == [State.RELEASED] * 2 and opened.background.idle:
                break
            await asyncio.sleep(0.01)
    assert not opened.background._active
    await opened.aclose()


async def test_a_batch_that_is_cancelled_while_it_is_settled_loses_no_result() -> None:
    """C4."""
    store, under_way, go = OnLoop(), asyncio.Event(), asyncio.Event()

    async def before(name: str, commands: Sequence[Any]) -> None:
        if name == "complete":
            under_way.set()
            await go.wait()

    store.before = before
    opened = open_on_loop(store)
    begun = [
        one for one in await abegin_many(Attempts(()), opened, POLICY, items("a", "b")) if isinstance(one, LoopAttempt)
    ]
    batch = asyncio.ensure_future(afinish_many([(one, Returned(b"1")) for one in begun]))
    await under_way.wait()
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    go.set()
    await asyncio.wait([one.rest for one in begun if one.rest is not None], timeout=10)
    for one in begun:
        one.leave()
    found = store.store.get([make_id("a"), make_id("b")])
    assert [record and record.state for record in found] == [State.COMPLETED] * 2
    await opened.aclose()


def test_what_a_thread_claims_another_is_told_of() -> None:
    """C10: a claim of a batch whose operation this process holds does not leave."""
    store = Turnstile()
    opened, attempts = open_blocking(store), Attempts(())
    [first] = held(begin_many(attempts, opened, POLICY, items("a")))
    begun = in_thread(lambda: begin_many(attempts, opened, POLICY, items("a", "b"))).result(10)
    assert [type(one) for one in begun] == [Busy, BlockingAttempt]
    assert store.batches == [1, 1]
    for one in held([first, *begun]):
        one.finish(Raised())
        one.leave()


def test_c4_an_interruption_before_anything_is_sent_leaves_the_results_to_the_keeper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, attempts = open_blocking(MemoryStore()), Attempts(())
    begun = held(begin_many(attempts, opened, POLICY, items("a", "b", "c")))
    asked = iter([None, None, KeyboardInterrupt()])

    def interrupted(*given: Any) -> Any:
        error = next(asked)
        if error is not None:
            raise error
        return to_settle(*given)

    monkeypatch.setattr(batches, "to_settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish_many([(one, Returned(b"done")) for one in begun], opened)
    for one in begun:
        one.leave()
    until(lambda: opened.background.idle)
    assert [record and record.result for record in opened.store.get([one.hold.id for one in begun])] == [b"done"] * 3


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, GeneratorExit])
async def test_c4_an_interruption_of_the_loop_leaves_a_result_to_the_keeper(interruption: type[BaseException]) -> None:
    """A coroutine is closed whose loop has ended; one is interrupted where the loop is."""
    store = OnLoop()
    opened, attempts = open_on_loop(store), Attempts(())
    attempt = await attempts.abegin(opened, POLICY, make_id("a"), FINGERPRINT)
    assert isinstance(attempt, LoopAttempt)
    finishing = attempt.finish(Returned(b"done"))
    finishing.send(None)
    with pytest.raises(interruption):
        finishing.throw(interruption())
    attempt.leave()
    await asyncio.to_thread(until, lambda: opened.background.idle)
    [record] = store.store.get([make_id("a")])
    assert record is not None
    assert record.result == b"done"


def test_c10_claims_whose_operations_this_process_holds_wait_for_the_store_together_not_one_after_another() -> None:
    hanging = threading.Event()

    class Hanging(Turnstile):
        def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
            hanging.wait(SECONDS)
            return super().renew(commands)

    names = [f"{number}" for number in range(12)]
    policy = Policy(store_timeout=0.3)
    opened, attempts = open_blocking(Hanging()), Attempts(())
    running = held(begin_many(attempts, opened, policy, items(*names)))
    for one in running:
        one.hold.deadline = 0.0  # by our own count its lease is over: the store is to say whether it stands
    began = time.monotonic()
    begun = begin_many(attempts, opened, policy, items(*names))
    took = time.monotonic() - began
    hanging.set()
    assert [type(one) for one in begun] == [Busy] * len(names)
    assert took < 1.2  # a third of what each in its turn would take
    for one in running:
        one.give_back()
    until(lambda: opened.background.idle)


def test_c10_what_lingers_twice_counts_once() -> None:
    opened, attempts = open_blocking(MemoryStore()), Attempts(())
    [one] = held(begin_many(attempts, opened, POLICY, items("a")))
    for _ in range(2):
        opened.background.linger(one.hold, one.hold.complete(b"x" * 1000))
    one.leave()
    until(lambda: opened.background.idle)
    assert opened.background._lingering.bytes == 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
