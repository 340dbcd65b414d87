"""C8, I10: an attempt that lost its lease to another process, then fails, gets what the winner came to."""

import asyncio

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, errors
from retryproof.stores import MemoryStore
from retryproof.testing import ManualClock
from tests.engine.support import Shared

POLICY = Policy(lease=10.0, max_run=10.0)


async def test_c8_a_late_failure_is_answered_with_the_winner_s_result() -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    engine, rival = AsyncIdempotency(store, policy=POLICY), AsyncIdempotency(Shared(store), policy=POLICY)

    async def late() -> str:
        clock.advance(11.0)
        assert (await rival.run("k", lambda: "second", scope="s")).value == "second"
        raise ValueError("the first attempt fails when nobody asks any more")

    outcome = await asyncio.wait_for(engine.run("k", late, scope="s"), 10)
    assert (outcome.value, outcome.replayed) == ("second", True)


async def test_c8_a_late_failure_while_the_winner_runs_is_told_that_it_lost() -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    engine, rival = AsyncIdempotency(store, policy=POLICY), AsyncIdempotency(Shared(store), policy=POLICY)
    ends, begun = asyncio.Event(), asyncio.Event()

    async def winner() -> str:
        begun.set()
        await ends.wait()
        return "second"

    async def late() -> str:
        clock.advance(11.0)
        running.append(asyncio.create_task(rival.run("k", winner, scope="s")))
        await begun.wait()
        raise ValueError("too late")

    running: list[asyncio.Task[object]] = []
    with pytest.raises(errors.LeaseLost) as lost:
        await engine.run("k", late, scope="s")
    assert isinstance(lost.value.__cause__, ValueError)
    ends.set()
    await asyncio.wait_for(running[0], 10)


def test_c8_a_late_failure_in_a_thread_is_answered_with_the_winner_s_result() -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    engine, rival = Idempotency(store, policy=POLICY), Idempotency(Shared(store), policy=POLICY)

    def late() -> str:
        clock.advance(11.0)
        rival.run("k", lambda: "second", scope="s")
        raise ValueError("too late")

    assert engine.run("k", late, scope="s").value == "second"
