"""Steps whose results cannot be kept, and steps after the end of their operation (C14)."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any
from uuid import UUID

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.operation import Operation
from retryproof.stores.memory import MemoryStore
from tests.engine.conftest import MakeCaller
from tests.engine.support import SECONDS, in_thread


@pytest.mark.parametrize("result", [object(), "x" * 5000], ids=["unencodable", "too large"])
def test_c14_a_result_that_cannot_be_kept_is_handed_on_and_its_step_never_runs_again(
    store_url: str, make_caller: MakeCaller, result: Any
) -> None:
    caller, effects = make_caller(store_url, max_result=1000), list[UUID]()

    def pay(key: UUID) -> Any:
        effects.append(key)
        return result

    def charge() -> None:
        assert current_operation().step("pay", pay) is result
        raise ValueError("after the payment")

    with pytest.raises(ValueError, match="after"):
        caller.run("k", charge)
    with pytest.raises(errors.ResultOmitted, match="pay"):
        caller.run("k", charge)
    assert len(effects) == 1


async def test_c14_the_same_for_an_awaited_step() -> None:
    engine, effects = AsyncIdempotency(MemoryStore()), list[UUID]()

    async def pay(key: UUID) -> object:
        effects.append(key)
        return pay

    async def charge() -> None:
        assert await current_operation().astep("pay", pay) is pay
        raise ValueError("after the payment")

    with pytest.raises(ValueError, match="after"):
        await engine.run("k", charge, scope="s")
    with pytest.raises(errors.ResultOmitted):
        await engine.run("k", charge, scope="s")
    assert len(effects) == 1


def test_c14_a_step_after_the_end_is_refused_before_it_runs(make_caller: MakeCaller) -> None:
    """From a thread that outlives its operation; nobody took over, and it is not said so."""
    ended, ran = threading.Event(), list[UUID]()
    late: list[Future[None]] = []

    def step(operation: Operation) -> None:
        assert ended.wait(SECONDS)
        operation.step("pay", ran.append)

    def charge() -> None:
        operation = current_operation()
        late.append(in_thread(lambda: step(operation)))

    make_caller(MemoryStore()).run("k", charge)
    ended.set()
    with pytest.raises(errors.ConfigurationError, match="has ended"):
        late[0].result(SECONDS)
    assert ran == []


async def test_c14_an_awaited_step_or_a_phase_after_the_end_is_refused_before_it_runs() -> None:
    ran: list[str] = []

    async def charge() -> Operation:
        return current_operation()

    operations: list[Operation] = []

    async def hand_out() -> None:
        operations.append(await charge())

    await AsyncIdempotency(MemoryStore()).run("k", hand_out, scope="s")

    async def pay(key: UUID) -> None:
        ran.append("astep")

    with pytest.raises(errors.ConfigurationError, match="has ended"):
        await operations[0].astep("pay", pay)
    with pytest.raises(errors.ConfigurationError, match="has ended"):
        async with operations[0].phase("order", object()):
            ran.append("phase")
    assert ran == []


def test_c14_a_step_that_is_done_as_the_operation_ends_says_so() -> None:
    begun, ended = threading.Event(), threading.Event()
    late: list[Future[None]] = []

    def pay(key: UUID) -> None:
        begun.set()
        assert ended.wait(SECONDS)

    def charge() -> None:
        operation = current_operation()
        late.append(in_thread(lambda: operation.step("pay", pay)))
        assert begun.wait(SECONDS)

    Idempotency(MemoryStore()).run("k", charge, scope="s")
    ended.set()
    with pytest.raises(errors.ConfigurationError, match="ended while"):
        late[0].result(SECONDS)


def test_c6_no_step_revives_a_lease_past_max_run() -> None:
    ran: list[UUID] = []

    def charge() -> str:
        threading.Event().wait(0.3)
        with pytest.raises(errors.LeaseLost, match="max_run"):
            current_operation().step("pay", ran.append)
        return "done"

    engine = Idempotency(MemoryStore(), policy=Policy(lease=0.1, max_run=0.1))
    assert engine.run("k", charge, scope="s").value == "done"
    assert ran == []


def test_c14_two_threads_do_not_use_one_name() -> None:
    """Whichever comes second is refused."""
    barrier, ran = threading.Barrier(2), list[int]()

    def step(operation: Operation) -> None:
        barrier.wait(SECONDS)
        operation.step("pay", lambda key: ran.append(1))

    def charge() -> list[BaseException | None]:
        operation = current_operation()
        both = [in_thread(lambda: step(operation)) for _ in range(2)]
        return [each.exception(SECONDS) for each in both]

    found: list[BaseException | None] = []
    Idempotency(MemoryStore()).run("k", lambda: found.extend(charge()), scope="s")
    assert [type(error) for error in found if error is not None] == [errors.ConfigurationError]
    assert ran == [1]


async def test_c14_a_task_that_outlives_its_operation_is_refused() -> None:
    ran, ended = list[str](), asyncio.Event()

    async def later() -> None:
        await ended.wait()

        async def pay(key: UUID) -> None:
            ran.append("paid")

        await current_operation().astep("pay", pay)

    tasks: list[asyncio.Task[None]] = []

    async def charge() -> None:
        tasks.append(asyncio.create_task(later()))

    await AsyncIdempotency(MemoryStore()).run("k", charge, scope="s")
    ended.set()
    with pytest.raises(errors.ConfigurationError, match="has ended"):
        await asyncio.wait_for(tasks[0], SECONDS)
    assert ran == []
