"""The coalescers: what travels together, what happens to those who leave, and that nobody is left waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import uvloop

from retryproof.core.commands import Acquired, Claim, Complete, Done, Finished, Mismatch, Reply, Running, Unreachable
from retryproof.stores.base import Capabilities
from retryproof.stores.lanes import Bridge, TaskCoalescer, ThreadCoalescer, tasks, threads
from retryproof.stores.lanes.bridge import MOST_BOARDING
from tests.engine.support import SECONDS, OnLoop, Turnstile, in_thread, make_claim

T = TypeVar("T")


class Interrupted(BaseException):
    """As Ctrl-C: not an error of the store."""


class Gate:
    """Holds a store's batches up, and lets the test fail them."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.active = True

    def __call__(self, claims: Sequence[Claim]) -> None:
        if not self.active:
            return
        self.entered.release()
        assert self.leave.acquire(timeout=SECONDS)
        if self.error is not None:
            raise self.error


class Queue(ThreadCoalescer):
    """A coalescer whose length a test can wait for, and which remembers the claims of nobody."""

    def __init__(self, store: Turnstile) -> None:
        self.orphans: list[Claim] = []
        super().__init__(store, lambda claim, reply: self.orphans.append(claim))

    def wait_for_line(self, length: int) -> None:
        for _ in range(int(SECONDS * 1000)):
            if len(self._pending) == length:
                return
            threading.Event().wait(0.001)
        raise AssertionError(f"{len(self._pending)} stand in line, not {length}")


def line_up(queue: Queue, gate: Gate, *claims: Claim, timeout: float = SECONDS) -> list[Any]:
    """A thread for each claim, in order, behind a batch that is on its way; lets that batch through."""
    first = in_thread(lambda: queue.perform(make_claim("first"), SECONDS))
    assert gate.entered.acquire(timeout=SECONDS)
    threads = []
    for number, claim in enumerate(claims, 1):
        threads.append(in_thread(lambda claim=claim: queue.perform(claim, timeout)))  # type: ignore[misc]  # mypy#12557
        queue.wait_for_line(number)
    gate.leave.release()
    assert isinstance(first.result(SECONDS), Acquired)
    return threads


# Threads


def test_twins_in_one_batch_are_decided_by_one_claim() -> None:
    gate = Gate()
    store = Turnstile(gate)
    threads = line_up(Queue(store), gate, *(make_claim() for _ in range(5)), make_claim(fingerprint=b"\0\0other"))
    gate.active = False
    gate.leave.release()
    replies = [thread.result(SECONDS) for thread in threads]
    assert [type(reply) for reply in replies] == [Acquired, Running, Running, Running, Running, Mismatch]
    assert store.batches == [1, 1, 1]


def test_a_twin_that_gave_up_does_not_get_the_lead() -> None:
    """The store hangs past the twin's time-out and then fails: whoever comes next is served all the same."""
    gate = Gate()
    queue = Queue(Turnstile(gate))
    leader, twin = line_up(queue, gate, make_claim(), make_claim(), timeout=0.2)
    assert gate.entered.acquire(timeout=SECONDS)
    assert isinstance(twin.result(SECONDS), Unreachable)
    gate.error, gate.active = OSError("gone"), False
    gate.leave.release()
    assert isinstance(leader.result(SECONDS), Unreachable)
    assert isinstance(queue.perform(make_claim("later"), 2.0), Acquired)


def test_the_twins_of_a_failed_claim_ask_for_themselves() -> None:
    gate = Gate()
    queue = Queue(Turnstile(gate))
    leader, *twins = line_up(queue, gate, make_claim(), make_claim(), make_claim())
    assert gate.entered.acquire(timeout=SECONDS)
    gate.error, gate.active = OSError("gone"), False
    gate.leave.release()
    assert isinstance(leader.result(SECONDS), Unreachable)
    assert sorted(type(twin.result(SECONDS)).__name__ for twin in twins) == ["Acquired", "Running"]


def test_a_thread_with_many_commands_leads_for_each_of_them() -> None:
    """After a failed batch its twins and what stood apart go in some order; whose turn it is must not matter."""
    failures = [OSError("gone")]

    def fail_once(claims: Sequence[Claim]) -> None:
        if failures:
            raise failures.pop()

    queue = Queue(Turnstile(fail_once))
    commands = [make_claim(), make_claim(), make_claim(fingerprint=b"\0\0other"), make_claim()]
    replies = in_thread(lambda: queue.perform_many(commands, 5.0)).result(SECONDS)
    assert isinstance(replies[0], Unreachable)
    assert {type(reply) for reply in replies[1:]} <= {Acquired, Running, Mismatch}


def test_c4_an_interrupted_commit_is_nobodys_answer() -> None:
    """A group whose commit was interrupted is rolled back: whoever shared it is not told that it is stored."""
    gate = Gate()

    class Grouped(Turnstile):
        def commit_group(self, calls: Callable[[], T]) -> T:
            return calls()

    store = Grouped()
    held = store.claim([make_claim()])[0]
    claim = make_claim()
    assert isinstance(held, Acquired)
    store.enter = gate
    queue = Queue(store)
    first = in_thread(lambda: queue.perform(make_claim("first"), SECONDS))
    assert gate.entered.acquire(timeout=SECONDS)
    interrupted = in_thread(lambda: queue.perform(make_claim("second"), SECONDS))
    queue.wait_for_line(1)
    completing = in_thread(lambda: queue.perform(Complete(claim.id, held.birth, held.token, b"done"), SECONDS))
    queue.wait_for_line(2)
    gate.leave.release()
    first.result(SECONDS)
    assert gate.entered.acquire(timeout=SECONDS)
    gate.error, gate.active = Interrupted(), False
    gate.leave.release()
    with pytest.raises(Interrupted):
        interrupted.result(SECONDS)
    assert isinstance(completing.result(SECONDS), Unreachable)
    assert [orphan.id for orphan in queue.orphans] == [make_claim("second").id]


class InterruptingMutex:
    """A lock after whose nth use its thread is interrupted, as Ctrl-C or a task queue's time limit may do."""

    def __init__(self, number: int) -> None:
        self._lock = threading.Lock()
        self._left = number

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        self._left -= 1
        if self._left == 0:
            raise Interrupted


@pytest.mark.parametrize("number", range(1, 5))
def test_an_interruption_anywhere_leaves_the_lead_with_somebody(number: int) -> None:
    queue = Queue(Turnstile())
    queue.mutex = InterruptingMutex(number)  # type: ignore[assignment]  # as much of a lock as it takes
    for name in ("first", "second"):
        with suppress(Interrupted):
            queue.perform(make_claim(name), 1.0)
    assert isinstance(queue.perform(make_claim("later"), 1.0), Acquired)


def test_c3_a_thread_that_is_told_it_is_too_late_disowns_its_claim_itself() -> None:
    """It may ask again under the same nonce: releasing that claim behind its back would let another one in."""
    gate = Gate()
    queue = Queue(Turnstile(gate))
    [late] = line_up(queue, gate, make_claim("late"), timeout=SECONDS)
    follower = in_thread(lambda: queue.perform(make_claim("late"), 0.05))
    assert isinstance(follower.result(SECONDS), Unreachable)
    gate.active = False
    gate.leave.release()
    assert isinstance(late.result(SECONDS), Acquired)
    assert queue.orphans == []


def test_the_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MAX_WAITING", 3)
    gate = Gate()
    queue = Queue(Turnstile(gate))
    first = in_thread(lambda: queue.perform(make_claim("first"), SECONDS))
    assert gate.entered.acquire(timeout=SECONDS)
    waiting = [in_thread(lambda n=n: queue.perform(make_claim(f"{n}"), SECONDS)) for n in range(3)]  # type: ignore[misc]  # mypy#12557
    queue.wait_for_line(3)
    refused = queue.perform(make_claim("one too many"), SECONDS)
    assert isinstance(refused, Unreachable)
    assert "Too many" in str(refused.error)
    gate.active = False
    gate.leave.release()
    assert [type(thread.result(SECONDS)) for thread in [first, *waiting]] == [Acquired] * 4


def test_a_batch_is_bounded_by_the_store() -> None:
    store = Turnstile()
    store.capabilities = in_batches_of(store, 4)
    queue = Queue(store)
    replies = queue.perform_many([make_claim(f"{n}") for n in range(10)], SECONDS)
    assert [type(reply) for reply in replies] == [Acquired] * 10
    assert store.batches == [4, 4, 2]


def in_batches_of(store: Turnstile, max_batch: int) -> Capabilities:
    return replace(store.capabilities, max_batch=max_batch)


# Tasks


async def settle_down() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Lanes(TaskCoalescer):
    def __init__(self, store: OnLoop) -> None:
        self.orphans: list[Claim] = []
        super().__init__(store, lambda claim, reply: self.orphans.append(claim))


class Held:
    """Holds an async store's batches until `go`; then fails them with `error`, if any."""

    def __init__(self, store: OnLoop) -> None:
        self.go = asyncio.Event()
        self.entered = asyncio.Event()
        self.error: Exception | None = None
        store.before = self

    async def __call__(self, name: str, commands: Sequence[Any]) -> None:
        self.entered.set()
        await self.go.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error


async def test_what_comes_meanwhile_travels_together() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    first = lanes.perform(make_claim("first"), SECONDS)
    await held.entered.wait()
    rest = [lanes.perform(make_claim(f"{number % 5}"), SECONDS) for number in range(20)]
    held.go.set()
    replies = await asyncio.gather(first, *rest)
    assert [type(reply) for reply in replies] == [Acquired] * 6 + [Running] * 15
    assert store.sent == [("claim", 1), ("claim", 5)]


async def test_a_failed_batch_fails_each_of_its_callers_and_nobody_else() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    held.error = OSError("gone")
    first, twin = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim(), SECONDS)
    await held.entered.wait()
    later = lanes.perform(make_claim("later"), SECONDS)
    held.go.set()
    assert [type(reply) for reply in await asyncio.gather(first, twin, later)] == [Unreachable, Acquired, Acquired]


async def test_one_bad_item_does_not_fail_its_neighbours() -> None:
    class Picky(OnLoop):
        async def claim(self, claims: Sequence[Claim]) -> Sequence[Any]:
            answers = await super().claim(claims)
            return [OSError("bad") if c.id.startswith(b"bad") else a for c, a in zip(claims, answers, strict=True)]

    lanes = Lanes(Picky())
    replies = await asyncio.gather(*(lanes.perform(make_claim(name), SECONDS) for name in ("a", "bad", "c")))
    assert [type(reply) for reply in replies] == [Acquired, Unreachable, Acquired]


async def test_c3_a_cancelled_claim_that_has_not_left_does_not_leave() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    first = lanes.perform(make_claim("first"), SECONDS)
    await held.entered.wait()
    leader, twin = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim(), SECONDS)
    leader.cancel()
    held.go.set()
    assert isinstance(await first, Acquired)
    assert isinstance(await twin, Acquired)
    assert lanes.orphans == []


async def test_c3_a_cancelled_claim_on_its_way_is_an_orphan() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    claim = make_claim()
    asked = lanes.perform(claim, SECONDS)
    await held.entered.wait()
    asked.cancel()
    held.go.set()
    await settle_down()
    assert lanes.orphans == [claim]


async def test_c3_a_task_that_is_told_it_is_too_late_disowns_its_claim_itself() -> None:
    """It may ask again under the same nonce: releasing that claim behind its back would let another one in."""
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    assert isinstance(await lanes.perform(make_claim(), 0.02), Unreachable)
    held.go.set()
    await settle_down()
    assert store.store.get([make_claim().id])[0] is not None
    assert lanes.orphans == []


def test_c10_a_time_out_is_not_early_on_uvloop() -> None:
    """Its clock is that of the round's beginning; who is told too early asks again, and waits twice."""

    async def main() -> float:
        store = OnLoop()
        Held(store)
        lanes = Lanes(store)
        time.sleep(0.05)  # noqa: ASYNC251  # a busy round of the loop
        began = time.monotonic()
        assert isinstance(await lanes.perform(make_claim(), 0.1), Unreachable)
        return time.monotonic() - began

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) >= 0.1


async def test_the_twins_of_one_key_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_WAITING", 10)
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    first = lanes.perform(make_claim("first"), SECONDS)
    await held.entered.wait()
    asked = [lanes.perform(make_claim("hot"), SECONDS) for _ in range(15)]
    assert [type(await future) for future in asked[10:]] == [Unreachable] * 5
    held.go.set()
    assert [type(reply) for reply in await asyncio.gather(first, *asked[:10])] == [Acquired, Acquired] + [Running] * 9
    await settle_down()
    for number in range(12):
        assert isinstance(await lanes.perform(make_claim(f"{number}"), SECONDS), Acquired)


async def test_a_loop_that_shuts_down_leaves_nobody_waiting() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    flying, twin = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim("b"), SECONDS)
    await held.entered.wait()
    pending = lanes.perform(make_claim("c"), SECONDS)
    later = lanes.perform(make_claim("c", fingerprint=b"\0\0other"), SECONDS)
    [batches] = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    batches.cancel()
    async with asyncio.timeout(1.0):
        replies = await asyncio.gather(flying, twin, pending, later)
    assert [type(reply) for reply in replies] == [Unreachable] * 4
    held.go.set()
    assert isinstance(await lanes.perform(make_claim("d"), SECONDS), Acquired)


# Tasks over a blocking store


async def test_the_bridge_answers_a_batch_as_soon_as_it_is_done() -> None:
    gate = Gate()
    store = Turnstile(gate)
    store.capabilities = in_batches_of(store, 2)
    bridge = Bridge(ThreadCoalescer(store, lambda claim, reply: None), lambda claim, reply: None)
    end = bridge.end()
    first = end.perform(make_claim("first"), SECONDS)
    await asyncio.to_thread(gate.entered.acquire)
    rest = [end.perform(make_claim(f"{n}"), SECONDS) for n in range(4)]
    gate.leave.release(2)  # the first batch, and one of two more
    replies = [await first, await rest[0], await rest[1]]
    assert [type(reply) for reply in replies] == [Acquired] * 3
    assert not rest[2].done()
    gate.leave.release(8)
    assert [type(reply) for reply in await asyncio.gather(*rest)] == [Acquired] * 4
    await asyncio.to_thread(bridge.close)


async def test_who_was_just_answered_travels_with_who_waited_meanwhile() -> None:
    """Otherwise those who were sent together stay together, and two crowds take turns at half the commits' worth."""
    gate = Gate()
    store = Turnstile(gate)
    bridge = Bridge(ThreadCoalescer(store, lambda claim, reply: None), lambda claim, reply: None)
    end = bridge.end()

    async def ask_twice() -> None:
        await end.perform(make_claim("first"), SECONDS)
        await end.perform(make_claim("first again"), SECONDS)

    asking = asyncio.create_task(ask_twice())
    await asyncio.to_thread(gate.entered.acquire)
    waiting = end.perform(make_claim("second"), SECONDS)
    await asyncio.sleep(2 * MOST_BOARDING)
    gate.leave.release(2)
    await asyncio.gather(asking, waiting)
    assert store.batches == [1, 2]
    await asyncio.to_thread(bridge.close)


async def test_c10_a_loop_that_does_not_come_to_its_turn_holds_nobody_up() -> None:
    gate = Gate()
    bridge = Bridge(ThreadCoalescer(Turnstile(gate), lambda claim, reply: None), lambda claim, reply: None)
    end = bridge.end()

    async def ask_from_another_loop() -> Reply:
        return await bridge.end().perform(make_claim("other"), SECONDS)

    first = end.perform(make_claim("first"), SECONDS)
    await asyncio.to_thread(gate.entered.acquire)
    other = in_thread(lambda: asyncio.run(ask_from_another_loop()))
    await asyncio.to_thread(wait_for, lambda: len(bridge.line._pending) == 1)
    gate.leave.release(2)
    assert isinstance(other.result(SECONDS), Acquired)  # while this loop is blocked, and hands nothing out
    assert isinstance(await first, Acquired)
    await asyncio.to_thread(bridge.close)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(int(SECONDS * 1000)):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it did not come to that")


async def test_c3_a_claim_whose_caller_leaves_on_the_bridge_is_an_orphan_or_never_sent() -> None:
    orphans: list[Claim] = []

    def note(claim: Claim, reply: Reply) -> None:
        orphans.append(claim)

    gate = Gate()
    bridge = Bridge(ThreadCoalescer(Turnstile(gate), note), note)
    end = bridge.end()
    flying, waiting = make_claim("flying"), make_claim("waiting")
    sent = end.perform(flying, SECONDS)
    await asyncio.to_thread(gate.entered.acquire)
    unsent = end.perform(waiting, SECONDS)
    sent.cancel()
    unsent.cancel()
    gate.leave.release(2)
    await asyncio.to_thread(bridge.close)
    await settle_down()
    assert orphans == [flying]


async def test_the_twin_of_a_task_that_has_gone_asks_for_itself_on_the_bridge() -> None:
    """That claim is given back; to wait for it would be to wait for nobody."""
    orphans: list[Claim] = []

    def note(claim: Claim, reply: Reply) -> None:
        orphans.append(claim)

    gate = Gate()
    store = Turnstile(gate)
    bridge = Bridge(ThreadCoalescer(store, note), note)
    end = bridge.end()
    first = end.perform(make_claim("first"), SECONDS)
    await asyncio.to_thread(gate.entered.acquire)
    claim = make_claim()
    leader, twin = end.perform(claim, SECONDS), end.perform(make_claim(), SECONDS)
    gate.leave.release()
    await asyncio.to_thread(gate.entered.acquire)
    leader.cancel()
    gate.active = False
    gate.leave.release()
    await asyncio.gather(first, twin)
    assert store.batches == [1, 1, 1]
    await asyncio.to_thread(bridge.close)
    assert orphans == [claim]


def test_c10_a_task_whose_thread_does_not_start_leaves_the_line_to_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood in line behind a batch of a thread, and would have been the next to lead."""
    gate = Gate()
    queue = Queue(Turnstile(gate))
    bridge = Bridge(queue, lambda claim, reply: None)
    sending = in_thread(lambda: queue.perform(make_claim("first"), SECONDS))
    assert gate.entered.acquire(timeout=SECONDS)

    async def ask() -> Reply:
        return await bridge.end().perform(make_claim("refused"), SECONDS)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert isinstance(asyncio.run(ask()), Unreachable)
    queue.wait_for_line(0)
    gate.active = False
    gate.leave.release()
    assert isinstance(sending.result(SECONDS), Acquired)
    assert isinstance(queue.perform(make_claim("later"), SECONDS), Acquired)


async def test_threads_and_tasks_share_a_batch() -> None:
    gate = Gate()
    store = Turnstile(gate)
    queue = Queue(store)
    bridge = Bridge(queue, lambda claim, reply: None)
    sending = in_thread(lambda: queue.perform(make_claim("first"), SECONDS))
    await asyncio.to_thread(gate.entered.acquire)
    task = bridge.end().perform(make_claim("task"), SECONDS)
    waiting = in_thread(lambda: queue.perform_many([make_claim("thread"), make_claim("another")], SECONDS))
    await asyncio.to_thread(queue.wait_for_line, 3)
    gate.active = False
    gate.leave.release()
    assert isinstance(await task, Acquired)
    replies = [await asyncio.to_thread(sending.result), *await asyncio.to_thread(waiting.result)]
    assert [type(reply) for reply in replies] == [Acquired] * 3
    assert store.batches == [1, 3]
    await asyncio.to_thread(bridge.close)


async def test_c10_a_command_that_waits_too_long_on_the_bridge_is_told_so() -> None:
    gate = Gate()
    bridge = Bridge(ThreadCoalescer(Turnstile(gate), lambda claim, reply: None), lambda claim, reply: None)
    end = bridge.end()
    late, patient = end.perform(make_claim("late"), 0.05), end.perform(make_claim("patient"), SECONDS)
    assert isinstance(await late, Unreachable)
    assert not patient.done()
    gate.leave.release(2)
    assert isinstance(await patient, Acquired)
    await asyncio.to_thread(bridge.close)


def test_the_replies_for_a_loop_that_is_closed_are_undone() -> None:
    orphans: list[Claim] = []

    def note(claim: Claim, reply: Reply) -> None:
        orphans.append(claim)

    gate = Gate()
    bridge = Bridge(ThreadCoalescer(Turnstile(gate), note), note)
    claim = make_claim()

    async def ask_and_leave() -> None:
        bridge.end().perform(claim, SECONDS)
        await asyncio.to_thread(gate.entered.acquire)

    asyncio.run(ask_and_leave())
    gate.leave.release()
    bridge.close()
    assert orphans == [claim]


async def test_c12_finished_is_an_answer_for_twins_as_well() -> None:
    store = OnLoop()
    held, lanes = Held(store), Lanes(store)
    claim = make_claim()
    acquired = store.store.claim([claim])[0]
    assert isinstance(acquired, Acquired)
    assert store.store.complete([Complete(claim.id, claim.nonce, acquired.token, b"")]) == [Done()]
    first = lanes.perform(make_claim("first"), SECONDS)
    await held.entered.wait()
    asked = [lanes.perform(make_claim(), SECONDS) for _ in range(3)]
    held.go.set()
    assert isinstance(await first, Acquired)
    assert [reply.result for reply in await asyncio.gather(*asked) if isinstance(reply, Finished)] == [b"", b"", b""]


async def test_an_interruption_while_the_bridges_thread_starts_leaves_one_thread_that_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Ctrl-C does that comes while the start of a thread is waited for: the claim of its caller is given back."""
    store, orphans = Turnstile(), list[Claim]()
    line = ThreadCoalescer(store, lambda claim, reply: orphans.append(claim))
    bridge = Bridge(line, lambda claim, reply: orphans.append(claim))
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise Interrupted

    end = bridge.end()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(Interrupted):
            end.perform(make_claim("a"), SECONDS)
    replies = [await end.perform(make_claim(name), SECONDS) for name in "bc"]
    assert [type(reply) for reply in replies] == [Acquired, Acquired]
    assert sum(thread is bridge._thread for thread in threading.enumerate()) == 1
    bridge.close()
    assert bridge._thread is None


async def test_c10_a_task_whose_command_a_leader_lost_is_told_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that leads is interrupted between taking a batch and handing out its replies."""
    store = Turnstile()
    line = ThreadCoalescer(store, lambda claim, reply: None)
    bridge = Bridge(line, lambda claim, reply: None)
    end = bridge.end()
    hand_out, lost = ThreadCoalescer._hand_out, threading.Event()

    def interrupted(self: ThreadCoalescer) -> None:
        if not lost.is_set():
            lost.set()
            self._flying = ()
            raise Interrupted
        hand_out(self)

    monkeypatch.setattr(ThreadCoalescer, "_hand_out", interrupted)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    reply = await asyncio.wait_for(end.perform(make_claim("a"), 0.2), SECONDS)
    assert isinstance(reply, Unreachable)
    assert reply.sent
    assert isinstance(await end.perform(make_claim("b"), SECONDS), Acquired)
    bridge.close()


async def test_an_interruption_while_replies_are_delivered_loses_nobodys_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that leads for tasks: the next delivery brings what this one left."""
    line = ThreadCoalescer(Turnstile(), lambda claim, reply: None)
    bridge = Bridge(line, lambda claim, reply: None)
    end = bridge.end()
    schedule, struck = end._loop.call_soon_threadsafe, threading.Event()

    def interrupted(callback: Callable[..., Any], *arguments: Any) -> None:
        if not struck.is_set():
            struck.set()
            raise Interrupted
        schedule(callback, *arguments)

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(end._loop, "call_soon_threadsafe", interrupted)
    reply = await asyncio.wait_for(end.perform(make_claim("a"), SECONDS), SECONDS / 2)
    assert isinstance(reply, Acquired)
    assert not end.underway
    monkeypatch.undo()
    await asyncio.to_thread(bridge.close)
