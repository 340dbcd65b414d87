"""Who may join a connection, what of blocks and commits is refused, and what a marker tells (T1)."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.reaper import reap_all
from retryproof.stores import open_store
from tests.transaction.styles import (
    BLOCKING,
    BRIEF,
    ON_LOOP,
    Blocking,
    OnLoop,
    abegin,
    begin,
    of_aiosqlite,
    of_asyncpg,
    of_psycopg,
    of_sqlalchemy,
    of_sqlite3,
    refused_for_good,
)
from tests.transaction.support import WAITING, Database, insert

pytestmark = pytest.mark.timeout(60)


def markers(database: Database) -> int:
    """Markers that everybody can see."""
    if database.postgres:
        with psycopg.connect(database.store) as connection:
            row = connection.execute("SELECT count(*) FROM retryproof_markers").fetchone()
    else:
        with contextlib.closing(sqlite3.connect(str(database.path))) as other:
            row = other.execute("SELECT count(*) FROM retryproof_markers").fetchone()
    assert row is not None
    return int(row[0])


# One operation at a time


@pytest.mark.parametrize("library", BLOCKING)
def test_t1_a_nested_operation_on_one_connection_is_refused(library: str, request: pytest.FixtureRequest) -> None:
    kind, opened = BLOCKING[library]
    database: Database = request.getfixturevalue(kind)
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def inner() -> None:
            current_operation().transaction(connection)
            write(2)

        def outer(fails: bool) -> str:
            begin(connection)
            current_operation().transaction(connection)
            write(1)
            if database.postgres:  # on SQLite the other claim finds the database locked
                with pytest.raises(errors.ConfigurationError, match="connection of its own"):
                    engine.run("inner", inner, scope="s")
            if fails:
                raise ValueError("refused")
            return "charged"

        with pytest.raises(ValueError, match="refused"):
            engine.run("outer", lambda: outer(True), scope="s")
        assert database.charges() == []
        assert engine.run("outer", lambda: outer(False), scope="s").value == "charged"
        assert database.charges() == [1]
        begin(connection)
        assert engine_free(connection)
    assert markers(database) == 0


def engine_free(connection: Any) -> bool:
    """A settled operation leaves its connection to the next one."""
    with contextlib.suppress(Exception):
        connection.rollback()
    return True


@pytest.mark.parametrize("library", ON_LOOP)
async def test_t1_two_at_once_on_one_connection_are_refused(library: str, request: pytest.FixtureRequest) -> None:
    kind, opened = ON_LOOP[library]
    database: Database = request.getfixturevalue(kind)
    async with AsyncIdempotency(database.store) as engine, opened(database) as (connection, write):
        joined, over = asyncio.Event(), asyncio.Event()

        async def first() -> str:
            joined.set()
            await abegin(connection)
            await current_operation().atransaction(connection)
            await write(1)
            over.set()
            await late.wait()
            return "charged"

        async def second() -> None:
            await over.wait()
            try:
                await current_operation().atransaction(connection)
            finally:
                late.set()

        late = asyncio.Event()
        # Both are claimed before the first one begins, which on SQLite shuts claims out.
        waiting = asyncio.create_task(engine.run("two", second, scope="s"))
        await asyncio.sleep(0.05)  # its claim
        running = asyncio.create_task(engine.run("one", first, scope="s"))
        with pytest.raises(errors.ConfigurationError, match="connection of its own"):
            await waiting
        assert (await running).value == "charged"
    assert database.charges() == [1]
    assert markers(database) == 0


def test_t1_other_names_of_one_connection_are_known(postgres: Database) -> None:
    """A session and the driver's connection underneath it are one."""
    with Idempotency(postgres.store) as engine, of_sqlalchemy("psycopg", session=True)(postgres) as (session, write):

        def outer() -> str:
            current_operation().transaction(session)
            write(1)
            for other in (session.connection(), session.connection().connection.driver_connection):
                with pytest.raises(errors.ConfigurationError, match="connection of its own"):
                    engine.run("inner", lambda given=other: current_operation().transaction(given), scope="s")  # type: ignore[misc]  # mypy cannot infer it
            return "charged"

        assert engine.run("outer", outer, scope="s").value == "charged"
    assert postgres.charges() == [1]


def test_t3_a_phase_of_another_operation_on_a_joined_connection_is_refused(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):

        def inner() -> None:
            with current_operation().phase("p", connection):
                write(2)

        def outer() -> str:
            current_operation().transaction(connection)
            write(1)
            with pytest.raises(errors.ConfigurationError, match="connection of its own"):
                engine.run("inner", inner, scope="s")
            return "charged"

        assert engine.run("outer", outer, scope="s").value == "charged"
    assert postgres.charges() == [1]


def test_a_connection_is_free_again_when_who_joined_it_was_forgotten(postgres: Database) -> None:
    """Whatever became of the thread."""
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):
        for number in range(3):

            def charge(number: int = number) -> int:
                current_operation().transaction(connection)
                write(number)
                return number

            assert engine.run(f"k{number}", charge, scope="s").value == number
    assert sorted(postgres.charges()) == [0, 1, 2]


# Blocks that commit by themselves, where they can be seen


async def test_t1_asyncpgs_block_is_refused(postgres: Database) -> None:
    async with AsyncIdempotency(postgres.store) as engine:
        connection = await asyncpg.connect(postgres.store)

        async def charge() -> None:
            await current_operation().atransaction(connection)

        async with connection.transaction():
            with pytest.raises(errors.ConfigurationError, match="commits by itself"):
                await engine.run("k", charge, scope="s")
        await connection.close()


async def test_t1_asyncpgs_savepoint_is_refused_and_leaves_no_marker(postgres: Database) -> None:
    async with AsyncIdempotency(postgres.store) as engine:
        connection = await asyncpg.connect(postgres.store)
        await connection.transaction().start()

        async def charge() -> None:
            await current_operation().atransaction(connection)

        async with connection.transaction():
            with pytest.raises(errors.ConfigurationError, match="savepoint"):
                await engine.run("k", charge, scope="s")
        await connection.execute("COMMIT")
        await connection.close()
        assert markers(postgres) == 0
        assert (await engine.run("k", lambda: "after", scope="s")).value == "after"


def test_t1_a_savepoint_of_plain_sql_is_refused(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, _):
        connection.execute("SAVEPOINT a")
        with pytest.raises(errors.ConfigurationError, match="savepoint"):
            engine.run("k", lambda: current_operation().transaction(connection), scope="s")


@pytest.mark.parametrize("session", [True, False], ids=["session", "connection"])
def test_t1_sqlalchemys_blocks_are_refused(postgres: Database, session: bool) -> None:
    found = postgres.engine("psycopg")
    with (
        Idempotency(postgres.store) as engine,
        Session(found) if session else found.connect() as connection,
        connection.begin(),
        pytest.raises(errors.ConfigurationError, match="commits by itself"),
    ):
        engine.run("k", lambda: current_operation().transaction(connection), scope="s")
    found.dispose()


@pytest.mark.parametrize("library", [name for name in BLOCKING if name.startswith("sqlalchemy")])
def test_t1_sqlalchemys_commit_is_refused_before_it_happens(library: str, request: pytest.FixtureRequest) -> None:
    kind, opened = BLOCKING[library]
    database: Database = request.getfixturevalue(kind)
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def charge(commit: Callable[[], None]) -> str:
            current_operation().transaction(connection)
            with connection.begin_nested():
                write(1)
            commit()
            return "charged"

        with pytest.raises(errors.ConfigurationError, match=r"use flush\(\)"):
            engine.run("k", lambda: charge(connection.commit), scope="s")
        assert database.charges() == []
        connection.rollback()
        assert engine.run("k", lambda: charge(lambda: None), scope="s").value == "charged"
        assert database.charges() == [1]
        write(2)
        connection.commit()  # it is allowed again
        assert database.charges() == [1, 2]
    assert markers(database) == 0


async def test_t1_sqlalchemys_async_commit_is_refused(postgres: Database) -> None:
    async with (
        AsyncIdempotency(postgres.store) as engine,
        postgres.aconnection("asyncpg") as connection,
        AsyncSession(connection.engine) as session,
    ):

        async def charge() -> None:
            await current_operation().atransaction(session)
            await session.commit()

        with pytest.raises(errors.ConfigurationError, match=r"use flush\(\)"):
            await engine.run("k", charge, scope="s")


# What cannot be seen, and the marker tells


def work_and_block(library: str, database: Database) -> Callable[[], None]:
    """Work in a block that commits by itself, which the connection does not show."""

    def psycopgs() -> None:
        with psycopg.connect(database.store) as connection:
            current_operation().transaction(connection)
            connection.execute(insert(1).encode())

    def sqlite3s() -> None:
        with contextlib.closing(sqlite3.connect(str(database.path))) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            current_operation().transaction(connection)
            connection.execute(insert(1))

    def savepoint() -> None:
        with of_sqlite3(database) as (connection, write):
            connection.execute("SAVEPOINT outer_one")
            current_operation().transaction(connection)
            write(1)
            connection.execute("RELEASE outer_one")

    return {"psycopg": psycopgs, "sqlite3": sqlite3s, "savepoint": savepoint}[library]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("library", ["psycopg", "sqlite3", "savepoint"])
def test_t1_a_block_that_committed_leaves_an_unknown_outcome(
    library: str, fails: bool, request: pytest.FixtureRequest
) -> None:
    database: Database = request.getfixturevalue("postgres" if library == "psycopg" else "sqlite")
    work = work_and_block(library, database)
    with Idempotency(database.store, policy=BRIEF) as engine:

        def charge() -> None:
            work()
            if fails:
                raise ValueError("afterwards")

        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", charge, scope="s")
        assert database.charges() == [1]
        refused_for_good(engine, database)
    with contextlib.closing(open_store(database.store)) as store:
        (record,) = store.scan()
        assert (record.committed, record.settled) == (True, False)
        assert list(store.evict([record.id])) == [True]
    assert markers(database) == 0


@pytest.mark.parametrize("opened", [of_asyncpg, of_aiosqlite], ids=["asyncpg", "aiosqlite"])
async def test_t1_a_commit_in_plain_sql_leaves_an_unknown_outcome(
    opened: Callable[[Database], OnLoop], request: pytest.FixtureRequest
) -> None:
    database: Database = request.getfixturevalue("postgres" if opened is of_asyncpg else "sqlite")
    async with AsyncIdempotency(database.store) as engine, opened(database) as (connection, write):

        async def charge() -> None:
            await abegin(connection)
            await current_operation().atransaction(connection)
            await write(1)
            await connection.execute("COMMIT")
            raise ValueError("afterwards")

        with pytest.raises(errors.OutcomeUnknown):
            await engine.run("k", charge, scope="s")
    assert database.charges() == [1]


@pytest.mark.parametrize("library", [name for name in BLOCKING if name.startswith("sqlalchemy")])
def test_t1_a_commit_behind_sqlalchemys_back_leaves_an_unknown_outcome(
    library: str, request: pytest.FixtureRequest
) -> None:
    kind, opened = BLOCKING[library]
    database: Database = request.getfixturevalue(kind)
    with Idempotency(database.store, policy=BRIEF) as engine, opened(database) as (connection, write):

        def charge() -> str:
            current_operation().transaction(connection)
            write(1)
            session = connection if hasattr(connection, "connection") and callable(connection.connection) else None
            driver: Any = connection if session is None else session.connection()
            driver.connection.commit()
            return "charged"

        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", charge, scope="s")
        connection.rollback()
        assert database.charges() == [1]
        refused_for_good(engine, database)


@pytest.mark.parametrize("opened", [of_psycopg, of_sqlite3], ids=["psycopg", "sqlite3"])
def test_t1_a_handler_that_rolled_back_by_itself_may_run_again(
    opened: Callable[[Database], Blocking], request: pytest.FixtureRequest
) -> None:
    database: Database = request.getfixturevalue("postgres" if opened is of_psycopg else "sqlite")
    with Idempotency(database.store) as engine, opened(database) as (connection, write):

        def charge() -> None:
            begin(connection)
            current_operation().transaction(connection)
            write(1)
            connection.rollback()

        with pytest.raises(errors.ConfigurationError, match="Its work was rolled back"):
            engine.run("k", charge, scope="s")
        assert engine.run("k", lambda: "again", scope="s").attempt == 1
    assert database.charges() == []


def test_t1_a_rollback_after_the_handlers_own_commit_says_so(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):

        def charge() -> str:
            current_operation().transaction(connection)
            write(1)
            connection.commit()
            current_operation().rollback()
            return "declined"

        with pytest.raises(errors.OutcomeUnknown):
            engine.run("k", charge, scope="s")


def test_c8_a_loser_that_commits_by_itself_stops_the_one_that_took_over(postgres: Database) -> None:
    """Before the other one's commit: its completion sees the marker."""
    with (
        Idempotency(postgres.store) as engine,
        Idempotency(postgres.store, policy=BRIEF) as rival,
        of_psycopg(postgres) as (mine, write),
        of_psycopg(postgres) as (others, write_theirs),
    ):

        def winner() -> str:
            current_operation().transaction(others)
            write_theirs(2)
            mine.commit()
            return "the winner's"

        def loser() -> str:
            current_operation().transaction(mine)
            write(1)
            postgres.execute("UPDATE retryproof_operations SET lease_until = 0")
            with pytest.raises(errors.OutcomeUnknown):
                rival.run("k", winner, scope="s")
            return "the loser's"

        with pytest.raises((errors.OutcomeUnknown, errors.LeaseLost, errors.InProgress)):
            engine.run("k", loser, scope="s")
        assert postgres.charges() == [1]
        refused_for_good(engine, postgres)


DYING = """
import os, signal, sqlite3, sys
import psycopg
from retryproof import Idempotency, Policy, current_operation

url, then = sys.argv[1:]
sqlite = url.startswith("sqlite")

def charge():
    if sqlite:
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
    else:
        connection = psycopg.connect(url)
    current_operation().transaction(connection)
    connection.execute("INSERT INTO charges VALUES (1)")
    if then == "commit":
        connection.commit()
    os.kill(os.getpid(), signal.SIGKILL)

Idempotency(url, policy=Policy(lease=0.2)).run("k", charge, scope="s")
"""


@pytest.mark.crash
@pytest.mark.parametrize("then", ["commit", "nothing"])
def test_t1_a_crash_after_the_handlers_own_commit_is_never_run_again(database: Database, then: str) -> None:
    dead = subprocess.run([sys.executable, "-c", DYING, database.store, then], env=os.environ, timeout=30, check=False)
    assert dead.returncode == -signal.SIGKILL
    with Idempotency(database.store, policy=BRIEF) as engine:
        if then == "commit":
            assert database.charges() == [1]
            refused_for_good(engine, database)
        else:
            database.execute("UPDATE retryproof_operations SET lease_until = 0")
            assert engine.run("k", lambda: "again", scope="s").attempt == 2
            assert database.charges() == []


def test_o1_an_operator_settles_what_was_committed_without_its_result(database: Database) -> None:
    from click.testing import CliRunner

    from retryproof.cli.commands import retryproof

    opened: Any = of_psycopg if database.postgres else of_sqlite3
    with Idempotency(database.store, policy=BRIEF) as engine, opened(database) as (connection, write):

        def charge() -> None:
            begin(connection)
            current_operation().transaction(connection)
            write(1)
            connection.commit()

        with pytest.raises(errors.OutcomeUnknown):
            engine.run("k", charge, scope="s")
        refused_for_good(engine, database)
        with contextlib.closing(open_store(database.store)) as store:
            (record,) = store.scan()
        shown = CliRunner().invoke(retryproof, ["keys", "show", database.store, record.id.hex()])
        assert "committed" in shown.output
        options = [
            "keys",
            "settle",
            database.store,
            record.id.hex()[:16],
            "--as",
            "never-happened",
            "--why",
            "looked",
            "--audit-file",
            "-",
        ]
        result = CliRunner().invoke(retryproof, options)
        assert result.exit_code == 0, result.output
        assert markers(database) == 0
        assert engine.run("k", lambda: "again", scope="s").value == "again"


MARK = "INSERT INTO retryproof_markers (id, token) SELECT id, token FROM retryproof_operations"


@pytest.mark.parametrize("on_abandoned", ["rerun", "refuse"])
@pytest.mark.parametrize("ended", ["died", "released"])
def test_t1_no_claim_takes_over_what_was_committed(database: Database, ended: str, on_abandoned: Any) -> None:
    """A live lease is waited for; neither a released record nor one that died is taken, in the same life."""
    policy = Policy(on_abandoned=on_abandoned)
    with Idempotency(database.store, policy=policy) as engine:
        with pytest.raises(ValueError, match="refused"):
            engine.run("k", refuse, scope="s")
        database.execute(MARK)
        if ended == "died":
            database.execute("UPDATE retryproof_operations SET state = 1, lease_until = expires_at")
            with pytest.raises(errors.InProgress):
                engine.run("k", lambda: "again", scope="s")
            database.execute("UPDATE retryproof_operations SET lease_until = 0")
        database.execute("UPDATE retryproof_operations SET expires_at = 0")
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", lambda: "again", scope="s")
        database.execute("UPDATE retryproof_markers SET token = 1")  # of an earlier life
        if ended == "released":
            assert engine.run("k", lambda: "again", scope="s").value == "again"


def refuse() -> None:
    raise ValueError("refused")


def test_c12_the_end_of_what_was_committed_without_its_result_is_told(database: Database) -> None:
    ended: list[Any] = []
    with Idempotency(database.store) as engine, pytest.raises(ValueError, match="refused"):
        engine.run("k", refuse, scope="s")
    database.execute(MARK)
    database.execute("UPDATE retryproof_operations SET expires_at = 0")
    with contextlib.closing(open_store(database.store)) as store:
        totals = reap_all(store, events=[], on_ended=ended.append)
    assert (totals.settled, totals.unsettled, [record.committed for record in ended]) == (0, 1, [True])
    assert markers(database) == 0


async def test_t1_asyncpgs_connection_that_went_back_to_its_pool_is_left_alone(postgres: Database) -> None:
    async with (
        asyncpg.create_pool(postgres.store, min_size=1, max_size=1) as pool,
        AsyncIdempotency(postgres.store) as engine,
    ):

        async def charge() -> None:
            async with pool.acquire() as connection:
                await connection.transaction().start()
                await current_operation().atransaction(connection)
                await connection.execute(insert(1))

        with pytest.raises(errors.ConfigurationError, match="Its work was rolled back"):
            await engine.run("k", charge, scope="s")
        assert (await engine.run("k", lambda: "again", scope="s")).value == "again"
    assert postgres.charges() == []


@pytest.mark.parametrize("how", ["atransaction", "phase"])
async def test_a_join_that_is_cancelled_gives_its_connection_back(postgres: Database, how: str) -> None:
    """It left the block that lent it, and another operation joins the same connection."""
    pool = await asyncpg.create_pool(postgres.store, min_size=1, max_size=1)
    blocker = await asyncpg.connect(postgres.store)
    async with AsyncIdempotency(postgres.store, policy=Policy(release_on_cancel=True)) as engine, pool:

        async def charge() -> str:
            operation = current_operation()
            if how == "phase":
                async with operation.phase("charge", pool.acquire()) as phase:
                    await phase.connection.execute(insert(1))
            else:
                await (await operation.atransaction(pool.acquire())).execute(insert(1))
            return "charged"

        await blocker.execute("BEGIN")
        await blocker.execute("LOCK TABLE retryproof_markers IN SHARE MODE")
        task = asyncio.create_task(engine.run("k", charge, scope="s"))
        while not await blocker.fetchval(WAITING):  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await blocker.execute("COMMIT")
        assert pool.get_idle_size() == 1
        assert postgres.charges() == []
        assert (await engine.run("k", charge, scope="s")).value == "charged"
        await blocker.close()
    assert postgres.charges() == [1]


async def test_a_cancellation_after_the_handlers_own_commit_goes_on(postgres: Database) -> None:
    async with AsyncIdempotency(postgres.store, policy=Policy(release_on_cancel=True)) as engine:
        connection = await asyncpg.connect(postgres.store)
        await connection.transaction().start()
        committed = asyncio.Event()

        async def charge() -> None:
            await current_operation().atransaction(connection)
            await connection.execute("COMMIT")
            committed.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(engine.run("k", charge, scope="s"))
        await committed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await connection.close()
        postgres.execute("UPDATE retryproof_operations SET lease_until = 0")
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            await engine.run("k", lambda: "again", scope="s")


def test_threads_that_race_for_one_connection_have_one_winner(postgres: Database) -> None:
    with Idempotency(postgres.store) as engine, of_psycopg(postgres) as (connection, write):
        both, results = threading.Barrier(2, timeout=20), []

        def charge() -> str:
            both.wait()
            try:
                current_operation().transaction(connection)
            finally:
                both.wait()
            write(1)
            return "charged"

        def run(key: str) -> None:
            try:
                results.append(engine.run(key, charge, scope="s").value)
            except errors.ConfigurationError:
                results.append("refused")

        threads = [threading.Thread(target=run, args=(key,)) for key in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(results) == ["charged", "refused"]
    assert postgres.charges() == [1]
