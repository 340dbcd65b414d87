"""Work and result commit together, whatever library opened the transaction (T1, I8)."""

import contextlib
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy.orm import Session

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from tests.transaction.styles import (
    BLOCKING,
    BRIEF,
    ON_LOOP,
    Blocking,
    OnLoop,
    Write,
    abegin,
    begin,
    of_aiosqlite,
    of_psycopg,
    of_sqlalchemy,
    of_sqlite3,
    refused_for_good,
)
from tests.transaction.support import WAITING, Database, insert

pytestmark = pytest.mark.timeout(60)


# Connections of each library, open, and how to write with them


@pytest.fixture(params=BLOCKING)
def blocking(request: pytest.FixtureRequest) -> tuple[Database, Callable[[Database], Blocking]]:
    kind, opened = BLOCKING[request.param]
    return request.getfixturevalue(kind), opened


@pytest.fixture(params=ON_LOOP)
def on_loop(request: pytest.FixtureRequest) -> tuple[Database, Callable[[Database], OnLoop]]:
    kind, opened = ON_LOOP[request.param]
    return request.getfixturevalue(kind), opened


def test_t1_work_and_result_commit_together(blocking: tuple[Database, Callable[[Database], Blocking]]) -> None:
    database, opened = blocking
    with Idempotency(database.store) as engine:
        for expected_replay in (False, True):
            with opened(database) as (connection, write):

                def charge(connection: Any = connection, write: Write = write) -> str:
                    begin(connection)
                    assert current_operation().transaction(connection) is connection
                    write(1)
                    assert database.charges() == []
                    return "charged"

                outcome = engine.run("k", charge, scope="s")
                assert (outcome.value, outcome.replayed) == ("charged", expected_replay)
                assert database.charges() == [1]


def test_t1_what_raises_rolls_back_and_may_run_again(blocking: tuple[Database, Callable[[Database], Blocking]]) -> None:
    database, opened = blocking
    with Idempotency(database.store) as engine:
        for number in (1, 2):
            with opened(database) as (connection, write):

                def charge(number: int = number, connection: Any = connection, write: Write = write) -> int:
                    begin(connection)
                    current_operation().transaction(connection)
                    write(number)
                    if number == 1:
                        raise ValueError("refused")
                    return number

                if number == 1:
                    with pytest.raises(ValueError, match="refused"):
                        engine.run("k", charge, scope="s")
                else:
                    outcome = engine.run("k", charge, scope="s")
                    assert (outcome.value, outcome.replayed, outcome.attempt) == (2, False, 1)
    assert database.charges() == [2]


async def test_t1_work_and_result_commit_together_on_a_loop(
    on_loop: tuple[Database, Callable[[Database], OnLoop]],
) -> None:
    database, opened = on_loop
    async with AsyncIdempotency(database.store) as engine:
        for expected_replay in (False, True):
            async with opened(database) as (connection, write):

                async def charge(connection: Any = connection, write: Write = write) -> str:
                    await abegin(connection)
                    assert await current_operation().atransaction(connection) is connection
                    await write(1)
                    assert database.charges() == []
                    return "charged"

                outcome = await engine.run("k", charge, scope="s")
                assert (outcome.value, outcome.replayed) == ("charged", expected_replay)
                assert database.charges() == [1]


async def test_t1_what_raises_rolls_back_on_a_loop(on_loop: tuple[Database, Callable[[Database], OnLoop]]) -> None:
    database, opened = on_loop
    async with AsyncIdempotency(database.store) as engine:
        async with opened(database) as (connection, write):

            async def charge() -> None:
                await abegin(connection)
                await current_operation().atransaction(connection)
                await write(1)
                raise ValueError("refused")

            with pytest.raises(ValueError, match="refused"):
                await engine.run("k", charge, scope="s")
        outcome = await engine.run("k", lambda: "again", scope="s")
        assert (outcome.value, outcome.attempt) == ("again", 1)
    assert database.charges() == []


def test_a_block_is_handed_over_and_left_after_the_commit(postgres: Database) -> None:
    left: list[bool] = []

    @contextlib.contextmanager
    def lent() -> Iterator[psycopg.Connection]:
        with psycopg.connect(postgres.store, autocommit=True) as connection:
            yield connection
            left.append(connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE)

    def charge() -> int:
        connection = current_operation().transaction(lent())
        connection.execute(insert(7).encode())
        return 7

    with Idempotency(postgres.store) as engine:
        assert engine.run("k", charge, scope="s").value == 7
    assert (postgres.charges(), left) == ([7], [True])


async def test_a_block_is_handed_over_on_a_loop(postgres: Database) -> None:
    async with asyncpg.create_pool(postgres.store, min_size=1, max_size=1) as pool:

        async def charge() -> int:
            connection: Any = await current_operation().atransaction(pool.acquire())
            await connection.execute(insert(7))
            return 7

        async with AsyncIdempotency(postgres.store) as engine:
            assert (await engine.run("k", charge, scope="s")).value == 7
            assert pool.get_idle_size() == 1
    assert postgres.charges() == [7]


async def test_a_blocking_connection_of_a_thread_is_committed_on_the_loop(postgres: Database) -> None:
    import asyncio

    with psycopg.connect(postgres.store) as connection:

        def work() -> None:
            current_operation().transaction(connection).execute(insert(1).encode())

        async def charge() -> str:
            await asyncio.to_thread(work)
            return "charged"

        async with AsyncIdempotency(postgres.store) as engine:
            assert (await engine.run("k", charge, scope="s")).value == "charged"
        assert postgres.charges() == [1]


# Who lost the lease


def test_t1_a_holder_that_lost_its_lease_cannot_commit(
    blocking: tuple[Database, Callable[[Database], Blocking]],
) -> None:
    """The winner's answer is given instead (C8)."""
    database, opened = blocking
    if not database.postgres:
        pytest.skip("on SQLite nobody can take over while a transaction that writes is open")
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def charge() -> str:
            current_operation().transaction(connection)
            write(1)
            database.execute("UPDATE retryproof_operations SET lease_until = 0")
            with Idempotency(database.store) as rival:
                assert rival.run("k", lambda: "the winner's", scope="s").attempt == 2
            return "the loser's"

        outcome = engine.run("k", charge, scope="s")
        assert (outcome.value, outcome.replayed) == ("the winner's", True)
    assert database.charges() == []


def test_a_loser_is_refused_when_it_joins_late(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> str:
            postgres.execute("UPDATE retryproof_operations SET lease_until = 0")
            with Idempotency(postgres.store) as rival:
                rival.run("k", lambda: "the winner's", scope="s")
            current_operation().transaction(connection)
            return "never"

        assert engine.run("k", charge, scope="s").value == "the winner's"


def test_t2_a_twin_is_told_at_once_while_the_transaction_is_open(database: Database) -> None:
    opened = of_psycopg if database.postgres else of_sqlite3
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def charge() -> str:
            begin(connection)
            current_operation().transaction(connection)
            write(1)
            with pytest.raises(errors.InProgress):
                engine.run("k", lambda: "twin", scope="s")
            return "charged"

        assert engine.run("k", charge, scope="s").value == "charged"


# What is refused, before anything is written


def _refusal(store: str, connection: Any) -> str:
    with Idempotency(store) as engine:

        def charge() -> None:
            current_operation().transaction(connection)

        key = uuid.uuid4().hex
        with pytest.raises(errors.ConfigurationError) as caught:
            engine.run(key, charge, scope="s")
        assert engine.run(key, lambda: "after", scope="s").value == "after"  # it was released
    return caught.value.message


def test_autocommit_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store, autocommit=True) as connection:
        assert "autocommit" in _refusal(postgres.store, connection)


def test_a_failed_transaction_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1/0")
        assert "already failed" in _refusal(postgres.store, connection)


def test_t1_a_pipeline_is_refused_before_anything_is_written(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:
        with connection.pipeline():
            assert "pipeline" in _refusal(postgres.store, connection)
        connection.commit()
        row = connection.execute("SELECT count(*) FROM retryproof_markers").fetchone()
    assert row == (0,)


@pytest.mark.parametrize("left_open", [False, True])
def test_t1_a_pipeline_of_the_handlers_own_ends_before_it_returns(postgres: Database, left_open: bool) -> None:
    with (
        Idempotency(postgres.store) as engine,
        psycopg.connect(postgres.store) as connection,
        contextlib.ExitStack() as stack,
    ):

        def charge() -> str:
            current_operation().transaction(connection)
            with contextlib.ExitStack() as own:
                (stack if left_open else own).enter_context(connection.pipeline())
                connection.execute("INSERT INTO charges VALUES (1)")
            return "charged"

        if left_open:
            with pytest.raises(errors.ConfigurationError, match=r"pipeline.*Its work was rolled back"):
                engine.run("k", charge, scope="s")
        else:
            assert engine.run("k", charge, scope="s").value == "charged"
    assert postgres.charges() == ([] if left_open else [1])


def test_a_savepoint_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection, connection.transaction(), connection.transaction():
        assert "savepoint" in _refusal(postgres.store, connection)


def test_a_block_that_commits_by_itself_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection, connection.transaction():
        assert "commits by itself" in _refusal(postgres.store, connection)


def test_a_closed_connection_is_refused(postgres: Database) -> None:
    connection = psycopg.connect(postgres.store)
    connection.close()
    assert "closed" in _refusal(postgres.store, connection)


def test_no_open_transaction_is_refused(sqlite: Database) -> None:
    with contextlib.closing(sqlite3.connect(str(sqlite.path))) as connection:
        assert "no transaction is open" in _refusal(sqlite.store, connection)


@pytest.mark.parametrize("session", [True, False], ids=["session", "connection"])
def test_sqlalchemys_savepoints_and_autocommit_are_refused(postgres: Database, session: bool) -> None:
    with of_sqlalchemy("psycopg", session=session)(postgres) as (connection, _), connection.begin_nested():
        assert "savepoint" in _refusal(postgres.store, connection)
    engine = postgres.engine("psycopg", isolation_level="AUTOCOMMIT")
    with Session(engine) if session else engine.connect() as connection:
        assert "autocommit" in _refusal(postgres.store, connection)
    engine.dispose()


def test_a_session_that_does_not_commit_its_connection_is_refused(postgres: Database) -> None:
    with of_sqlalchemy("psycopg", session=False)(postgres) as (connection, _), Session(connection) as session:
        assert "pass the Connection" in _refusal(postgres.store, session)


async def test_asyncpg_without_a_transaction_is_refused(postgres: Database) -> None:
    connection = await asyncpg.connect(postgres.store)
    async with AsyncIdempotency(postgres.store) as engine:

        async def charge() -> None:
            await current_operation().atransaction(connection)

        with pytest.raises(errors.ConfigurationError, match="no transaction is open"):
            await engine.run("k", charge, scope="s")
    await connection.close()


def test_another_database_is_refused(postgres: Database, postgres_url: str, sqlite: Database) -> None:
    with psycopg.connect(postgres_url) as connection:
        assert "different databases" in _refusal(postgres.store, connection)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as other:
        other.execute("BEGIN")
        assert "different databases" in _refusal(sqlite.store, other)
        assert "same database" in _refusal(postgres.store, other)


def test_a_store_elsewhere_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:
        assert "The store is memory" in _refusal("memory://", connection)


def test_what_is_no_connection_is_refused(postgres: Database) -> None:
    assert "no connection that is known" in _refusal(postgres.store, object())
    engine = postgres.engine("psycopg")
    assert "not an engine or a pool" in _refusal(postgres.store, engine)
    engine.dispose()


def test_a_connection_of_the_other_colour_is_refused(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as connection:

        async def charge() -> None:
            await current_operation().atransaction(connection)

        async def run() -> None:
            async with AsyncIdempotency(postgres.store) as engine:
                with pytest.raises(errors.ConfigurationError, match=r"blocks: use operation\.transaction"):
                    await engine.run("k", charge, scope="s")

        import asyncio

        asyncio.run(run())


def test_a_second_connection_is_refused_and_the_same_one_is_not(postgres: Database) -> None:
    with psycopg.connect(postgres.store) as one, psycopg.connect(postgres.store) as two:

        def charge() -> None:
            operation = current_operation()
            assert operation.transaction(one) is operation.transaction(one)
            operation.transaction(two)

        with Idempotency(postgres.store) as engine, pytest.raises(errors.ConfigurationError, match="already"):
            engine.run("k", charge, scope="s")


# A handler that ends the transaction itself


@pytest.mark.parametrize("more", [False, True], ids=["at once", "and goes on in another"])
def test_t1_a_handler_that_commits_by_itself_leaves_an_unknown_outcome(postgres: Database, more: bool) -> None:
    with Idempotency(postgres.store, policy=BRIEF) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> None:
            current_operation().transaction(connection).execute(insert(1).encode())
            connection.commit()
            if more:
                connection.execute(insert(2).encode())

        with pytest.raises(errors.OutcomeUnknown, match="Leave it open"):
            engine.run("k", charge, scope="s")
        assert postgres.charges() == [1]
        refused_for_good(engine, postgres)


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
def test_sqlites_next_transaction_is_not_taken_for_it(sqlite: Database, ends: str) -> None:
    with Idempotency(sqlite.store, policy=BRIEF) as engine, of_sqlite3(sqlite) as (connection, write):

        def charge() -> None:
            begin(connection)
            current_operation().transaction(connection)
            write(1)
            connection.execute(ends)
            begin(connection)
            write(2)

        if ends == "COMMIT":
            with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
                engine.run("k", charge, scope="s")
        else:
            with pytest.raises(errors.ConfigurationError, match="Its work was rolled back"):
                engine.run("k", charge, scope="s")
        connection.rollback()
        assert sqlite.charges() == ([1] if ends == "COMMIT" else [])
        if ends == "COMMIT":
            refused_for_good(engine, sqlite)
        else:  # a re-run is safe
            assert engine.run("k", lambda: "again", scope="s").value == "again"


async def test_aiosqlites_next_transaction_is_not_taken_for_it(sqlite: Database) -> None:
    async with AsyncIdempotency(sqlite.store) as engine, of_aiosqlite(sqlite) as (connection, write):

        async def charge() -> None:
            await abegin(connection)
            await current_operation().atransaction(connection)
            await write(1)
            await connection.commit()
            await write(2)

        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            await engine.run("k", charge, scope="s")
    assert sqlite.charges() == [1]


@pytest.mark.parametrize("isolation", ["", "IMMEDIATE", None])
def test_savepoints_of_the_handlers_own_disturb_nothing(sqlite: Database, isolation: Any) -> None:
    with (
        Idempotency(sqlite.store) as engine,
        contextlib.closing(sqlite3.connect(str(sqlite.path), isolation_level=isolation)) as connection,
    ):

        def charge() -> str:
            begin(connection)
            current_operation().transaction(connection)
            connection.execute("SAVEPOINT mine")
            connection.execute(insert(1))
            connection.execute("ROLLBACK TO mine")
            connection.execute(insert(2))
            return "charged"

        assert engine.run("k", charge, scope="s").value == "charged"
        assert engine.run("k", charge, scope="s").replayed
    assert sqlite.charges() == [2]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_connection_that_went_back_to_its_pool_is_not_touched(postgres: Database, fails: bool) -> None:
    """Its next user's transaction is neither committed, nor rolled back, nor taken for the operation's."""
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> None:
            current_operation().transaction(connection).execute(insert(1).encode())
            connection.rollback()
            connection.execute(insert(2).encode())  # somebody else's
            if fails:
                raise ValueError("refused")

        expected = ValueError if fails else errors.ConfigurationError
        with pytest.raises(expected, match="refused" if fails else "ended the transaction"):
            engine.run("k", charge, scope="s")
        assert postgres.charges() == []
        connection.commit()
        assert postgres.charges() == [2]
        assert engine.run("k", lambda: "again", scope="s").value == "again"


# What fails at the end


def test_a_constraint_that_fails_at_commit_leaves_nothing(postgres: Database) -> None:
    postgres.execute("CREATE TABLE once (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def charge(twice: bool) -> str:
            current_operation().transaction(connection)
            for _ in range(1 + twice):
                connection.execute("INSERT INTO once VALUES (1)")
            return "done"

        with pytest.raises(psycopg.errors.UniqueViolation):
            engine.run("k", lambda: charge(True), scope="s")
        assert engine.run("k", lambda: charge(False), scope="s").value == "done"


def test_what_a_session_has_pending_fails_before_the_record_is_touched(postgres: Database) -> None:
    from sqlalchemy import Integer
    from sqlalchemy.exc import IntegrityError
    from sqlalchemy.orm import DeclarativeBase, mapped_column

    class Base(DeclarativeBase):
        pass

    class Once(Base):
        __tablename__ = "once"
        id = mapped_column(Integer, primary_key=True)

    postgres.execute("CREATE TABLE once (id integer PRIMARY KEY)")
    postgres.execute("INSERT INTO once VALUES (1)")
    with of_sqlalchemy("psycopg", session=True)(postgres) as (session, _), Idempotency(postgres.store) as engine:

        def charge(number: int) -> int:
            current_operation().transaction(session).add(Once(id=number))
            return number

        with pytest.raises(IntegrityError):
            engine.run("k", lambda: charge(1), scope="s")
        assert engine.run("k", lambda: charge(2), scope="s").value == 2


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

    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> str:
            current_operation().transaction(connection).execute(insert(1).encode())
            monkeypatch.setattr(Psycopg, "commit", lose)
            return "charged"

        if committed:
            assert engine.run("k", charge, scope="s").value == "charged"
            assert postgres.charges() == [1]
        else:
            with pytest.raises(psycopg.OperationalError):
                engine.run("k", charge, scope="s")
            assert postgres.charges() == []
            assert engine.run("k", lambda: "again", scope="s").attempt == 1


def test_c3_a_commit_that_is_still_on_its_way_is_waited_for(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release cannot pass while the transaction holds the row, so what it says is final."""
    import threading

    from retryproof.sql.callers.psycopg import Psycopg

    commit = Psycopg.commit
    threads: list[threading.Timer] = []

    def delay(self: Psycopg) -> None:
        threads.append(threading.Timer(1.0, commit, (self,)))
        threads[0].start()
        raise psycopg.OperationalError("no answer")

    monkeypatch.setattr(Psycopg, "commit", delay)
    monkeypatch.setattr(Psycopg, "rollback", lambda self: None)
    with Idempotency(postgres.store) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> str:
            current_operation().transaction(connection).execute(insert(1).encode())
            return "charged"

        assert engine.run("k", charge, scope="s").value == "charged"
        threads[0].join()
    assert postgres.charges() == [1]


async def test_a_cancellation_does_not_part_the_result_from_its_commit(postgres: Database) -> None:
    import asyncio

    async with AsyncIdempotency(postgres.store) as engine:
        connection = await asyncpg.connect(postgres.store)
        await connection.transaction().start()
        blocker = await asyncpg.connect(postgres.store)
        ready = asyncio.Event()

        async def charge() -> str:
            await current_operation().atransaction(connection)
            await connection.execute(insert(1))
            # The completion waits for the record's row, which somebody else holds.
            await blocker.execute("BEGIN")
            await blocker.execute("SELECT 1 FROM retryproof_operations FOR UPDATE")
            ready.set()
            return "charged"

        task = asyncio.create_task(engine.run("k", charge, scope="s"))
        await ready.wait()
        while not await blocker.fetchval(WAITING):  # noqa: ASYNC110  # the server tells nobody
            await asyncio.sleep(0.01)
        task.cancel()
        await blocker.execute("COMMIT")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert postgres.charges() == [1]
        assert (await engine.run("k", charge, scope="s")).replayed
        await connection.close()
        await blocker.close()


def test_a_result_that_cannot_be_kept_commits_as_a_tombstone(postgres: Database) -> None:
    with (
        Idempotency(postgres.store, policy=Policy(max_result=10)) as engine,
        psycopg.connect(postgres.store) as connection,
    ):

        def charge() -> str:
            current_operation().transaction(connection).execute(insert(1).encode())
            return "x" * 100

        assert engine.run("k", charge, scope="s").value == "x" * 100
        with pytest.raises(errors.ResultOmitted):
            engine.run("k", charge, scope="s")
    assert postgres.charges() == [1]


def test_a_schema_of_the_stores_own_is_found(postgres: Database) -> None:
    from retryproof.stores.sql.migrate import migrate

    store = f"{postgres.store}?schema=mine"
    migrate(store)
    with Idempotency(store) as engine, psycopg.connect(postgres.store) as connection:

        def charge() -> int:
            current_operation().transaction(connection).execute(insert(1).encode())
            return 1

        assert engine.run("k", charge, scope="s").value == 1
    assert postgres.charges() == [1]
