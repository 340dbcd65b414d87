"""The coalescers under pressure: who wakes whom, who is told in time, and what is left over afterwards."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from retryproof.core.commands import (
    Acquired,
    Claim,
    Done,
    FenceReply,
    Lost,
    Release,
    Renew,
    Reply,
    Running,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.stores.keeper import Keeper
from retryproof.stores.lanes import Bridge, BridgeEnd, TaskCoalescer, ThreadCoalescer, bridge, tasks, threads
from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.bridge import _TaskEntry
from retryproof.stores.lanes.tasks import PORTION, WORTH_SPLITTING
from tests.engine.support import SECONDS, OnLoop, Turnstile, hold_of, in_thread, make_claim, wait_until


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
        super().__init__(
            ThreadCoalescer(store, lambda claim, reply: self.orphans.append(claim)),
            lambda claim, reply: self.orphans.append(claim),
        )


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
    lanes = TaskCoalescer(store, lambda claim, reply: None)
    patient = lanes.perform(make_claim("patient"), SECONDS)
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await lanes.perform(make_claim("late"), 0.05), Unreachable)
        assert isinstance(await lanes.perform(make_claim("patient"), 0.05), Unreachable)
    go.set()
    assert isinstance(await patient, Acquired)


async def test_c10_who_comes_after_a_time_out_is_told_in_time_as_well() -> None:
    door, store, go = Door(), OnLoop(), asyncio.Event()
    crossing = Tracked(Turnstile(door))

    async def hold(name: str, commands: Sequence[object]) -> None:
        await go.wait()

    store.before = hold
    lanes, end = TaskCoalescer(store, lambda claim, reply: None), crossing.end()
    late = make_claim("late")
    async with asyncio.timeout(SECONDS / 2):
        for perform in (lanes.perform, end.perform):
            assert isinstance(await perform(late, 0.02), Unreachable)
            assert isinstance(await perform(make_claim("later"), 0.02), Unreachable)
    go.set()
    door.open.set()
    await asyncio.to_thread(crossing.close)
    assert crossing.orphans == []  # C3: who is told that it is too late sees to its claim itself


class Timers:
    """As much of an event loop as an alarm takes."""

    class Timer:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def __init__(self) -> None:
        self.set: list[Timers.Timer] = []

    def call_later(self, delay: float, ring: Callable[[], None]) -> Timer:
        self.set.append(self.Timer())
        return self.set[-1]


def test_an_alarm_has_one_timer() -> None:
    timers = Timers()
    alarm = Alarm(timers, lambda: NEVER)  # type: ignore[arg-type]  # as much of a loop as it takes
    for deadline in (3.0, 2.0, 1.0):
        alarm.set(time.monotonic() + deadline)
    assert [timer.cancelled for timer in timers.set] == [True, True, False]


async def test_c3_a_completion_whose_caller_leaves_before_it_is_sent_is_sent_all_the_same() -> None:
    door = Door()
    store = Turnstile()
    hold = hold_of(store, make_claim())
    store.enter = door
    crossing = Tracked(store)
    end = crossing.end()
    first = end.perform(make_claim("first"), SECONDS)
    await asyncio.to_thread(door.entered.wait, SECONDS)
    end.perform(hold.complete(b"done"), SECONDS).cancel()
    door.open.set()
    assert isinstance(await first, Acquired)
    await asyncio.to_thread(crossing.close)
    [record] = store.get([hold.id])
    assert record is not None
    assert record.result == b"done"


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
    assert not crossing.line._pending
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
    assert keeper._thread is not None
    wait_until(lambda: len(store.renewals) >= 2)
    keeper.close()
    assert store.renewals[0] == 2


class Panic(BaseException):
    """What a driver in another language may raise past every `except Exception`."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_bridge_whose_thread_dies_gets_another() -> None:
    panics: list[Panic] = []

    def fail_once(claims: Sequence[Claim]) -> None:
        if panics:
            raise panics.pop()

    crossing = Tracked(Turnstile(fail_once))
    end = crossing.end()
    assert isinstance(await end.perform(make_claim("warm"), SECONDS), Acquired)
    await asyncio.to_thread(wait_until, lambda: crossing.line.leader is None)
    dying = crossing._thread
    assert dying is not None
    panics.append(Panic("broken"))
    assert isinstance(await end.perform(make_claim("first"), SECONDS), Unreachable)
    async with asyncio.timeout(SECONDS):
        assert isinstance(await end.perform(make_claim(), SECONDS), Acquired)
    assert crossing.orphans == []  # C3: who was told that there is no answer sees to its claim itself
    await asyncio.to_thread(crossing.close)
    await asyncio.to_thread(dying.join, SECONDS)  # what it says at its end belongs to this test


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_c6_a_keeper_whose_thread_dies_gets_another() -> None:
    dying: list[threading.Thread] = []

    class Fragile(Turnstile):
        def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
            if not dying:
                dying.append(threading.current_thread())
                raise Panic("broken")
            return super().renew(commands)

    store = Fragile()
    keeper = Keeper(lambda: store, owns=False, max_batch=16)
    kept = hold_of(store, make_claim(lease=0.3))
    deadline = kept.deadline
    keeper.watch(kept)
    wait_until(lambda: bool(dying))
    dying[0].join(SECONDS)  # what it says at its end belongs to this test
    assert keeper._thread is None
    keeper.watch(hold_of(store, make_claim("other", lease=0.3)))
    wait_until(lambda: kept.deadline > deadline)
    keeper.close()


# Nobody sleeps beside work


class Watched(deque[Any]):
    """The line; `between` is called when the bridge's thread sees for the nth time that the line is empty."""

    def __init__(self, number: int, between: Callable[[], None]) -> None:
        super().__init__()
        self.seen = 0
        self._number = number
        self._between = between

    def __bool__(self) -> bool:
        full = len(self) > 0
        if not full and threading.current_thread().name == "retryproof-store":
            self.seen += 1
            if self.seen == self._number:
                self._between()
        return full


@pytest.mark.parametrize("number", [1, 2])
async def test_a_command_that_comes_while_the_lead_is_laid_down_is_seen(number: int) -> None:
    """Where it finds a leader it wakes nobody; so who leads looks again once nobody leads.

    number: the thread sees an empty line when it has its batch, and when it lays down the lead.
    """
    crossing = Tracked(Turnstile())
    end, future = crossing.end(), asyncio.get_running_loop().create_future()
    last = _TaskEntry(make_claim("last"), end, future, time.monotonic() + SECONDS, SECONDS)

    def come() -> None:
        sender = threading.Thread(target=crossing.send, args=(last,), daemon=True)
        sender.start()
        sender.join(0.1)  # it has sent, or waits for the lock that this thread has

    line = crossing.line._pending = Watched(number, come)
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await end.perform(make_claim("first"), SECONDS), Acquired)
        assert isinstance(await future, Acquired)
    assert line.seen >= number
    await asyncio.to_thread(crossing.close)


async def test_a_command_that_comes_as_the_thread_ends_is_seen() -> None:
    """Its caller is past the append, and has not looked yet who leads, when the thread wakes up to end."""
    crossing = Tracked(Turnstile())
    end, loop = crossing.end(), asyncio.get_running_loop()
    late = _TaskEntry(make_claim("late"), end, loop.create_future(), time.monotonic() + SECONDS, SECONDS)
    idle: list[str] = []

    class Ready:
        """As much of the lock as it takes."""

        def locked(self) -> bool:
            return True

        def release(self) -> None:
            """Nobody waits."""

        def acquire(self, timeout: float) -> bool:
            idle.append("once more" if idle else "idle")
            if len(idle) == 1:
                crossing.line._pending.append(late)
                return False
            if len(idle) == 2:
                with crossing.line.mutex:
                    crossing.line._pass_on()
            time.sleep(0.001)
            return True

    crossing._ready = Ready()  # type: ignore[assignment]  # as above
    end.perform(make_claim(), SECONDS)
    async with asyncio.timeout(SECONDS):
        assert isinstance(await late.future, Acquired)
    assert idle[:2] == ["idle", "once more"]
    await asyncio.to_thread(crossing.close)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("seed", range(3))
def test_many_loops_lose_no_command_while_threads_start_and_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends whenever there is a short pause; cancellation comes at any time; every claim has an owner."""
    monkeypatch.setattr(bridge, "IDLE_SECONDS", 0.0002)
    store = Turnstile()
    crossing = Tracked(store)
    held: list[Claim] = []

    def run_loop(number: int) -> None:
        asyncio.run(visit(crossing, random.Random(seed * 10 + number), number, held))

    loops = [in_thread(lambda number=number: run_loop(number)) for number in range(3)]  # type: ignore[misc]  # mypy#12557
    for loop in loops:
        loop.result(30.0)
    crossing.close()
    assert crossing._thread is None
    assert not crossing._ends
    assert not crossing.line._pending
    taken = {record.nonce for record in store.scan(limit=10_000)}
    owned = {claim.nonce for claim in [*held, *crossing.orphans]}
    assert taken <= owned  # C3: a claim that stands has been told to somebody, or to the keeper
    assert len(held) == len({claim.id for claim in held})  # C1


async def visit(crossing: Bridge, dice: random.Random, number: int, held: list[Claim]) -> None:
    """Ask in bursts, leave now and then, and rest for about as long as the thread does before it ends."""
    end = crossing.end()

    async def ask(claim: Claim) -> None:
        asked = end.perform(claim, SECONDS)
        try:
            reply = await asked
        except asyncio.CancelledError:
            if asked.done() and not asked.cancelled() and isinstance(asked.result(), Acquired):
                held.append(claim)  # as the pump, which then disowns it
            raise
        assert isinstance(reply, Acquired | Running), reply
        if isinstance(reply, Acquired):
            held.append(claim)

    for turn in range(150):
        burst = [
            asyncio.ensure_future(ask(make_claim(f"{turn}-{dice.randrange(3)}"))) for _ in range(dice.randrange(1, 6))
        ]
        await asyncio.sleep(dice.choice((0.0, 0.0, 0.0002)))
        for task in burst:
            if dice.random() < 0.3:
                task.cancel()
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*burst, return_exceptions=True)
        for task in burst:
            assert task.cancelled() or task.exception() is None
        await asyncio.sleep(dice.choice((0.0, 0.0001, 0.0003)))


async def test_c3_of_those_who_leave_in_storms_nothing_is_sent() -> None:
    door = Door()
    store = Turnstile(door)
    crossing = Tracked(store)
    end = crossing.end()
    stays = end.perform(make_claim("stays"), SECONDS)
    await asyncio.to_thread(door.entered.wait, SECONDS)
    for number in range(2_000):
        end.perform(make_claim(f"{number}"), 0.1).cancel()
    last = end.perform(make_claim("last"), 0.15)
    assert isinstance(await last, Unreachable)
    door.open.set()
    assert isinstance(await stays, Acquired)
    await asyncio.to_thread(crossing.close)
    assert not crossing.line._pending
    assert store.batches == [1]
    assert crossing.orphans == []


def test_the_line_of_the_bridge_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MAX_WAITING", 3)

    async def main() -> list[Reply]:
        door = Door()
        crossing = Tracked(Turnstile(door))
        end = crossing.end()
        first = end.perform(make_claim("first"), SECONDS)
        await asyncio.to_thread(door.entered.wait, SECONDS)
        rest = [end.perform(make_claim(f"{number}"), SECONDS) for number in range(5)]
        assert [future.done() for future in rest] == [False] * 3 + [True] * 2
        door.open.set()
        replies = await asyncio.gather(first, *rest)
        await asyncio.to_thread(crossing.close)
        return replies

    assert [type(reply) for reply in asyncio.run(main())] == [Acquired] * 4 + [Unreachable] * 2


# Twins of tasks


class Lanes(TaskCoalescer):
    def __init__(self, store: OnLoop) -> None:
        self.orphans: list[Claim] = []
        super().__init__(store, lambda claim, reply: self.orphans.append(claim))


class Held(OnLoop):
    """An async store whose batches wait until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.entered = asyncio.Event(), asyncio.Event()
        self.before = self.wait

    async def wait(self, name: str, commands: Sequence[object]) -> None:
        self.entered.set()
        await self.go.wait()


async def test_c10_twins_and_those_who_come_later_are_told_in_time() -> None:
    store = Held()
    lanes = Lanes(store)
    first = lanes.perform(make_claim("first"), SECONDS)
    await store.entered.wait()
    leader = lanes.perform(make_claim(), SECONDS)
    impatient = [lanes.perform(make_claim(), 0.05), lanes.perform(make_claim(fingerprint=b"\0\0other"), 0.05)]
    async with asyncio.timeout(SECONDS / 2):
        assert [type(reply) for reply in await asyncio.gather(*impatient)] == [Unreachable] * 2
    store.go.set()
    assert [type(reply) for reply in await asyncio.gather(first, leader)] == [Acquired] * 2


async def test_the_twin_of_a_claim_whose_caller_has_gone_asks_for_itself() -> None:
    """That claim is given back; to wait for it would be to wait for nobody."""
    store = Held()
    lanes = Lanes(store)
    leader, twin = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim(), SECONDS)
    await store.entered.wait()
    leader.cancel()
    store.go.set()
    await twin
    assert store.sent == [("claim", 1), ("claim", 1)]


async def test_twins_that_were_answered_count_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_WAITING", 4)
    lanes = Lanes(OnLoop())
    for turn in range(4):
        replies = await asyncio.gather(*(lanes.perform(make_claim(f"{turn}"), SECONDS) for _ in range(3)))
        assert [type(reply) for reply in replies] == [Acquired, Running, Running]


# Replies in portions


def batches_of(lanes: Lanes) -> asyncio.Task[Any]:
    """The task that sends."""
    [task] = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return task


async def test_a_large_batch_is_answered_in_two_portions_and_the_first_asks_while_the_second_waits() -> None:
    """What the first half asks next is a batch of its own, sent as soon as the second half has its replies."""
    store = OnLoop()
    lanes = Lanes(store)
    order: list[int] = []

    async def visit(number: int) -> None:
        assert isinstance(await lanes.perform(make_claim(f"{number}"), SECONDS), Acquired)
        order.append(number)
        assert isinstance(await lanes.perform(make_claim(f"{number} again"), SECONDS), Acquired)

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(visit(number) for number in range(WORTH_SPLITTING)))
    half = WORTH_SPLITTING // 2
    assert store.sent == [("claim", WORTH_SPLITTING), ("claim", half), ("claim", half)]
    assert order == list(range(WORTH_SPLITTING))


async def ask_twice(lanes: Lanes, number: int) -> None:
    await lanes.perform(make_claim(f"{number}"), SECONDS)
    await lanes.perform(make_claim(f"{number} again"), SECONDS)


async def test_a_small_batch_is_answered_at_once_and_asks_together() -> None:
    store = OnLoop()
    lanes = Lanes(store)

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(ask_twice(lanes, number) for number in range(WORTH_SPLITTING - 1)))
    assert store.sent == [("claim", WORTH_SPLITTING - 1)] * 2


async def test_a_batch_of_many_is_answered_in_portions_of_bounded_size() -> None:
    """A store that is asked next by half of hundreds would wait for that half, and they for it."""
    store = OnLoop()
    lanes = Lanes(store)
    count = 3 * PORTION + 1

    async def visit(number: int) -> None:
        assert isinstance(await lanes.perform(make_claim(f"{number}"), SECONDS), Acquired)
        release = Release(make_claim(f"{number}").id, bytes(16), 1)
        assert isinstance(await lanes.perform(release, SECONDS), Done | Lost)

    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(visit(number) for number in range(count)))
    assert store.sent[0] == ("claim", count)
    assert store.sent[1] == ("release", PORTION)
    assert sum(size for kind, size in store.sent if kind == "release") == count


async def test_who_waits_is_sent_before_those_ask_again_who_were_just_answered() -> None:
    """Otherwise all callers would end up in one crowd, and the store would be idle while they work."""
    store = Held()
    lanes = Lanes(store)

    async with asyncio.timeout(SECONDS):
        asking = asyncio.gather(*(ask_twice(lanes, number) for number in range(WORTH_SPLITTING)))
        await store.entered.wait()
        late = lanes.perform(make_claim("late"), SECONDS)
        store.go.set()
        await asyncio.gather(asking, late)
    assert store.sent == [("claim", WORTH_SPLITTING), ("claim", 1), ("claim", WORTH_SPLITTING)]


async def test_c10_replies_that_are_here_are_not_overdue_while_others_work() -> None:
    """Told that the store did not answer, a caller would disown a claim that it holds."""
    lanes = Lanes(OnLoop())

    async def visit(number: int) -> Reply:
        reply = await lanes.perform(make_claim(f"{number}"), 0.05)
        if number == 0:
            time.sleep(0.1)  # noqa: ASYNC251  # a handler that computes
            await asyncio.sleep(0)
        return reply

    async with asyncio.timeout(SECONDS):
        replies = await asyncio.gather(*(visit(number) for number in range(4 * PORTION)))
    assert {type(reply) for reply in replies} == {Acquired}


async def test_twins_of_a_claim_that_fails_give_way_to_the_loop() -> None:
    """Each has to ask for itself, and a store that fails at once never gives way."""
    store = OnLoop()
    store.before = fail
    lanes = Lanes(store)
    rounds = 0

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_rounds())
    async with asyncio.timeout(SECONDS):
        replies = await asyncio.gather(*(lanes.perform(make_claim(), SECONDS) for _ in range(100)))
    counting.cancel()
    assert {type(reply) for reply in replies} == {Unreachable}
    assert rounds >= 100


def fail(name: str, commands: Sequence[object]) -> Any:
    raise StoreUnavailable("The pool is closed.")


async def test_c10_a_twin_that_asks_again_is_told_in_time_whenever_the_alarm_has_rung() -> None:
    """Even when it rang while the replies of the batch before were being handed out."""
    store = OnLoop()
    lanes = Lanes(store)
    calls = 0

    async def fail_then_hang(name: str, commands: Sequence[object]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(0.05)
            raise OSError
        await asyncio.sleep(SECONDS)

    store.before = fail_then_hang
    asked = [lanes.perform(make_claim(f"{number}"), 0.1) for number in range(3 * PORTION + 1)]
    twin = lanes.perform(make_claim(f"{3 * PORTION}"), 0.3)

    async def compute() -> None:
        await asked[0]
        time.sleep(0.15)  # noqa: ASYNC251  # past the time-out of the first, and its alarm

    await asyncio.gather(asyncio.create_task(compute()), *asked)
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await twin, Unreachable)
    assert calls == 2


async def test_c3_everybody_is_answered_although_a_claim_cannot_be_disowned() -> None:
    store = Held()
    lanes = Lanes(store)
    asked = [lanes.perform(make_claim(f"{number}"), SECONDS) for number in range(10)]
    await store.entered.wait()
    asked[3].cancel()

    def orphaned(claim: Claim, reply: Reply) -> None:
        raise MemoryError

    sending = batches_of(lanes)
    lanes.orphaned = orphaned
    store.go.set()
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*asked[:3], *asked[4:])
        with pytest.raises(MemoryError):
            await sending


class Odd(OnLoop):
    """Answers with whatever `shape` makes of the answers."""

    def __init__(self, shape: Callable[[Sequence[Any]], Any]) -> None:
        super().__init__()
        self.shape = shape

    async def _call(self, name: str, commands: Sequence[Any]) -> Any:
        return self.shape(await super()._call(name, commands))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (tuple, Acquired),
        (deque, Acquired),
        (iter, Acquired),
        (lambda answers: None, Unreachable),
        (lambda answers: answers[1:], Unreachable),
    ],
    ids=["tuple", "deque", "iterator", "none", "one too few"],
)
async def test_c10_answers_of_any_shape_are_handed_out_or_definite(shape: Any, told: type) -> None:
    lanes = Lanes(Odd(shape))
    async with asyncio.timeout(SECONDS):
        replies = await asyncio.gather(*(lanes.perform(make_claim(f"{number}"), SECONDS) for number in range(20)))
        again = await lanes.perform(make_claim("again"), SECONDS)
    assert {type(reply) for reply in [*replies, again]} == {told}


async def between_the_portions(lanes: Lanes, count: int = WORTH_SPLITTING) -> tuple[list[Claim], list[Any]]:
    """Claims on their way, of which the first half has its replies."""
    claims = [make_claim(f"{number}") for number in range(count)]
    asked = [lanes.perform(claim, SECONDS) for claim in claims]
    await asked[0]
    assert [future.done() for future in asked] == [True] * (count // 2) + [False] * (count - count // 2)
    return claims, asked


async def test_c3_who_leaves_between_the_portions_has_its_claim_released() -> None:
    lanes = Lanes(OnLoop())
    claims, asked = await between_the_portions(lanes)
    asked[-1].cancel()
    replies = await asyncio.gather(*asked[:-1])
    assert [type(reply) for reply in replies] == [Acquired] * (WORTH_SPLITTING - 1)
    assert lanes.orphans == claims[-1:]


async def test_c3_a_loop_that_shuts_down_between_the_portions_leaves_nobody_waiting_and_nothing_held() -> None:
    lanes = Lanes(OnLoop())
    claims, asked = await between_the_portions(lanes)
    asked[-1].cancel()
    pending = lanes.perform(make_claim("pending"), SECONDS)
    batches_of(lanes).cancel()
    async with asyncio.timeout(SECONDS):
        replies = await asyncio.gather(*asked[:-1], pending)
    half = WORTH_SPLITTING // 2
    assert [type(reply) for reply in replies] == [Acquired] * half + [Unreachable] * half
    assert lanes.orphans == claims[-1:]


async def test_c3_who_left_before_the_portions_is_disowned_once_though_the_loop_shuts_down() -> None:
    store = Held()
    lanes = Lanes(store)
    claims = [make_claim(f"{number}") for number in range(WORTH_SPLITTING)]
    asked = [lanes.perform(claim, SECONDS) for claim in claims]
    await store.entered.wait()
    asked[0].cancel()
    store.go.set()
    await asked[1]
    batches_of(lanes).cancel()
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*asked[1:])
    assert lanes.orphans == claims[:1]


@pytest.mark.parametrize("sent", [True, False])
async def test_c3_a_loop_that_shuts_down_tells_what_is_on_its_way_and_what_is_not_sent(sent: bool) -> None:
    store = Held()
    lanes = Lanes(store)
    stays, leaves = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim("gone"), SECONDS)
    twin = lanes.perform(make_claim(), SECONDS)
    if sent:
        await store.entered.wait()
    leaves.cancel()
    batches_of(lanes).cancel()
    store.go.set()
    async with asyncio.timeout(SECONDS):
        replies = [await stays, await twin]
        assert isinstance(await lanes.perform(make_claim("later"), SECONDS), Acquired)
    assert [type(reply) for reply in replies] == [Unreachable] * 2
    assert [claim.id for claim in lanes.orphans] == [make_claim("gone").id]


# Loops that end


@pytest.mark.parametrize("trigger", ["next command", "end of the thread"])
def test_c3_a_claim_whose_loop_was_closed_before_it_handed_out_the_reply_is_an_orphan(
    trigger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop had stopped and was not closed yet when it was given the reply."""
    monkeypatch.setattr(bridge, "IDLE_SECONDS", 10 * SECONDS)
    door = Door()
    crossing = Tracked(Turnstile(door))
    claim = make_claim()
    loop = asyncio.new_event_loop()

    async def ask() -> BridgeEnd:
        end = crossing.end()
        end.perform(claim, SECONDS)
        return end

    end = loop.run_until_complete(ask())
    assert door.entered.wait(SECONDS)
    door.open.set()
    wait_until(lambda: bool(end.underway))
    loop.close()

    async def ask_another() -> Reply:
        return await crossing.end().perform(make_claim("another"), SECONDS)

    if trigger == "next command":
        assert isinstance(asyncio.run(ask_another()), Acquired)
        wait_until(lambda: bool(crossing.orphans))
    else:
        crossing.close()
    crossing.close()
    assert crossing.orphans == [claim]
    assert not crossing._ends
