"""Phases: local work commits with its recovery point, fenced, and is not done again (T3)."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import asyncpg
import psycopg
import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.recovery import Recovery
from retryproof.sql.callers.sqlite import Sqlite
from tests.transaction.styles import BLOCKING, ON_LOOP, Blocking, OnLoop, abegin, begin, of_psycopg
from tests.transaction.support import WAITING, Database, insert

pytestmark = pytest.mark.timeout(60)


class Crash(BaseException):
    """Ends an attempt as its process's death would: the record stays in progress."""


@pytest.fixture(params=BLOCKING)
def blocking(request: pytest.FixtureRequest) -> tuple[Database, Callable[[Database], Blocking]]:
    kind, opened = BLOCKING[request.param]
    return request.getfixturevalue(kind), opened


@pytest.fixture(params=ON_LOOP)
def on_loop(request: pytest.FixtureRequest) -> tuple[Database, Callable[[Database], OnLoop]]:
    kind, opened = ON_LOOP[request.param]
    return request.getfixturevalue(kind), opened


def abandon(database: Database) -> None:
    """The lease is over."""
    database.execute("UPDATE retryproof_operations SET lease_until = 0 WHERE state = 1")


def test_t3_a_phase_that_was_committed_does_not_run_again(
    blocking: tuple[Database, Callable[[Database], Blocking]],
) -> None:
    database, opened = blocking
    seen = []
    with Idempotency(database.store) as engine:

        def order(crash: bool) -> Any:
            operation = current_operation()
            with opened(database) as (connection, write):
                begin(connection)
                with operation.phase("order", connection) as phase:
                    seen.append(phase.pending)
                    if phase.pending:
                        write(1)
                        phase.result = ("order", operation.attempt)
            assert database.charges() == [1]
            if crash:
                raise Crash
            return phase.result

        with pytest.raises(Crash):
            engine.run("k", lambda: order(True), scope="s")
        abandon(database)
        outcome = engine.run("k", lambda: order(False), scope="s")
        assert (outcome.value, outcome.attempt) == (["order", 1], 2)
    assert (seen, database.charges()) == ([True, False], [1])


async def test_t3_the_same_on_a_loop(on_loop: tuple[Database, Callable[[Database], OnLoop]]) -> None:
    database, opened = on_loop
    async with AsyncIdempotency(database.store) as engine:

        async def order(crash: bool) -> Any:
            operation = current_operation()
            async with opened(database) as (connection, write):
                await abegin(connection)
                async with operation.phase("order", connection) as phase:
                    if phase.pending:
                        await write(1)
                        phase.result = operation.attempt
                assert database.charges() == [1]
            if crash:
                raise Crash
            return phase.result

        with pytest.raises(Crash):
            await engine.run("k", lambda: order(True), scope="s")
        abandon(database)
        outcome = await engine.run("k", lambda: order(False), scope="s")
        assert (outcome.value, outcome.attempt) == (1, 2)
    assert database.charges() == [1]


def test_t3_what_raises_in_a_phase_rolls_it_back(blocking: tuple[Database, Callable[[Database], Blocking]]) -> None:
    database, opened = blocking
    with Idempotency(database.store) as engine:
        with opened(database) as (connection, write):

            def order() -> None:
                begin(connection)
                with current_operation().phase("order", connection):
                    write(1)
                    raise ValueError("no")

            with pytest.raises(ValueError, match="no"):
                engine.run("k", order, scope="s")
        assert database.charges() == []
        assert engine.run("k", lambda: "again", scope="s").attempt == 1


def test_phases_as_calls(postgres: Database) -> None:
    @contextlib.contextmanager
    def lent() -> Iterator[Any]:
        with psycopg.connect(postgres.store, autocommit=True) as connection:
            yield connection

    def work(connection: Any) -> int:
        connection.execute(insert(5))
        return 5

    def order(crash: bool) -> list[int]:
        operation = current_operation()
        results = [operation.phase(name, lent()).run(work) for name in ("one", "two")]
        if crash:
            raise ValueError
        return results

    with Idempotency(postgres.store) as engine:
        with pytest.raises(ValueError):
            engine.run("k", lambda: order(True), scope="s")
        assert engine.run("k", lambda: order(False), scope="s").value == [5, 5]
    assert postgres.charges() == [5, 5]


async def test_phases_as_awaited_calls_with_a_pool(postgres: Database) -> None:
    async with asyncpg.create_pool(postgres.store, min_size=1, max_size=1) as pool:

        async def work(connection: Any) -> int:
            await connection.execute(insert(5))
            return 5

        async def order() -> list[int]:
            operation = current_operation()
            return [await operation.phase(name, pool.acquire()).arun(work) for name in ("one", "two")]

        async with AsyncIdempotency(postgres.store) as engine:
            assert (await engine.run("k", order, scope="s")).value == [5, 5]
        assert pool.get_idle_size() == 1
    assert postgres.charges() == [5, 5]


# Who lost the lease


def test_t3_a_holder_that_lost_its_lease_cannot_commit_its_phase(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):

        def order() -> str:
            with current_operation().phase("order", connection):
                write(1)
                abandon(postgres)
                with Idempotency(postgres.store) as rival:
                    assert rival.run("k", lambda: "the winner's", scope="s").attempt == 2
            return "never"

        assert engine.run("k", order, scope="s").value == "the winner's"
    assert postgres.charges() == []


def test_t3_a_phase_cannot_begin_after_the_lease_was_lost(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):

        def order() -> None:
            abandon(postgres)
            with Idempotency(postgres.store) as rival:
                rival.run("k", lambda: "the winner's", scope="s")
            with pytest.raises(errors.LeaseLost), current_operation().phase("order", connection):
                write(1)
            raise ValueError("stop")

        assert engine.run("k", order, scope="s").value == "the winner's"
    assert postgres.charges() == []


def test_c6_past_its_lease_a_phase_renews_before_it_commits(database: Database) -> None:
    opened = BLOCKING["psycopg" if database.postgres else "sqlite3"][1]
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def order() -> int:
            operation = current_operation()
            begin(connection)
            with operation.phase("order", connection):
                write(1)
                operation._hold.deadline = 0.0
            assert operation._hold.deadline > 0.0
            return 1

        assert engine.run("k", order, scope="s").value == 1
    assert database.charges() == [1]


def test_t2_a_long_phase_keeps_its_lease_and_costs_nobody_else_theirs(postgres: Database) -> None:
    """Held for three leases: its own and a neighbour's are renewed, and a twin is told at once."""
    policy = Policy(lease=0.5)
    with Idempotency(postgres.store, policy=policy) as engine, of_psycopg(postgres) as (connection, write):

        def order() -> int:
            with current_operation().phase("order", connection):
                write(1)
                with psycopg.connect(postgres.store, autocommit=True) as other:
                    other.execute("SELECT pg_sleep(1.5)")
                with pytest.raises(errors.InProgress):
                    engine.run("k", lambda: "twin", scope="s")
            return current_operation().attempt

        def neighbour() -> int:
            engine.run("k", order, scope="s")
            return current_operation().attempt

        assert engine.run("n", neighbour, scope="s").value == 1
        assert engine.run("k", order, scope="s").attempt == 1
    assert postgres.charges() == [1]


# What is refused


def _refusal(store: str, body: Callable[[Any], None]) -> str:
    with Idempotency(store) as engine, pytest.raises(errors.ConfigurationError) as caught:
        engine.run("k", lambda: body(current_operation()), scope="s")
    return caught.value.message


def test_a_name_used_twice_is_refused_before_anything_is_written(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:

        def twice(operation: Any) -> None:
            with operation.phase("order", connection):
                connection.execute(insert(1))
            with operation.phase("order", connection):
                connection.execute(insert(2))

        assert "used twice" in _refusal(postgres.store, twice)
        assert postgres.charges() == [1]

    def with_a_step(operation: Any) -> None:
        operation.step("order", lambda key: 1)
        operation.phase("order", object()).__enter__()

    assert "used twice" in _refusal(postgres.store, with_a_step)


def test_autocommit_a_failed_transaction_and_savepoints_are_refused(postgres: Database) -> None:
    def enter(operation: Any, connection: Any) -> None:
        with operation.phase("order", connection):
            raise AssertionError("entered")

    with psycopg.connect(postgres.store, autocommit=True) as connection:
        assert "autocommit" in _refusal(postgres.store, lambda operation: enter(operation, connection))
        with connection.transaction(), connection.transaction():
            assert "savepoint" in _refusal(postgres.store, lambda operation: enter(operation, connection))
    with psycopg.connect(postgres.store) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1/0")
        assert "already failed" in _refusal(postgres.store, lambda operation: enter(operation, connection))
    assert "no connection that is known" in _refusal(postgres.store, lambda operation: enter(operation, object()))
    assert "has no connection" in _refusal(postgres.store, lambda operation: enter(operation, None))


def test_a_phase_in_a_phase_or_a_transaction_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:

        def nested(operation: Any) -> None:
            with operation.phase("one", connection):
                connection.execute(insert(1))
                with operation.phase("two", connection):
                    pass

        def joined_inside(operation: Any) -> None:
            with operation.phase("one", connection):
                connection.execute(insert(1))
                operation.transaction(connection)

        def joined_around(operation: Any) -> None:
            operation.transaction(connection)
            with operation.phase("one", connection):
                pass

        assert "inside of the phase 'one'" in _refusal(postgres.store, nested)
        assert "has a transaction of its own" in _refusal(postgres.store, joined_inside)
        assert "inside of the transaction" in _refusal(postgres.store, joined_around)
    assert postgres.charges() == []


def test_t1_no_phase_begins_while_a_thread_enters_the_transaction(postgres: Database) -> None:
    """One of the two would be neither committed nor rolled back."""
    entering, go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def slow() -> Iterator[Any]:
        with psycopg.connect(postgres.store) as connection:
            entering.set()
            assert go_on.wait(30)
            yield connection

    def work() -> int:
        operation = current_operation()
        with ThreadPoolExecutor(1) as thread:
            joining = thread.submit(operation.transaction, slow())
            assert entering.wait(30)
            with (
                of_psycopg(postgres) as (connection, _),
                pytest.raises(errors.ConfigurationError, match="is inside of the transaction of the operation"),
                operation.phase("order", connection),
            ):
                raise AssertionError("it began")
            go_on.set()
            joining.result().execute(insert(1).encode())
        return 1

    with Idempotency(postgres.store) as engine:
        assert engine.run("k", work, scope="s").value == 1
    assert postgres.charges() == [1]


def test_t1_a_transaction_that_is_joined_as_its_operation_ends_is_left(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever comes first, its thread or the end: one of them sees to it."""
    looked, ended, left = threading.Event(), threading.Event(), threading.Event()
    looks = []

    class Watched(Recovery):
        @property
        def refuses(self) -> str:
            said = self.hold.refuses
            if threading.current_thread() is not threading.main_thread():
                looks.append(said)
                if len(looks) == 2:  # the one after it has entered
                    looked.set()
                    assert ended.wait(30)
            return said

    @contextlib.contextmanager
    def given() -> Iterator[Any]:
        with psycopg.connect(postgres.store) as connection:
            yield connection
        left.set()

    monkeypatch.setattr("retryproof.operation.Recovery", Watched)
    with ThreadPoolExecutor(1) as thread, Idempotency(postgres.store) as engine:
        joining: list[Future[Any]] = []

        def work() -> int:
            joining.append(thread.submit(current_operation().transaction, given()))
            assert looked.wait(30)
            return 1

        assert engine.run("k", work, scope="s").value == 1
        ended.set()
        joining[0].exception(30)
        assert left.is_set()
    assert looks == ["", ""]


async def test_t1_no_phase_begins_while_a_task_enters_the_transaction(postgres: Database) -> None:
    entering, go_on = asyncio.Event(), asyncio.Event()
    async with asyncpg.create_pool(postgres.store, min_size=2, max_size=2) as pool:

        @contextlib.asynccontextmanager
        async def slow() -> AsyncIterator[Any]:
            async with pool.acquire() as connection:
                entering.set()
                await go_on.wait()
                yield connection

        async def work() -> int:
            operation = current_operation()
            joining = asyncio.create_task(operation.atransaction(slow()))
            await entering.wait()
            with pytest.raises(errors.ConfigurationError, match="is inside of the transaction of the operation"):
                async with operation.phase("order", pool.acquire()):
                    raise AssertionError("it began")
            go_on.set()
            await (await joining).execute(insert(1))
            return 1

        async with AsyncIdempotency(postgres.store) as engine:
            assert (await engine.run("k", work, scope="s")).value == 1
    assert postgres.charges() == [1]


async def test_t1_a_phase_that_is_being_committed_is_still_the_only_one(postgres: Database) -> None:
    """Of a task that goes on as soon as the block of another one is left."""
    leaving, go_on = asyncio.Event(), asyncio.Event()
    async with asyncpg.create_pool(postgres.store, min_size=2, max_size=2) as pool:

        @contextlib.asynccontextmanager
        async def slow() -> AsyncIterator[Any]:
            async with pool.acquire() as connection:
                yield connection
                leaving.set()
                await go_on.wait()

        async def work() -> int:
            operation = current_operation()

            async def order(connection: Any) -> int:
                await connection.execute(insert(1))
                return 1

            ordering = asyncio.create_task(operation.phase("order", slow()).arun(order))
            await leaving.wait()
            with pytest.raises(errors.ConfigurationError, match="is inside of the phase 'order'"):
                async with operation.phase("ship", pool.acquire()):
                    raise AssertionError("it began")
            with pytest.raises(errors.ConfigurationError, match="'order' has a transaction of its own"):
                await operation.atransaction(pool.acquire())
            go_on.set()
            assert await ordering == 1
            async with operation.phase("ship", pool.acquire()) as phase:
                await phase.connection.execute(insert(2))
            return 1

        async with AsyncIdempotency(postgres.store) as engine:
            assert (await engine.run("k", work, scope="s")).value == 1
    assert postgres.charges() == [1, 2]


def test_a_phase_that_is_done_gives_no_connection(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def order(crash: bool) -> None:
            with current_operation().phase("order", connection) as phase:
                phase.connection.execute(insert(1))
            if crash:
                raise ValueError

        with pytest.raises(ValueError):
            engine.run("k", lambda: order(True), scope="s")
        with pytest.raises(errors.ConfigurationError, match=r"ask `phase\.pending`"):
            engine.run("k", lambda: order(False), scope="s")
    assert postgres.charges() == [1]


def test_a_phase_whose_transaction_is_ended_inside_is_told(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:

        def ends(operation: Any) -> None:
            with operation.phase("order", connection):
                connection.rollback()
                connection.execute(insert(1))

        assert "was ended inside of it" in _refusal(postgres.store, ends)
    assert postgres.charges() == [1]  # the next transaction is its owner's


def test_t1_a_phase_whose_work_was_committed_inside_leaves_an_unknown_outcome(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection, Idempotency(postgres.store) as engine:

        def ends() -> None:
            with current_operation().phase("order", connection):
                connection.execute(insert(1))
                connection.commit()

        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", ends, scope="s")
        postgres.execute("UPDATE retryproof_operations SET lease_until = 0")
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", ends, scope="s")
    assert postgres.charges() == [1]


@pytest.mark.parametrize("result", [object(), "x" * 2000], ids=["unencodable", "too large"])
def test_c14_a_result_that_cannot_be_kept_is_refused_and_rolls_back(postgres: Database, result: object) -> None:
    """Other than a step's: here what was done can be undone, so that nothing is done twice."""
    engine = Idempotency(postgres.store, policy=Policy(max_result=1000))
    with engine, psycopg.connect(postgres.store) as connection:

        def order() -> None:
            with current_operation().phase("order", connection) as phase:
                connection.execute(insert(1))
                phase.result = result

        with pytest.raises(ValueError):
            engine.run("k", order, scope="s")
    assert postgres.charges() == []


# What fails at the end


@pytest.mark.parametrize("committed", [True, False])
def test_c3_a_commit_whose_answer_is_lost_is_settled_by_the_record(
    postgres: Database, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retryproof.sql.callers.psycopg import Psycopg

    commit = Psycopg.commit

    def lose(self: Psycopg) -> None:
        if committed:
            commit(self)
        self._connection.close()
        raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(Psycopg, "commit", lose)
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def order() -> str:
            with current_operation().phase("order", connection):
                connection.execute(insert(1))
            return "ordered"

        if committed:
            assert engine.run("k", order, scope="s").value == "ordered"
        else:
            with pytest.raises(psycopg.OperationalError):
                engine.run("k", order, scope="s")
    assert postgres.charges() == ([1] if committed else [])


async def test_a_cancellation_does_not_part_a_phase_from_its_recovery_point(postgres: Database) -> None:
    async with AsyncIdempotency(postgres.store) as engine:
        connection = await asyncpg.connect(postgres.store)
        await connection.transaction().start()
        blocker = await asyncpg.connect(postgres.store)
        ready = asyncio.Event()

        async def order() -> str:
            async with current_operation().phase("order", connection) as phase:
                if phase.pending:
                    await connection.execute(insert(1))
                    await blocker.execute("BEGIN")
                    await blocker.execute("SELECT 1 FROM retryproof_operations FOR UPDATE")
                    ready.set()
            return "ordered"

        task = asyncio.create_task(engine.run("k", order, scope="s"))
        await ready.wait()
        while not await blocker.fetchval(WAITING):  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.01)
        task.cancel()
        await blocker.execute("COMMIT")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert postgres.charges() == [1]
        abandon(postgres)
        assert (await engine.run("k", order, scope="s")).value == "ordered"
        assert postgres.charges() == [1]
        await connection.close()
        await blocker.close()


# Steps, between phases


async def test_c6_past_its_lease_a_step_renews_before_it_begins(database: Database) -> None:
    async def charge(key: object) -> int:
        return 1

    async with AsyncIdempotency(database.store) as engine:

        async def order() -> int:
            operation = current_operation()
            operation._hold.deadline = 0.0
            value = await operation.astep("charge", charge)
            assert operation._hold.deadline > 0.0
            return value

        assert (await engine.run("k", order, scope="s")).value == 1


@pytest.mark.parametrize("how", ["step", "astep"])
async def test_c6_a_step_of_a_holder_that_lost_its_lease_is_not_begun(database: Database, how: str) -> None:
    """It was suspended between its phases, and makes no foreign call when it wakes up."""
    called: list[object] = []

    async def order() -> None:
        operation = current_operation()
        operation._hold.deadline = 0.0
        abandon(database)
        async with AsyncIdempotency(database.store) as rival:
            await rival.run("k", lambda: "the winner's", scope="s")
        if how == "step":
            await asyncio.to_thread(operation.step, "charge", called.append)
        else:

            async def charge(key: object) -> None:
                called.append(key)

            await operation.astep("charge", charge)

    async with AsyncIdempotency(database.store) as engine:
        assert (await engine.run("k", order, scope="s")).value == "the winner's"
    assert called == []


def test_c14_a_step_in_a_phase_that_holds_the_record_is_refused_before_its_call(sqlite: Database) -> None:
    """Its result could not be kept before the phase's commit; between phases it can."""
    called: list[object] = []
    opened = BLOCKING["sqlite3"][1]
    with Idempotency(sqlite.store) as engine, opened(sqlite) as (connection, write):

        def order() -> None:
            operation = current_operation()
            begin(connection)
            with operation.phase("order", connection):
                write(1)
                with pytest.raises(errors.ConfigurationError, match="between phases"):
                    operation.step("charge", called.append)
            assert called == []
            operation.step("charge", called.append)

        engine.run("k", order, scope="s")
    assert len(called) == 1
    assert sqlite.charges() == [1]


def test_c14_a_step_in_a_phase_that_does_not_hold_it_is_kept_whatever_becomes_of_the_phase(postgres: Database) -> None:
    called: list[object] = []
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def order(fails: bool) -> None:
            operation = current_operation()
            with operation.phase("order", connection):
                connection.execute(insert(1))
                operation.step("charge", called.append)
                if fails:
                    raise ValueError

        with pytest.raises(ValueError):
            engine.run("k", lambda: order(True), scope="s")
        engine.run("k", lambda: order(False), scope="s")
    assert len(called) == 1
    assert postgres.charges() == [1]


def test_c6_a_renewal_that_was_rolled_back_with_its_phase_does_not_count(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite it is part of the phase's transaction."""

    def fail(self: Sqlite) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Sqlite, "commit", fail)
    opened = BLOCKING["sqlite3"][1]
    with Idempotency(sqlite.store) as engine, opened(sqlite) as (connection, write):

        def order() -> None:
            operation = current_operation()
            begin(connection)
            operation._hold.deadline = 0.0
            with pytest.raises(OSError, match="disk"), operation.phase("order", connection):
                write(1)
            assert operation._hold.deadline == 0.0
            raise ValueError("stop")

        with pytest.raises(ValueError, match="stop"):
            engine.run("k", order, scope="s")
    assert sqlite.charges() == []
