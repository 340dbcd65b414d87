"""Callers that leave: no result is lost, and no lease is left that nobody releases or settles."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.commands import Complete, FenceReply
from retryproof.core.record import Record, State
from retryproof.stores.memory import MemoryStore
from tests.engine.support import SECONDS, Events, OnLoop, Turnstile, in_thread

T = TypeVar("T")

MOST_ROUNDS = 200
"""More rounds of the loop than an operation here takes; the sweep ends with the first that was not cancelled."""


async def until_settled(store: MemoryStore, id: bytes, *states: State | None) -> bool:
    """True once the record's state is one of these (None: there is no record); orphans may take a while."""
    record: Record | None
    async with asyncio.timeout(SECONDS):
        while True:
            [record] = store.get([id])
            if (None if record is None else record.state) in states:
                return True
            await asyncio.sleep(0.005)


class Slow(OnLoop):
    """Takes a few rounds of the loop for each call, before and after it is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self._wait

    async def _wait(self, name: str, commands: Sequence[Any]) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def _call(self, name: str, commands: Sequence[Any]) -> Sequence[Any]:
        answers = await super()._call(name, commands)
        await self._wait(name, commands)
        return answers


class Journal:
    """A handler that takes a few rounds, and what became of it."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = 0

    async def __call__(self) -> int:
        self.began += 1
        for _ in range(3):
            await asyncio.sleep(0)
        self.ended += 1
        return self.ended


async def check_cancelled_after(rounds: int, store: MemoryStore, engine: AsyncIdempotency, key: str) -> bool:
    """Cancel a run after so many rounds of the loop, and check what is left; whether it was cancelled in time."""
    journal, id = Journal(), engine.id_of("s", key)
    running = asyncio.ensure_future(engine.run(key, journal, scope="s"))
    for _ in range(rounds):
        await asyncio.sleep(0)
    cancelled = running.cancel()
    await asyncio.wait({running})
    if journal.began == 0:
        # No effect: whatever was claimed is given back.
        assert await until_settled(store, id, None, State.RELEASED)
    elif journal.ended == 0:
        # Cancelled in the handler: its effect may have happened, so the record says "in progress" (C5).
        assert await until_settled(store, id, State.IN_PROGRESS)
    else:
        assert await until_settled(store, id, State.COMPLETED)
        assert (await engine.run(key, journal, scope="s")).value == 1
        assert journal.began == 1
    return cancelled and running.cancelled()


@pytest.mark.parametrize("kind", ["loop", "bridge", "memory"])
async def test_c3_c5_cancelled_after_any_number_of_rounds(kind: str) -> None:
    stores: dict[str, Any] = {"loop": Slow(), "bridge": Turnstile(), "memory": MemoryStore()}
    store = stores[kind]
    engine = AsyncIdempotency(store)
    records: MemoryStore = store.store if isinstance(store, OnLoop) else store
    await engine.run("warm", lambda: None, scope="s")
    for rounds in range(MOST_ROUNDS):
        if not await check_cancelled_after(rounds, records, engine, f"k{rounds}"):
            break
    else:
        assert kind == "bridge"  # a thread takes as many rounds as it likes
    assert kind == "memory" or rounds > 3


def cancel_after(rounds: int, task: asyncio.Future[Any]) -> None:
    """Cancel a task after so many rounds of the loop."""
    if rounds == 0:
        task.cancel()
    else:
        asyncio.get_running_loop().call_soon(cancel_after, rounds - 1, task)


@pytest.mark.parametrize("rounds", range(6))
async def test_c3_a_cancellation_that_meets_the_claims_reply_releases_the_claim(rounds: int) -> None:
    """The reply is set in one round of the loop and read in the next; a cancellation in between loses it."""
    store, inside = OnLoop(), asyncio.Event()
    engine = AsyncIdempotency(store)

    async def fn() -> None:
        inside.set()
        await asyncio.Event().wait()

    running = asyncio.ensure_future(engine.run("k", fn, scope="s"))

    async def before(name: str, commands: Sequence[Any]) -> None:
        store.before = None
        cancel_after(rounds, running)

    store.before = before
    await asyncio.wait({running})
    assert running.cancelled()
    left = State.IN_PROGRESS if inside.is_set() else State.RELEASED
    assert await until_settled(store.store, engine.id_of("s", "k"), left)


async def test_c5_cancellation_keeps_the_record_and_the_policy_may_release_it() -> None:
    for releases, state in ((False, State.IN_PROGRESS), (True, State.RELEASED)):
        store = MemoryStore()
        engine = AsyncIdempotency(store, policy=Policy(release_on_cancel=releases))
        inside = asyncio.Event()

        async def fn(inside: asyncio.Event = inside) -> None:
            inside.set()
            await asyncio.Event().wait()

        running = asyncio.ensure_future(engine.run("k", fn, scope="s"))
        await inside.wait()
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled()
        assert await until_settled(store, engine.id_of("s", "k"), state)


async def test_a_time_out_around_a_run_is_a_cancellation_like_any_other() -> None:
    engine = AsyncIdempotency(MemoryStore())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await engine.run("k", asyncio.Event().wait, scope="s")
    with pytest.raises(errors.InProgress):
        await engine.run("k", lambda: 1, scope="s")


async def test_a_second_cancellation_does_not_wait_and_loses_nothing() -> None:
    store = OnLoop()
    engine = AsyncIdempotency(store)
    completing, go = asyncio.Event(), asyncio.Event()

    async def hold(name: str, commands: Sequence[Any]) -> None:
        if name == "complete":
            completing.set()
            await go.wait()

    store.before = hold
    running = asyncio.ensure_future(engine.run("k", lambda: 0, scope="s"))
    await completing.wait()
    running.cancel()
    await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.wait({running}, timeout=SECONDS)
    assert running.cancelled()
    go.set()
    assert await until_settled(store.store, engine.id_of("s", "k"), State.COMPLETED)


def test_a_loop_that_ends_while_a_result_is_being_stored_does_not_lose_it() -> None:
    """asyncio.run cancels what is left; the keeper goes on."""
    store = OnLoop()
    engine = AsyncIdempotency(store)
    events: list[int] = []

    async def main() -> None:
        completing = asyncio.Event()

        async def hang(name: str, commands: Sequence[Any]) -> None:
            if name == "complete":
                completing.set()
                await asyncio.Event().wait()

        store.before = hang
        running = asyncio.ensure_future(engine.run("k", lambda: events.append(1), scope="s"))
        await completing.wait()
        running.cancel()
        await asyncio.sleep(0)
        running.cancel()

    asyncio.run(main())
    assert events == [1]
    asyncio.run(wait_completed(store.store, engine.id_of("s", "k")))


async def wait_completed(store: MemoryStore, id: bytes) -> None:
    assert await until_settled(store, id, State.COMPLETED)


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, where a test wants it."""


def test_c5_ctrl_c_in_a_function_keeps_its_record() -> None:
    store, engine_events = MemoryStore(), Events()
    engine = Idempotency(store, events=(engine_events,))

    def fn() -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        engine.run("k", fn, scope="s")
    with pytest.raises(errors.InProgress):
        engine.run("k", lambda: 1, scope="s")
    assert engine_events.kinds == ["unknown", "in_progress"]


def test_ctrl_c_while_a_result_is_being_stored_does_not_lose_it() -> None:
    class Interrupting(Turnstile):
        left = 1

        def complete(self, commands: Sequence[Complete]) -> Sequence[FenceReply]:
            if self.left:
                self.left -= 1
                raise Interrupt
            return super().complete(commands)

    store, events = Interrupting(), Events()
    engine = Idempotency(store, events=(events,))
    with pytest.raises(Interrupt):
        engine.run("k", lambda: 0, scope="s")
    events.wait_for("stored_late")
    outcome = engine.run("k", lambda: 1, scope="s")
    assert (outcome.value, outcome.replayed) == (0, True)


def test_ctrl_c_while_claiming_gives_the_claim_back() -> None:
    interrupts = [Interrupt()]
    store = Turnstile()

    def claimed_then_interrupted(claims: Sequence[Any]) -> None:
        if interrupts:
            MemoryStore.claim(store, claims)
            raise interrupts.pop()

    store.enter = claimed_then_interrupted
    engine = Idempotency(store)
    with pytest.raises(Interrupt):
        engine.run("k", lambda: 1, scope="s")
    asyncio.run(wait_released(store, engine.id_of("s", "k")))


async def wait_released(store: MemoryStore, id: bytes) -> None:
    assert await until_settled(store, id, State.RELEASED)


# Steps


async def test_c14_a_step_of_the_wrong_colour_is_refused_before_it_runs() -> None:
    ran: list[str] = []
    engine = AsyncIdempotency(MemoryStore())

    def blocking() -> None:
        current_operation().step("charge", lambda key: ran.append("step"))

    with pytest.raises(errors.ConfigurationError, match="astep"):
        await engine.run("k", blocking, scope="s")
    assert ran == []


def test_c14_an_async_step_of_a_sync_engine_is_refused_before_it_runs() -> None:
    ran: list[str] = []

    async def charge(key: object) -> None:
        ran.append("astep")

    def fn() -> None:
        asyncio.run(current_operation().astep("charge", charge))

    with pytest.raises(errors.ConfigurationError, match="sync engine"):
        Idempotency(MemoryStore()).run("k", fn, scope="s")
    assert ran == []


async def test_c14_an_async_step_in_a_loop_of_its_own_is_refused_before_it_runs() -> None:
    ran: list[str] = []

    async def charge(key: object) -> None:
        ran.append("astep")

    async def fn() -> None:
        operation = current_operation()
        await asyncio.to_thread(lambda: asyncio.run(operation.astep("charge", charge)))

    with pytest.raises(errors.ConfigurationError, match="event loop"):
        await AsyncIdempotency(MemoryStore()).run("k", fn, scope="s")
    assert ran == []


async def test_c14_a_step_may_run_in_a_thread_of_the_handler() -> None:
    async def fn() -> int:
        operation = current_operation()
        return await asyncio.to_thread(lambda: operation.step("charge", lambda key: 7))

    assert (await AsyncIdempotency(MemoryStore()).run("k", fn, scope="s")).value == 7


def test_c18_waiters_in_threads_are_counted_right() -> None:
    engine = Idempotency(MemoryStore(), policy=Policy(wait=5.0, poll=0.001, max_waiters=64))
    leave = threading.Event()
    first = in_thread(lambda: engine.run("k", lambda: leave.wait(SECONDS), scope="s"))
    waiting = [in_thread(lambda: engine.run("k", lambda: 0, scope="s").replayed) for _ in range(16)]
    threading.Event().wait(0.2)
    leave.set()
    first.result(SECONDS)
    assert [thread.result(SECONDS) for thread in waiting].count(True) >= 15
    assert engine.attempts.waiters.count == 0


async def charged() -> str:
    await asyncio.sleep(0)
    return "charged"


def step_in_contexts_of_their_own(run: Coroutine[Any, Any, T]) -> T:
    try:
        while True:
            contextvars.copy_context().run(run.send, None)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def test_c5_what_goes_wrong_beside_a_function_is_no_failure_of_the_function() -> None:
    """Stepped in another context, the run cannot leave the one that it entered."""
    store = MemoryStore()
    engine = AsyncIdempotency(store)
    assert step_in_contexts_of_their_own(engine.run("k", charged, scope="s")).value == "charged"
    [record] = store.get([engine.id_of("s", "k")])
    assert record is not None
    assert record.state is State.COMPLETED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_c5_a_run_whose_loop_is_gone_is_not_given_back() -> None:
    """The garbage collector closes it, in a context that is not its own; what it did stands."""
    store = MemoryStore()
    engine = AsyncIdempotency(store, policy=Policy(on_lease_lost="continue"))

    async def start() -> None:
        began = asyncio.Event()

        async def never_ends() -> None:
            began.set()
            await asyncio.get_running_loop().create_future()

        running = asyncio.ensure_future(engine.run("k", never_ends, scope="s"))
        await began.wait()
        assert not running.done()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    loop.close()
    gc.collect()
    [record] = store.get([engine.id_of("s", "k")])
    assert record is not None
    assert record.state is State.IN_PROGRESS
