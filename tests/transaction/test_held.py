"""A transaction that holds its record's row, past its lease, costs nobody else anything (T2)."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from retryproof import AsyncIdempotency, Idempotency, Outcome, current_operation, errors
from tests.transaction.held import HELD, SHORT, in_a_thread, refuse, run_short_ones, work
from tests.transaction.support import Database

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

PROMPT = 0.45
"""Seconds that a short operation may take on busy machines; less than a lease."""
HOLD_ALL = b"SELECT 1 FROM retryproof_operations FOR UPDATE"
ASYNC_DRIVERS = ["postgresql+asyncpg", "postgresql+psycopg"]


def at(url: str, scheme: str) -> str:
    return f"{scheme}://{url.partition('://')[2]}"


@contextlib.contextmanager
def holding(database: Database) -> Iterator[None]:
    """Somebody's transaction holds each record that there is, as a commit that takes its time does."""
    with psycopg.connect(database.store) as connection:
        connection.execute(HOLD_ALL)
        yield


async def arun_short_ones(engine: AsyncIdempotency, seconds: float) -> float:
    longest, until, number = 0.0, time.monotonic() + seconds, 0
    while (began := time.monotonic()) < until:
        number += 1
        if number % 2:
            await engine.run(f"short {number}", lambda: "done", scope="s")
        else:
            with pytest.raises(ValueError, match="refused"):
                await engine.run(f"short {number}", refuse, scope="s")
        longest = max(longest, time.monotonic() - began)
    return longest


def test_t2_a_held_record_costs_threads_beside_it_no_lease_and_no_time(postgres: Database) -> None:
    """The held one works in a transaction that has its row; one beside it is long, others are short."""
    locked, over = threading.Event(), threading.Event()

    def held() -> str:
        with psycopg.connect(postgres.store) as connection:
            current_operation().transaction(connection).execute(HOLD_ALL)
            locked.set()
            over.wait(20)
            raise ValueError("given up")

    with Idempotency(postgres.store, policy=SHORT) as engine:

        def run_held() -> Outcome[str]:
            return engine.run("held", held, scope="s")

        def run_long() -> Outcome[str]:
            return engine.run("long", lambda: work(HELD), scope="s")

        with in_a_thread(run_held) as first:
            assert locked.wait(20)
            with in_a_thread(run_long) as second:
                longest = run_short_ones(engine, HELD)
            over.set()
    assert [type(result) for result in first] == [ValueError]
    assert [(result.value, result.attempt, result.replayed) for result in second] == [("done", 1, False)]
    assert longest < PROMPT


@pytest.mark.parametrize("scheme", ASYNC_DRIVERS)
async def test_t2_a_held_record_costs_tasks_beside_it_no_lease_and_no_time(postgres: Database, scheme: str) -> None:
    locked, over = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with await psycopg.AsyncConnection.connect(postgres.store) as connection:
            yield connection

    async def held() -> str:
        connection = await current_operation().atransaction(connected())
        await connection.execute(HOLD_ALL)
        locked.set()
        await over.wait()
        raise ValueError("given up")

    async def long() -> str:
        await asyncio.sleep(HELD)  # the work
        return "done"

    async with AsyncIdempotency(at(postgres.store, scheme), policy=SHORT) as engine:
        first = asyncio.create_task(engine.run("held", held, scope="s"))
        await locked.wait()
        second = asyncio.create_task(engine.run("long", long, scope="s"))
        longest = await arun_short_ones(engine, HELD)
        outcome = await second
        over.set()
        with pytest.raises(ValueError, match="given up"):
            await first
    assert (outcome.value, outcome.attempt, outcome.replayed) == ("done", 1, False)
    assert longest < PROMPT


def test_t2_an_operation_whose_record_is_held_costs_threads_beside_it_no_time(postgres: Database) -> None:
    """It failed, and says so again and again to a record that somebody else has; the others go on meanwhile."""
    started, over = threading.Event(), threading.Event()

    def held() -> None:
        started.set()
        over.wait(20)
        raise ValueError("given up")

    with Idempotency(postgres.store, policy=SHORT) as engine:
        with in_a_thread(lambda: engine.run("held", held, scope="s")) as results:
            assert started.wait(20)
            with holding(postgres):
                over.set()
                with in_a_thread(lambda: engine.run("long", lambda: work(HELD), scope="s")) as second:
                    longest = run_short_ones(engine, HELD)
        assert [type(result) for result in results] == [ValueError]
    assert [(result.value, result.attempt, result.replayed) for result in second] == [("done", 1, False)]
    assert longest < PROMPT


@pytest.mark.parametrize("scheme", ASYNC_DRIVERS)
async def test_t2_an_operation_whose_record_is_held_costs_tasks_beside_it_no_time(
    postgres: Database, scheme: str
) -> None:
    started, over = asyncio.Event(), asyncio.Event()

    async def held() -> None:
        started.set()
        await over.wait()
        raise ValueError("given up")

    async with AsyncIdempotency(at(postgres.store, scheme), policy=SHORT) as engine:
        first = asyncio.create_task(engine.run("held", held, scope="s"))
        await started.wait()
        with holding(postgres):
            over.set()
            longest = await arun_short_ones(engine, HELD)
        with pytest.raises(ValueError, match="given up"):
            await first
    assert longest < PROMPT


BESIDE = """
import sys
from tests.transaction.held import HELD, SHORT, in_a_thread, run_short_ones, work
from retryproof import Idempotency

with Idempotency(sys.argv[1], policy=SHORT) as engine:
    with in_a_thread(lambda: engine.run("long", lambda: work(HELD), scope="other")) as results:
        longest = run_short_ones(engine, HELD)
    print(results[0].value, results[0].attempt, results[0].replayed, longest)
"""


@pytest.mark.quiet
def test_t2_a_held_record_costs_another_process_no_lease_and_no_time(postgres: Database) -> None:
    """Nor does it get the held operation itself, which is told to come back."""
    locked, over = threading.Event(), threading.Event()

    def held() -> str:
        with psycopg.connect(postgres.store) as connection:
            current_operation().transaction(connection).execute(HOLD_ALL)
            locked.set()
            over.wait(20)
            raise ValueError("given up")

    with Idempotency(postgres.store, policy=SHORT) as engine, Idempotency(postgres.store, policy=SHORT) as rival:
        with in_a_thread(lambda: engine.run("held", held, scope="s")):
            assert locked.wait(20)
            said = subprocess.run(
                [sys.executable, "-c", BESIDE, postgres.store], capture_output=True, text=True, timeout=30, check=True
            ).stdout.split()
            began = time.monotonic()
            with pytest.raises(errors.InProgress):
                rival.run("held", lambda: "taken over", scope="s")
            assert time.monotonic() - began < PROMPT
            over.set()
        assert rival.run("held", lambda: "afterwards", scope="s").value == "afterwards"
    assert said[:3] == ["done", "1", "False"]
    assert float(said[3]) < PROMPT
