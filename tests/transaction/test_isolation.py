"""Transactions whose statements all see one snapshot, and renewals that come after it (T1, C6).

A renewal between the snapshot and the completion would make the completion fail, so what joins holds its record.
"""

import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import IsolationLevel
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from tests.transaction.styles import of_sqlite3
from tests.transaction.support import Database, insert

pytestmark = pytest.mark.timeout(60)

LEASE = 0.3
LONG = 3 * LEASE
SHORT = Policy(lease=LEASE)
LEVELS = ["REPEATABLE READ", "SERIALIZABLE"]
UNLUCKY = (psycopg.errors.SerializationFailure, asyncpg.SerializationError, DBAPIError)
"""A renewal came between the snapshot and the joining, which on a busy machine may be far apart: nothing was done."""
RENEW = "UPDATE retryproof_operations SET lease_until = lease_until + 1"


def tries() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """A few tries for what a renewal may spoil, and a last one that has to succeed."""
    yield from (contextlib.suppress(*UNLUCKY) for _ in range(4))
    yield contextlib.nullcontext()


def wait(seconds: float) -> None:
    """The work that takes so long."""
    threading.Event().wait(seconds)


@contextlib.contextmanager
def of_psycopg(database: Database, level: str) -> Iterator[tuple[Any, Callable[[str], Any]]]:
    with psycopg.connect(database.store) as connection:
        connection.isolation_level = IsolationLevel[level.replace(" ", "_")]
        yield connection, lambda sql: connection.execute(sql.encode())


@contextlib.contextmanager
def of_sqlalchemy(database: Database, level: str) -> Iterator[tuple[Any, Callable[[str], Any]]]:
    engine = database.engine("psycopg", isolation_level=level)
    with Session(engine) as session:
        yield session, lambda sql: session.execute(text(sql))
    engine.dispose()


@contextlib.asynccontextmanager
async def of_asyncpg(database: Database, level: str) -> AsyncIterator[tuple[Any, Callable[[str], Any]]]:
    connection = await asyncpg.connect(database.store)
    await connection.transaction(isolation="serializable" if level == "SERIALIZABLE" else "repeatable_read").start()
    yield connection, connection.execute
    await connection.close()


@contextlib.asynccontextmanager
async def of_async_sqlalchemy(database: Database, level: str) -> AsyncIterator[tuple[Any, Callable[[str], Any]]]:
    async with (
        database.aconnection("asyncpg", isolation_level=level) as connection,
        AsyncSession(connection.engine) as session,
    ):
        yield session, lambda sql: session.execute(text(sql))


BLOCKING = {"psycopg": of_psycopg, "sqlalchemy": of_sqlalchemy}
ON_LOOP = {"asyncpg": of_asyncpg, "sqlalchemy": of_async_sqlalchemy}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("library", BLOCKING)
def test_t1_a_long_transaction_with_one_snapshot_commits(postgres: Database, library: str, level: str) -> None:
    """The keeper asks for renewals all the while; nobody takes over meanwhile."""
    with Idempotency(postgres.store, policy=SHORT) as engine, Idempotency(postgres.store, policy=SHORT) as rival:

        def charge(connection: Any, execute: Callable[[str], Any]) -> str:
            current_operation().transaction(connection)
            execute(insert())
            wait(LONG)
            with pytest.raises(errors.InProgress):
                rival.run("k", lambda: "taken over", scope="s")
            return "charged"

        for one in tries():
            with one, BLOCKING[library](postgres, level) as given:
                outcome = engine.run("k", partial(charge, *given), scope="s")
                break
        else:
            raise AssertionError
        assert (outcome.value, outcome.attempt, outcome.replayed) == ("charged", 1, False)
        assert rival.run("k", lambda: "another", scope="s").value == "charged"
    assert postgres.charges() == [1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("library", ON_LOOP)
async def test_t1_a_long_transaction_with_one_snapshot_commits_on_a_loop(
    postgres: Database, library: str, level: str
) -> None:
    async with AsyncIdempotency(postgres.store, policy=SHORT) as engine:

        async def charge(connection: Any, execute: Callable[[str], Any]) -> str:
            await current_operation().atransaction(connection)
            await execute(insert())
            wait(LONG)  # it blocks the loop, even
            return "charged"

        for one in tries():
            with one:
                async with ON_LOOP[library](postgres, level) as given:
                    outcome = await engine.run("k", partial(charge, *given), scope="s")
                    break
        else:
            raise AssertionError
        assert (outcome.value, outcome.attempt, outcome.replayed) == ("charged", 1, False)
    assert postgres.charges() == [1]


@pytest.mark.parametrize("level", LEVELS)
def test_t3_a_long_phase_with_one_snapshot_commits(postgres: Database, level: str) -> None:
    with Idempotency(postgres.store, policy=SHORT) as engine:

        def ride(connection: Any, execute: Callable[[str], Any]) -> str:
            with current_operation().phase("create", connection) as phase:
                execute(insert())
                wait(LONG)
                phase.result = "created"
            return str(phase.result)

        for one in tries():
            with one, of_psycopg(postgres, level) as given:
                outcome = engine.run("k", partial(ride, *given), scope="s")
                break
        else:
            raise AssertionError
        assert (outcome.value, outcome.attempt, outcome.replayed) == ("created", 1, False)
    assert postgres.charges() == [1]


@pytest.mark.parametrize("level", LEVELS)
def test_t1_a_renewal_between_the_snapshot_and_the_joining_is_a_definite_failure(
    postgres: Database, level: str
) -> None:
    """Nothing was done, the operation is free, and what runs again has its one effect."""
    with Idempotency(postgres.store) as engine:
        for renewed in (True, False):
            with of_psycopg(postgres, level) as (connection, execute):

                def charge(
                    renewed: bool = renewed, connection: Any = connection, execute: Callable[[str], Any] = execute
                ) -> str:
                    execute("SELECT count(*) FROM charges")  # the snapshot
                    if renewed:
                        postgres.execute(RENEW)
                    current_operation().transaction(connection)
                    execute(insert())
                    return "charged"

                if renewed:
                    with pytest.raises(psycopg.errors.SerializationFailure):
                        engine.run("k", charge, scope="s")
                    assert postgres.charges() == []
                else:
                    outcome = engine.run("k", charge, scope="s")
                    assert (outcome.value, outcome.replayed) == ("charged", False)
    assert postgres.charges() == [1]


@pytest.mark.parametrize("level", LEVELS)
def test_t1_a_snapshot_older_than_the_claim_is_refused(postgres: Database, level: str) -> None:
    with (
        Idempotency(postgres.store) as engine,
        of_psycopg(postgres, level) as (connection, execute),
    ):
        execute("SELECT count(*) FROM charges")  # the snapshot

        def charge() -> None:
            current_operation().transaction(connection)

        with pytest.raises(errors.ConfigurationError, match="begun before the operation"):
            engine.run("k", charge, scope="s")
    assert postgres.charges() == []


def test_t1_work_that_cannot_be_serialized_fails_definitely_and_may_run_again(postgres: Database) -> None:
    """Two operations that each see the other's work undone: one commits, the other rolls back and is told so."""
    both = threading.Barrier(2, timeout=20)
    results: dict[str, Any] = {}

    def transfer(engine: Idempotency, key: str, *, together: bool) -> str:
        with of_psycopg(postgres, "SERIALIZABLE") as (connection, execute):

            def work() -> str:
                current_operation().transaction(connection)
                execute("SELECT sum(id) FROM charges")
                if together:
                    both.wait()
                execute(insert())
                if together:
                    both.wait()
                return "charged"

            return engine.run(key, work, scope="s").value

    with Idempotency(postgres.store) as engine:

        def run(key: str) -> None:
            try:
                results[key] = transfer(engine, key, together=True)
            except psycopg.errors.SerializationFailure:
                results[key] = None

        threads = [threading.Thread(target=run, args=(key,)) for key in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(results.values(), key=str) == [None, "charged"]
        assert postgres.charges() == [1]
        for key in results:
            assert transfer(engine, key, together=False) == "charged"
    assert postgres.charges() == [1, 1]


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_c14_a_step_beside_a_transaction_that_holds_the_record_is_refused_before_it_runs(
    kind: str, request: pytest.FixtureRequest
) -> None:
    calls: list[str] = []
    database: Database = request.getfixturevalue("postgres" if kind == "postgresql" else "sqlite")
    opened = of_psycopg(database, "REPEATABLE READ") if kind == "postgresql" else of_sqlite3(database)
    with Idempotency(database.store) as engine, opened as (connection, _):

        def charge() -> str:
            operation = current_operation()
            operation.step("before", lambda key: calls.append("before"))
            if kind == "sqlite":
                connection.execute("BEGIN IMMEDIATE")
            operation.transaction(connection)
            with pytest.raises(errors.ConfigurationError, match="before you ask for the transaction"):
                operation.step("beside", lambda key: calls.append("beside"))
            return "charged"

        assert engine.run("k", charge, scope="s").value == "charged"
    assert calls == ["before"]


def test_c14_a_step_beside_a_transaction_at_read_committed_is_kept(postgres: Database) -> None:
    with (
        Idempotency(postgres.store) as engine,
        of_psycopg(postgres, "READ COMMITTED") as (connection, execute),
    ):

        def charge() -> str:
            current_operation().transaction(connection)
            execute(insert())
            return current_operation().step("card", lambda key: "paid")

        assert engine.run("k", charge, scope="s").value == "paid"
    assert postgres.charges() == [1]
