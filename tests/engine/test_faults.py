"""Leases, lost replies and stores out of reach, as the engines meet them (C3, C4, C6, C8, C10)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import uvloop

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.commands import Checkpoint, Complete, FenceReply, Renew
from retryproof.core.record import State
from retryproof.stores.sql.migrate import migrate
from retryproof.testing.link import FaultLink
from tests.engine.conftest import MakeCaller
from tests.engine.support import SECONDS, Events, OnLoop, Shared, Turnstile, in_thread

# Lost replies


@pytest.fixture(params=["redis", "postgres"])
def linked(request: pytest.FixtureRequest) -> Iterator[tuple[FaultLink, str]]:
    """A server behind a link that fails as told, and its URL through that link."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "postgres":
        migrate(url)
    parts = urlsplit(url)
    assert parts.hostname is not None
    with FaultLink(parts.hostname, parts.port or 0) as link:
        user = parts.netloc.rpartition("@")[0]
        netloc = f"{user}@{link.host}:{link.port}" if user else f"{link.host}:{link.port}"
        yield link, urlunsplit(parts._replace(netloc=netloc))


@pytest.mark.parametrize("fault", ["lose_reply", "reset"])
@pytest.mark.parametrize("call", ["claim", "complete", "step"])
def test_c3_a_lost_reply_changes_nothing(
    linked: tuple[FaultLink, str], make_caller: MakeCaller, call: str, fault: str
) -> None:
    """The same answer, the effect once, in the first attempt; whether the request was applied or not."""
    link, url = linked
    caller, effects = make_caller(url), list[str]()
    caller.run("warm", lambda: 0)

    def fail_next(at: str) -> None:
        if at == call:
            getattr(link, fault)(times=1)

    def charge() -> int:
        fail_next("step")
        current_operation().step("pay", lambda key: effects.append("paid"))
        effects.append("charged")
        fail_next("complete")
        return 7

    fail_next("claim")
    outcome = caller.run("k", charge)
    assert (outcome.value, outcome.replayed, outcome.attempt) == (7, False, 1)
    assert link.stats[fault] == 1
    replay = caller.run("k", charge)
    assert (replay.value, replay.replayed) == (7, True)
    assert effects == ["paid", "charged"]


def test_c3_a_lost_replay_is_asked_for_again(linked: tuple[FaultLink, str], make_caller: MakeCaller) -> None:
    link, url = linked
    caller = make_caller(url)
    caller.run("k", lambda: 7)
    link.lose_reply(times=1)
    assert caller.run("k", lambda: 8).value == 7


def test_c10_a_store_out_of_reach_before_the_claim_runs_nothing(
    linked: tuple[FaultLink, str], make_caller: MakeCaller
) -> None:
    link, url = linked
    caller = make_caller(url, store_timeout=0.5)
    caller.run("warm", lambda: 0)
    link.refuse()
    link.reset_all()
    with pytest.raises(errors.StoreUnavailable) as down:
        caller.run("k", lambda: pytest.fail("it ran"))
    assert down.value.retry_after == 1.0
    assert caller.events.kinds[-1] == "store_error"
    link.heal()
    assert run_until_up(lambda: caller.run("k", lambda: 7).value) == 7


@pytest.mark.quiet
def test_c10_a_hung_store_is_an_error_in_time(linked: tuple[FaultLink, str], make_caller: MakeCaller) -> None:
    link, url = linked
    caller = make_caller(url, store_timeout=0.3)
    caller.run("warm", lambda: 0)
    link.black_hole()
    began = time.monotonic()
    with pytest.raises(errors.StoreUnavailable):
        caller.run("k", lambda: pytest.fail("it ran"))
    assert time.monotonic() - began < 0.3 + 1.0
    link.heal()
    link.reset_all()
    assert run_until_up(lambda: caller.run("k", lambda: 7).value) == 7


@pytest.mark.quiet
def test_c10_after_the_effect_the_result_is_given_and_stored_late(
    linked: tuple[FaultLink, str], make_caller: MakeCaller
) -> None:
    link, url = linked
    caller = make_caller(url, store_timeout=0.3, complete_timeout=0.4)
    caller.run("warm", lambda: 0)

    def charge() -> int:
        link.refuse()
        link.reset_all()
        return 7

    began = time.monotonic()
    outcome = caller.run("k", charge)
    assert (outcome.value, outcome.replayed) == (7, False)
    assert 0.2 < time.monotonic() - began < 0.4 + 0.3 + 1.5
    assert caller.events.kinds[-1] == "unstored"
    link.heal()
    caller.events.wait_for("stored_late")
    assert run_until_up(lambda: caller.run("k", charge).value) == 7


def test_c10_a_release_lingers(linked: tuple[FaultLink, str], make_caller: MakeCaller) -> None:
    link, url = linked
    caller = make_caller(url, store_timeout=0.3, complete_timeout=0.2)
    caller.run("warm", lambda: 0)

    def fail() -> None:
        link.refuse()
        link.reset_all()
        raise OSError("no money")

    with pytest.raises(OSError, match="no money"):
        caller.run("k", fail)
    link.heal()
    assert run_until_up(lambda: caller.run("k", lambda: 7).attempt) == 1


def run_until_up(call: Callable[[], Any]) -> Any:
    """Try again as a client does while the store comes back, or an earlier attempt is given back."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return call()
        except (errors.StoreUnavailable, errors.InProgress):
            assert time.monotonic() < deadline
            time.sleep(0.02)


# Stored before seen


async def test_c4_nobody_has_the_result_before_it_is_stored() -> None:
    store, go, completing = OnLoop(), asyncio.Event(), asyncio.Event()

    async def hold(name: str, commands: Sequence[Any]) -> None:
        if name == "complete":
            completing.set()
            await go.wait()

    store.before = hold
    engine = AsyncIdempotency(store)
    running = asyncio.ensure_future(engine.run("k", lambda: 7, scope="s"))
    await completing.wait()
    await asyncio.sleep(0.02)
    assert not running.done()
    with pytest.raises(errors.InProgress):
        await engine.run("k", lambda: 8, scope="s")
    go.set()
    assert (await running).value == 7


# Leases


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_c6_a_handler_that_blocks_its_loop_keeps_its_lease(store_url: str, unique: str, loop: str) -> None:
    policy = Policy(lease=0.2)
    watcher, engine = Idempotency(store_url, policy=policy), AsyncIdempotency(store_url, policy=policy)
    inside, leave = threading.Event(), threading.Event()

    async def blocks() -> str:
        inside.set()
        leave.wait(SECONDS)
        return "done"

    async def main() -> str:
        outcome = await engine.run("k", blocks, scope=unique)
        await engine.aclose()
        return outcome.value

    new_loop: Callable[[], asyncio.AbstractEventLoop] = (
        uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    )

    def run() -> str:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main())

    running = in_thread(run)
    assert inside.wait(SECONDS)
    deadline = time.monotonic() + 0.7
    while time.monotonic() < deadline:
        with pytest.raises(errors.InProgress):
            watcher.run("k", lambda: "twice", scope=unique)
        time.sleep(0.02)
    leave.set()
    assert running.result(SECONDS) == "done"
    assert watcher.run("k", lambda: "twice", scope=unique).value == "done"
    watcher.close()


def test_c6_renewals_travel_together_and_short_operations_cost_none() -> None:
    store = Turnstile()
    engine = Idempotency(store, policy=Policy(lease=0.6))
    for number in range(50):
        engine.run(f"short {number}", lambda: 0, scope="s")
    assert store.renewals == []
    all_in, leave = threading.Barrier(21), threading.Event()

    def slow() -> None:
        all_in.wait(SECONDS)
        leave.wait(SECONDS)

    running = [in_thread(lambda n=n: engine.run(f"slow {n}", slow, scope="s")) for n in range(20)]  # type: ignore[misc]  # mypy#12557
    all_in.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while sum(store.renewals) < 40:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    leave.set()
    for call in running:
        call.result(SECONDS)
    assert len(store.renewals) < 10
    assert max(store.renewals) == 20


def test_c6_renewal_ends_at_max_run_with_an_event() -> None:
    store, events, leave = Turnstile(), Events(), threading.Event()
    engine = Idempotency(store, policy=Policy(lease=0.1, max_run=0.3), events=(events,))
    running = in_thread(lambda: engine.run("k", lambda: leave.wait(SECONDS), scope="s"))
    events.wait_for("overrun")
    renewals = len(store.renewals)
    assert renewals >= 3
    [record] = store.get([engine.id_of("s", "k")])
    assert record is not None
    threading.Event().wait(0.2)
    assert len(store.renewals) == renewals
    leave.set()
    assert running.result(SECONDS).value is True  # nobody took over: it is renewed once more, and stored
    assert engine.run("k", lambda: False, scope="s").replayed


class Faulty(Turnstile):
    """Fails its calls by name while told so, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: set[str] = set()
        self.asked: list[str] = []

    def _ask(self, name: str) -> None:
        self.asked.append(name)
        if name in self.failing:
            raise OSError(f"{name} fails")

    def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
        self._ask("renew")
        return super().renew(commands)

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Sequence[FenceReply]:
        self._ask("checkpoint")
        return super().checkpoint(commands)

    def complete(self, commands: Sequence[Complete]) -> Sequence[FenceReply]:
        self._ask("complete")
        return super().complete(commands)


def test_c6_past_its_own_count_of_the_lease_a_step_is_refused_until_renewed() -> None:
    store = Faulty()
    engine = Idempotency(store, policy=Policy(lease=0.1, complete_timeout=0.0))

    def fn() -> str:
        operation = current_operation()
        store.failing = {"renew"}
        threading.Event().wait(0.2)
        with pytest.raises(errors.StoreUnavailable, match="was not begun"):
            operation.step("one", lambda key: 1)
        assert "checkpoint" not in store.asked
        store.failing = set()
        return str(operation.step("two", lambda key: 2))

    assert engine.run("k", fn, scope="s").value == "2"
    assert [name for name in store.asked if name != "renew"] == ["checkpoint", "complete"]


def test_c6_a_result_is_stored_without_a_live_lease_since_nonce_and_token_decide() -> None:
    store = Faulty()
    engine = Idempotency(store, policy=Policy(lease=0.1))

    def fn() -> int:
        store.failing = {"renew"}
        threading.Event().wait(0.2)
        return 7

    assert engine.run("k", fn, scope="s").value == 7
    assert store.asked[-1] == "complete"


# A lease that is lost


def take_over(store: Faulty, fn: Callable[[], str]) -> str:
    """Let renewals fail until another process's attempt has it, and let them work again."""
    store.failing = {"renew"}
    rival = Idempotency(Shared(store), policy=Policy(lease=30.0))

    def once() -> str:
        store.failing = set()
        return fn()

    return str(run_until_up(lambda: rival.run("k", once, scope="s")).value)


async def test_c8_a_handler_whose_lease_is_lost_is_cancelled_and_the_winner_answers() -> None:
    store, events = Faulty(), Events()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.1), events=(events,))
    inside, stopped = asyncio.Event(), asyncio.Event()

    async def fn() -> str:
        inside.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "never"

    running = asyncio.ensure_future(engine.run("k", fn, scope="s"))
    await inside.wait()
    assert await asyncio.to_thread(take_over, store, lambda: "winner") == "winner"
    async with asyncio.timeout(SECONDS):
        outcome = await running
    assert stopped.is_set()
    assert (outcome.value, outcome.replayed) == ("winner", True)
    assert events.kinds == ["lease_lost"]


async def test_c8_while_the_winner_still_runs_the_loser_is_told_to_ask_again() -> None:
    store = Faulty()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.1))
    inside, leave = asyncio.Event(), threading.Event()

    async def fn() -> str:
        inside.set()
        await asyncio.Event().wait()
        return "never"

    def winner() -> str:
        leave.wait(SECONDS)
        return "winner"

    running = asyncio.ensure_future(engine.run("k", fn, scope="s"))
    await inside.wait()
    taking = asyncio.ensure_future(asyncio.to_thread(take_over, store, winner))
    with pytest.raises(errors.LeaseLost) as lost:
        async with asyncio.timeout(SECONDS):
            await running
    assert lost.value.retry_after is not None
    leave.set()
    assert await taking == "winner"
    assert (await engine.run("k", fn, scope="s")).value == "winner"


async def test_c8_a_handler_that_is_left_to_go_on_does_not_answer_either() -> None:
    store = Faulty()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.1, on_lease_lost="continue"))
    inside, leave = asyncio.Event(), asyncio.Event()

    async def fn() -> str:
        inside.set()
        await leave.wait()
        return "late"

    running = asyncio.ensure_future(engine.run("k", fn, scope="s"))
    await inside.wait()
    assert await asyncio.to_thread(take_over, store, lambda: "winner") == "winner"
    leave.set()
    assert (await running).value == "winner"


async def test_c8_a_step_of_a_lost_attempt_is_refused() -> None:
    store, ran = Faulty(), list[int]()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.1, on_lease_lost="continue"))

    async def fn() -> str:
        operation = current_operation()
        await asyncio.to_thread(take_over, store, lambda: "winner")
        for name in ("first", "second"):  # the first may come before the keeper knows, and is fenced
            with pytest.raises(errors.LeaseLost):
                await asyncio.to_thread(operation.step, name, lambda key: ran.append(1))
        return "late"

    assert (await engine.run("k", fn, scope="s")).value == "winner"
    assert len(ran) <= 1
    [record] = store.get([engine.id_of("s", "k")])
    assert record is not None
    assert (record.state, dict(record.checkpoints)) == (State.COMPLETED, {})


async def test_a_cancellation_of_ones_own_is_not_taken_for_a_lost_lease() -> None:
    store = Faulty()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.1))
    inside = asyncio.Event()

    async def fn() -> str:
        inside.set()
        await asyncio.Event().wait()
        return "never"

    async with asyncio.TaskGroup() as group:
        running = group.create_task(engine.run("k", fn, scope="s"))
        await inside.wait()
        running.cancel()
    assert running.cancelled()


# Loops


def test_c20_hundreds_of_tasks_on_uvloop(store_url: str, unique: str) -> None:
    engine, effects = AsyncIdempotency(store_url), list[int]()

    async def once(number: int) -> str:
        async def charge() -> int:
            effects.append(number % 50)
            await asyncio.sleep(0)
            return number % 50

        try:
            outcome = await engine.run(f"k{number % 50}", charge, scope=unique)
        except errors.InProgress:
            return "in progress"
        assert outcome.value == number % 50
        return "replayed" if outcome.replayed else "fresh"

    async def main() -> list[str]:
        said = await asyncio.gather(*(once(number) for number in range(300)))
        await engine.aclose()
        return said

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        said = runner.run(main())
    assert sorted(effects) == list(range(50))
    assert said.count("fresh") == 50


def test_c20_hundreds_of_operations_from_threads(store_url: str, unique: str) -> None:
    engine, effects = Idempotency(store_url), list[str]()

    def work() -> None:
        for number in range(40):
            with suppress(errors.InProgress):
                engine.run(f"k{number}", lambda n=number: effects.append(f"k{n}"), scope=unique)  # type: ignore[misc]  # mypy#12557

    threads = [in_thread(work) for _ in range(8)]
    for thread in threads:
        thread.result(2 * SECONDS)
    engine.close()
    assert sorted(effects) == sorted(f"k{number}" for number in range(40))
