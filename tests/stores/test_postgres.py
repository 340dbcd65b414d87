"""What is PostgreSQL's own: locks of others, isolation levels, plans, round trips, hung and restarting servers."""

import asyncio
import itertools
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import asyncpg
import psycopg
import pytest

from retryproof.core.batch import ItemError
from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Finished,
    Mismatch,
    Release,
    Renew,
    Running,
)
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.record import MICROSECONDS, Record, State, decide, microseconds
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.postgres import asyncpg as on_asyncpg
from retryproof.sql.postgres import joined as joining
from retryproof.sql.postgres import records as postgres
from retryproof.sql.postgres import statements as postgres_statements
from retryproof.sql.postgres.statements import Items
from retryproof.sql.postgres.url import parse
from retryproof.stores.sql import asyncpg as on_asyncpg_store
from retryproof.stores.sql.asyncpg import AsyncpgStore
from retryproof.stores.sql.migrate import migrate
from retryproof.stores.sql.postgres import PostgresStore
from retryproof.stores.sql.psycopg import PsycopgStore
from tests.conftest import PrivateServer
from tests.stores.support import (
    again,
    check_a_hung_server_does_not_hang_the_loop,
    check_a_hung_server_is_an_error_in_time,
    new_claim,
    pump,
    until_blocked,
)

TABLE = postgres_statements.TABLE
PROMPT = 1.0  # seconds; a wait for a lock would take the store's whole time-out, two


@pytest.fixture
def url(postgres_url: str, unique: str) -> str:
    """A schema of the test's own."""
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return url


@pytest.fixture
def store(url: str) -> Iterator[PsycopgStore]:
    store = PsycopgStore(url)
    yield store
    store.close()


@pytest.fixture
def caller(postgres_url: str, unique: str) -> Iterator[psycopg.Connection[Any]]:
    """Another session with a transaction of its own, in the test's schema."""
    with psycopg.connect(postgres_url, options=f"-c search_path={unique}", client_encoding="utf8") as connection:
        yield connection


def token(reply: object) -> int:
    assert isinstance(reply, Acquired)
    return reply.token


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    return call(), time.monotonic() - start


def running_and_acquired(replies: Sequence[object]) -> tuple[int, int]:
    return sum(isinstance(reply, Running) for reply in replies), sum(isinstance(reply, Acquired) for reply in replies)


class TestLocksOfOthers:
    @pytest.mark.quiet
    def test_t2_a_claim_that_a_rival_has_not_committed_does_not_hold_up_its_neighbours(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        claims = [new_claim() for _ in range(64)]
        pump(caller, postgres.claim_plan([again(claims[20])]))
        replies, seconds = timed(lambda: store.claim(claims))
        assert running_and_acquired(replies) == (1, 63)
        assert replies[20] == Running(1.0)
        assert seconds < PROMPT
        caller.rollback()
        assert isinstance(store.claim([claims[20]])[0], Acquired)

    @pytest.mark.quiet
    def test_t2_an_update_that_a_rival_has_not_committed_does_not_hold_up_its_neighbours(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        claims = [new_claim() for _ in range(64)]
        store.claim(claims)
        caller.execute(f"UPDATE {TABLE} SET lease_until = 0")
        caller.commit()
        caller.execute(f"UPDATE {TABLE} SET lease_until = 1 WHERE id = %s", (claims[20].id,))
        replies, seconds = timed(lambda: store.claim([again(claim) for claim in claims]))
        assert running_and_acquired(replies) == (1, 63)
        assert replies[20] == Running(1.0)
        assert seconds < PROMPT

    @pytest.mark.quiet
    def test_t2_a_caller_that_completes_in_its_transaction_holds_up_no_renewal(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        claims = [new_claim() for _ in range(64)]
        tokens = [token(reply) for reply in store.claim(claims)]
        complete = Complete(claims[20].id, claims[20].nonce, tokens[20], b"result")
        renewals = [Renew(claim.id, claim.nonce, number, 20.0) for claim, number in zip(claims, tokens, strict=True)]
        assert pump(caller, _joined(complete)) == DONE
        replies, seconds = timed(lambda: store.renew(renewals))
        assert replies[:20] + replies[21:] == [DONE] * 63
        assert isinstance(replies[20], StoreUnavailable)
        assert seconds < PROMPT
        caller.commit()
        assert store.renew(renewals)[20] == LOST
        assert store.complete([complete]) == [DONE]

    def test_t2_a_locked_row_holds_up_no_completion_of_the_batch_and_each_is_told_what_came_of_it(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        """C3: the server says how many it completed, not which."""
        claims = [new_claim() for _ in range(64)]
        tokens = [token(reply) for reply in store.claim(claims)]
        commands = [
            Complete(claim.id, claim.nonce, number, b"result") for claim, number in zip(claims, tokens, strict=True)
        ]
        stale = Complete(claims[1].id, claims[1].nonce, tokens[1] - 1, b"result")
        assert store.complete([commands[0]]) == [DONE]
        caller.execute(f"UPDATE {TABLE} SET lease_until = lease_until + 1 WHERE id = %s", (claims[2].id,))
        replies = store.complete([commands[0], stale, *commands[2:]])
        assert replies[:2] == [DONE, LOST]
        assert isinstance(replies[2], StoreUnavailable)
        assert replies[3:] == [DONE] * 61
        caller.commit()
        assert store.complete(commands) == [DONE] * 64

    def test_t1_a_completion_in_the_callers_transaction_is_undone_with_it(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        claim = new_claim()
        complete = Complete(claim.id, claim.nonce, token(store.claim([claim])[0]), b"result")
        assert pump(caller, _joined(complete)) == DONE
        caller.rollback()
        assert isinstance(store.claim([again(claim)])[0], Running)

    def test_t1_a_completion_in_the_callers_transaction_waits_for_a_renewal_and_is_done(
        self, store: PsycopgStore, caller: psycopg.Connection[Any], postgres_url: str, unique: str
    ) -> None:
        claim = new_claim()
        complete = Complete(claim.id, claim.nonce, token(store.claim([claim])[0]), b"result")
        with (
            psycopg.connect(postgres_url, options=f"-c search_path={unique}", client_encoding="utf8") as other,
            ThreadPoolExecutor(1) as pool,
        ):
            other.execute(f"UPDATE {TABLE} SET lease_until = lease_until + 1")
            waiting = pool.submit(pump, caller, _joined(complete))
            until_blocked(other, caller.info.backend_pid)
            other.commit()
            assert waiting.result() == DONE

    def test_t1_a_completion_with_a_stale_token_changes_nothing(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        claim = new_claim()
        stale = Complete(claim.id, claim.nonce, token(store.claim([claim])[0]) - 1, b"result")
        assert pump(caller, _joined(stale)) == LOST

    def test_a_table_that_others_lock_is_an_error_in_time(
        self, store: PsycopgStore, caller: psycopg.Connection[Any], url: str
    ) -> None:
        store.claim([new_claim()])
        caller.execute(f"LOCK TABLE {TABLE}")
        hurried = PsycopgStore(url, timeout=0.5)
        with pytest.raises(StoreUnavailable):
            hurried.claim([new_claim()])
        hurried.close()


def _joined(command: Complete) -> Plan[FenceReply | None]:
    """Join the caller's transaction and complete in it."""
    yield Statement("SELECT set_config('retryproof.joined', $1::text, true)", (str(command.token),))
    yield Statement(
        "INSERT INTO retryproof_markers (id, token) VALUES ($1, $2) RETURNING 1", (command.id, command.token)
    )
    return (yield from joining.complete_joined_plan(command))


class TestRaces:
    @pytest.mark.parametrize("pooled", [False, True], ids=["own-session", "pooled-session"])
    @pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
    def test_i1_one_of_many_threads_acquires_whatever_isolation_the_server_defaults_to(
        self, url: str, caller: psycopg.Connection[Any], isolation: str, pooled: bool
    ) -> None:
        """Behind a transaction pooler our own setting of the isolation level is not there to help."""
        database = caller.info.dbname
        caller.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'".encode())
        caller.commit()
        store = PsycopgStore(f"{url}&pool_size=6" + ("&statement_cache_size=0" if pooled else ""), timeout=10.0)
        try:
            for _ in range(5):
                claims = [new_claim() for _ in range(32)]
                first = _claimed_by_six(store, [[again(claim) for claim in claims] for _ in range(6)])
                assert all(len(acquired) == 1 for acquired in first)
                caller.execute(f"UPDATE {TABLE} SET lease_until = 0")
                caller.commit()
                second = _claimed_by_six(store, [[again(claim) for claim in claims[::-1]] for _ in range(6)])
                assert all(len(acquired) == 1 for acquired in second)
                assert {acquired[0].attempt for acquired in second} == {2}
        finally:
            store.close()
            caller.execute(f"ALTER DATABASE {database} RESET default_transaction_isolation".encode())
            caller.commit()

    def test_our_own_sessions_are_read_committed_on_a_serializable_server(
        self, postgres_url: str, caller: psycopg.Connection[Any]
    ) -> None:
        for name, value in parse(postgres_url).settings(2.0).items():
            caller.execute("SELECT set_config(%s, %s, false)", (name, value))
        caller.commit()
        assert caller.execute("SHOW transaction_isolation").fetchall() == [("read committed",)]

    def test_overlapping_batches_in_opposite_order_do_not_deadlock(
        self, url: str, caller: psycopg.Connection[Any]
    ) -> None:
        stores = [PsycopgStore(url), PsycopgStore(url)]
        claims = [new_claim() for _ in range(64)]
        tokens = [token(reply) for reply in stores[0].claim(claims)]
        renewals = [Renew(claim.id, claim.nonce, number, 20.0) for claim, number in zip(claims, tokens, strict=True)]
        steps = [Checkpoint(renewal.id, renewal.nonce, renewal.token, "a", b"1") for renewal in renewals[::-1]]

        def alternate(store: PsycopgStore, order: int) -> None:
            for _ in range(10):
                store.renew(renewals[::order])
                store.checkpoint(steps[::order])

        before = _deadlocks(caller)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(alternate, stores * 2, [1, -1, -1, 1]))
        for store in stores:
            store.close()
        assert _deadlocks(caller) == before


def _deadlocks(connection: psycopg.Connection[Any]) -> int:
    connection.rollback()
    rows = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchall()
    return int(rows[0][0])


def _claimed_by_six(store: PsycopgStore, batches: Sequence[Sequence[Claim]]) -> list[list[Acquired]]:
    """For each operation, who acquired it."""
    barrier = threading.Barrier(len(batches))

    def claim(batch: Sequence[Claim]) -> dict[bytes, Any]:
        barrier.wait()
        return dict(zip([claim.id for claim in batch], store.claim(batch), strict=True))

    with ThreadPoolExecutor(len(batches)) as pool:
        answers = list(pool.map(claim, batches))
    return [[answer[id] for answer in answers if isinstance(answer[id], Acquired)] for id in answers[0]]


class TestTheTable:
    """The SQL mirrors `core.record.decide`, over every kind of record and claim."""

    HOUR = 3_600 * MICROSECONDS

    def test_a_claim_finds_in_sql_what_it_finds_in_the_core(
        self, store: PsycopgStore, caller: psycopg.Connection[Any]
    ) -> None:
        now = int(time.time()) * MICROSECONDS
        cases = [self._case(now, *choice) for choice in self._choices()]
        for some in _batches(cases, 256):
            self._insert(caller, [record for record, _ in some])
            replies = store.claim([claim for _, claim in some])
            kept = self._rows(caller, [record.id for record, _ in some])
            for (record, claim), reply in zip(some, replies, strict=True):
                self._compare(record, claim, reply, kept[record.id], now)

    def _choices(self) -> Iterator[tuple[Any, ...]]:
        return itertools.product(
            State,
            [True, False],
            [True, False],
            [True, False],
            [True, False],
            [0, 4],
            [True, False],
            ["rerun", "refuse", "settle"],
            [0, 2],
            [True, False],
        )

    def _case(
        self,
        now: int,
        state: State,
        same_fingerprint: bool,
        same_nonce: bool,
        live: bool,
        expired: bool,
        deaths: int,
        counts: bool,
        on_abandoned: str,
        alone: int,
        committed: bool,
    ) -> tuple[Record, Claim]:
        claim = new_claim(
            fingerprint=b"same" if same_fingerprint else b"other", on_abandoned=on_abandoned, alone=alone, trace="new"
        )
        record = Record(
            id=claim.id,
            state=state,
            fingerprint=b"same",
            birth=b"birth",
            nonce=claim.nonce if same_nonce else b"nonce",
            token=now + (self.HOUR if live else 0),  # a token from a clock that was ahead
            attempt=3,
            deaths=deaths,
            counts=counts,
            first_seen=now - 2 * self.HOUR,
            lease_until=now + (self.HOUR if live and state is State.IN_PROGRESS else -self.HOUR),
            expires_at=now + (-self.HOUR if expired else self.HOUR),
            retention=60.0,
            result=b"" if state is State.COMPLETED else None,
            tenant=b"tenant",
            trace="old",
            checkpoints={"a": b"1"} if state in (State.IN_PROGRESS, State.RELEASED) else {},
            committed=committed,
        )
        return record, claim

    def _insert(self, caller: psycopg.Connection[Any], records: Sequence[Record]) -> None:
        with caller.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO {TABLE} (id, state, fingerprint, birth, nonce, token, attempt, deaths, counts,"
                " first_seen, lease_until, expires_at, retention, result, tenant, trace, checkpoints) VALUES"
                " (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s::jsonb)",
                [
                    (
                        record.id,
                        int(record.state),
                        record.fingerprint,
                        record.birth,
                        record.nonce,
                        record.token,
                        record.attempt,
                        record.deaths,
                        record.counts,
                        record.first_seen,
                        record.lease_until,
                        record.expires_at,
                        microseconds(record.retention),
                        record.result,
                        record.tenant,
                        record.trace.encode(),
                        '{"YQ==": "MQ=="}' if record.checkpoints else None,
                    )
                    for record in records
                ],
            )
            marks = [(record.id, record.first_seen) for record in records if record.committed]
            cursor.executemany("INSERT INTO retryproof_markers (id, token) VALUES (%s, %s)", marks)
        caller.commit()

    def _rows(self, caller: psycopg.Connection[Any], ids: Sequence[bytes]) -> dict[bytes, Record]:
        """Records as they are in the table, expired or not."""
        columns = postgres_statements.RECORD
        rows = caller.execute(
            f"SELECT {columns}, o.result, o.checkpoints::text, 0, EXISTS (SELECT FROM retryproof_markers AS m "
            f"WHERE m.id = o.id AND m.token >= o.first_seen) FROM {TABLE} AS o WHERE id = ANY (%s)".encode(),
            (list(ids),),
        ).fetchall()
        caller.commit()
        return {row[0]: postgres.read_record(row) for row in rows}

    def _compare(self, record: Record, claim: Claim, reply: object, kept: Record, about: int) -> None:
        written, _ = decide(record, claim, about)
        now = kept.lease_until - microseconds(claim.lease) if written else about
        written, expected = decide(record, claim, now)
        assert kept == (written or record)
        if isinstance(expected, Running) and expected.left:
            assert isinstance(reply, Running)
            assert reply.left == pytest.approx(expected.left, abs=60)
        else:
            assert reply == expected


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


class TestRoundTrips:
    async def test_a_claim_a_completion_and_a_replay_are_one_transaction_each(
        self, url: str, postgres_url: str
    ) -> None:
        async def work(store: AsyncpgStore) -> None:
            claims = await _claim_and_complete(store, 64)
            replays = await store.claim([again(claim) for claim in claims])
            assert all(isinstance(reply, Finished) for reply in replays)

        assert await _transactions(url, postgres_url, work) == 3

    async def test_a_lost_race_takes_one_more(self, url: str, postgres_url: str) -> None:
        rival = await asyncpg.connect(postgres_url)
        claims = [new_claim() for _ in range(64)]
        await rival.fetchval("SELECT pg_advisory_lock($1)", postgres.lock_keys([claims[0].id])[0])

        async def work(store: AsyncpgStore) -> None:
            assert running_and_acquired(await store.claim([claims[0], new_claim()])) == (1, 1)

        assert await _transactions(url, postgres_url, work) == 2
        await rival.close()

    async def test_a_batch_with_rows_to_take_takes_one_more_and_answers_every_kind(
        self, url: str, postgres_url: str
    ) -> None:
        """C5, C6: what was given back and what was abandoned is taken by a second statement."""

        async def work(store: AsyncpgStore) -> None:
            finished, *_ = await _claim_and_complete(store, 2)
            left = [new_claim(lease=0.0), new_claim(), new_claim()]
            held = await store.claim(left)
            assert await store.release([Release(left[1].id, left[1].nonce, token(held[1]))]) == [DONE]
            other = new_claim(id=left[2].id, fingerprint=b"other")
            claims = [new_claim(), again(left[0]), again(left[1]), other, again(finished), new_claim()]
            replies = await store.claim(claims)
            new, taken, retried, mismatch, replay, last = replies
            acquired = [reply.attempt for reply in (new, taken, retried, last) if isinstance(reply, Acquired)]
            assert acquired == [1, 2, 1, 1]
            assert mismatch == Mismatch(b"same")
            assert isinstance(replay, Finished)
            assert token(taken) > token(held[0])
            assert await store.claim(claims[:3]) == replies[:3]  # C3

        before, mixed, repeated = 4, 2, 1
        assert await _transactions(url, postgres_url, work) == before + mixed + repeated


async def _claim_and_complete(store: AsyncpgStore, number: int) -> Sequence[Claim]:
    claims = [new_claim() for _ in range(number)]
    replies = await store.claim(claims)
    completions = [
        Complete(claim.id, claim.nonce, token(reply), b"") for claim, reply in zip(claims, replies, strict=True)
    ]
    assert await store.complete(completions) == [DONE] * number
    return claims


async def _transactions(url: str, postgres_url: str, work: Callable[[AsyncpgStore], Any]) -> int:
    """How many transactions the server counts for some work, beside those of opening a store.

    Sessions report when they end; the count is read from another database. The median of three, since the server's
    own work (autovacuum) counts as well.
    """
    database = postgres_url.rpartition("/")[2]
    monitor = await asyncpg.connect(postgres_url.rpartition("/")[0] + "/postgres")

    async def spent(work: Callable[[AsyncpgStore], Any]) -> int:
        before = await _commits(monitor, database)
        store = AsyncpgStore(url)
        await _claim_and_complete(store, 2)  # a connection's first call asks for the types of arrays
        await work(store)
        await store.aclose()
        return await _commits(monitor, database) - before

    async def nothing(store: AsyncpgStore) -> None:
        pass

    costs = [await spent(work) - await spent(nothing) for _ in range(3)]
    await monitor.close()
    return statistics.median_low(costs)


async def _commits(monitor: "asyncpg.Connection[asyncpg.Record]", database: str) -> int:
    """Transactions committed, once no session of the store's is left to report."""
    left = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND application_name = 'retryproof'"
    while await monitor.fetchval(left, database):
        await monitor.execute("SELECT pg_sleep(0.01)")
    return int(
        await monitor.fetchval("SELECT pg_stat_get_db_xact_commit(oid) FROM pg_database WHERE datname = $1", database)
    )


class TestPlans:
    """No hot statement scans the table, however many rows it has and whatever the planner knows of them."""

    STATEMENTS: ClassVar[dict[str, str]] = {
        "claim": postgres_statements.claim(TABLE, Items.MANY, taking=False),
        "claim alike": postgres_statements.claim(TABLE, Items.ALIKE, taking=False),
        "claim one": postgres_statements.claim(TABLE, Items.ONE, taking=False),
        "take": postgres_statements.claim(TABLE, Items.MANY, taking=True),
        "take alike": postgres_statements.claim(TABLE, Items.ALIKE, taking=True),
        "take one": postgres_statements.claim(TABLE, Items.ONE, taking=True),
        "complete": postgres_statements.complete(TABLE, Items.MANY),
        "complete alike": postgres_statements.complete(TABLE, Items.ALIKE),
        "join a caller's transaction": joining.join(TABLE),
        "complete in a caller's transaction": joining.complete_joined(TABLE),
        "complete what is listed in it": joining.complete_joined(TABLE, listed=True),
        "checkpoint in it": joining.checkpoint_joined(TABLE),
        "complete one": postgres_statements.complete(TABLE, Items.ONE),
        "release": postgres_statements.release(TABLE),
        "renew": postgres_statements.renew(TABLE),
        "checkpoint": postgres_statements.checkpoint(TABLE),
        "look": postgres_statements.look(TABLE),
        "get": postgres_statements.get(TABLE),
        "evict": postgres_statements.evict(TABLE),
        "scan": postgres_statements.scan(TABLE, tenant=False, indexed=False),
        "scan a tenant": postgres_statements.scan(TABLE, tenant=True, indexed=True),
        "reap": postgres_statements.reap(TABLE),
        "end": postgres_statements.end(TABLE),
    }
    VALUES: ClassVar[dict[str, str]] = {
        "bytea": r"\x0102",
        "bigint": "1",
        "int": "1",
        "bool": "t",
        "text": "a",
        "float8": "0",
    }

    def test_hot_statements_go_by_an_index(self, url: str, caller: psycopg.Connection[Any]) -> None:
        caller.execute(
            f"INSERT INTO {TABLE} (id, state, fingerprint, birth, nonce, token, attempt, deaths, counts, first_seen,"
            " lease_until, expires_at, retention, tenant, trace)"
            " SELECT sha256(i::text::bytea), 3, '', '', '', i, 1, 0, false, i, i, i + 9000000000000000, 1, '', ''"
            " FROM generate_series(1, 100000) AS i"
        )
        caller.commit()
        for analyzed, mode in itertools.product((False, True), ("force_generic_plan", "force_custom_plan")):
            if analyzed:
                caller.execute(f"ANALYZE {TABLE}")
            caller.execute(f"SET plan_cache_mode = {mode}".encode())
            for name, sql in self.STATEMENTS.items():
                plan = self._plan(caller, sql)
                assert f"Seq Scan on {TABLE}" not in plan, (name, analyzed, mode, plan)
                assert "Index Scan" in plan or "Index Only Scan" in plan, (name, analyzed, mode, plan)

    def _plan(self, caller: psycopg.Connection[Any], sql: str) -> str:
        caller.execute(f"PREPARE hot AS {sql}".encode())
        types = "SELECT unnest(parameter_types)::text FROM pg_prepared_statements WHERE name = 'hot'"
        arguments = ", ".join(self._argument(type) for (type,) in caller.execute(types).fetchall())
        rows = caller.execute(f"EXPLAIN EXECUTE hot ({arguments})".encode()).fetchall()
        caller.execute("DEALLOCATE hot")
        return "\n".join(row[0] for row in rows)

    def _argument(self, type: str) -> str:
        """A literal of the type; an array of 64 for an array."""
        element = type.removesuffix("[]").replace("boolean", "bool").replace("integer", "int")
        value = self.VALUES[element.replace("double precision", "float8")]
        quoted = value.replace("\\", "\\\\")
        return "'{" + ", ".join([f'"{quoted}"'] * 64) + "}'" if type.endswith("[]") else f"'{value}'"


class TestHungServers:
    """C10: every call ends, whatever the server does."""

    @pytest.mark.quiet
    @pytest.mark.crash
    def test_a_hung_server_is_an_error_in_time_and_forgotten_when_it_wakes(
        self, private_postgres: PrivateServer
    ) -> None:
        server = private_postgres()
        migrate(server.url)
        used, new = PsycopgStore(server.url, timeout=0.5), PsycopgStore(server.url, timeout=0.5)
        check_a_hung_server_is_an_error_in_time(server, used, new)
        used.close()
        new.close()

    @pytest.mark.quiet
    @pytest.mark.crash
    async def test_a_hung_server_does_not_hang_the_loop(self, private_postgres: PrivateServer) -> None:
        server = private_postgres()
        await asyncio.to_thread(migrate, server.url)
        used, new = AsyncpgStore(server.url, timeout=0.5), AsyncpgStore(server.url, timeout=0.5)
        await check_a_hung_server_does_not_hang_the_loop(server, used, new)

    @pytest.mark.crash
    async def test_a_restart_goes_unnoticed(self, private_postgres: PrivateServer) -> None:
        """Connections that died while idle are replaced within the call."""
        server = private_postgres()
        await asyncio.to_thread(migrate, server.url)
        store, other = PsycopgStore(server.url, timeout=5.0), AsyncpgStore(server.url, timeout=5.0)
        claim = new_claim()
        acquired = await asyncio.to_thread(store.claim, [claim])
        assert await other.claim([claim]) == acquired
        await asyncio.to_thread(server.restart)
        assert await asyncio.to_thread(store.claim, [claim]) == acquired
        assert await other.claim([claim]) == acquired
        store.close()
        await other.aclose()

    @pytest.mark.crash
    async def test_a_dead_server_is_an_error_at_once(self, private_postgres: PrivateServer) -> None:
        server = private_postgres()
        server.kill()
        store, other = PsycopgStore(server.url), AsyncpgStore(server.url)
        with pytest.raises(StoreUnavailable):
            store.claim([new_claim()])
        with pytest.raises(StoreUnavailable):
            await other.claim([new_claim()])

    @pytest.mark.crash
    async def test_c1_a_read_replica_is_refused(self, private_postgres: PrivateServer) -> None:
        server = private_postgres()
        await asyncio.to_thread(migrate, server.url)
        server.stop()
        (data,) = [path.parent for path in server.directory.rglob("PG_VERSION") if path.parent.name != "base"][:1]
        (data / "standby.signal").touch()
        await asyncio.to_thread(server.restart)
        with pytest.raises(StoreUnavailable, match="read replica"):
            PsycopgStore(server.url).claim([new_claim()])
        with pytest.raises(StoreUnavailable, match="read replica"):
            await AsyncpgStore(server.url).claim([new_claim()])


class TestConnections:
    async def test_a_database_without_tables_is_told_to_migrate(self, postgres_url: str, unique: str) -> None:
        with pytest.raises(ConfigurationError, match="retryproof migrate URL"):
            PsycopgStore(f"{postgres_url}?schema={unique}").get([b""])
        with pytest.raises(ConfigurationError, match="retryproof migrate URL"):
            await AsyncpgStore(f"{postgres_url}?schema={unique}").get([b""])

    async def test_an_older_schema_is_told_to_migrate(self, url: str, caller: psycopg.Connection[Any]) -> None:
        caller.execute("DELETE FROM retryproof_schema")
        caller.commit()
        with pytest.raises(ConfigurationError, match="retryproof migrate URL"):
            PsycopgStore(url).get([b""])
        with pytest.raises(ConfigurationError, match="retryproof migrate URL"):
            await AsyncpgStore(url).get([b""])

    async def test_a_pool_of_the_callers_serves_and_stays_open(self, postgres_url: str, unique: str, url: str) -> None:
        claim = new_claim()
        async with asyncpg.create_pool(
            postgres_url, min_size=0, max_size=2, server_settings={"search_path": unique}
        ) as pool:
            store = AsyncpgStore(pool)
            (reply,) = await store.claim([claim])
            with pytest.raises(ConfigurationError, match="keeper_url"):
                store.keeper()
            await store.aclose()
            assert await pool.fetchval("SELECT 1") == 1
        assert isinstance(reply, Acquired)

    @pytest.mark.usefixtures("url")
    async def test_a_connection_of_the_callers_pool_is_reset_once_for_batches_that_follow_each_other(
        self, postgres_url: str, unique: str
    ) -> None:
        resets = 0

        async def reset(connection: Any) -> None:
            nonlocal resets
            resets += 1

        async with asyncpg.create_pool(
            postgres_url, min_size=1, max_size=4, reset=reset, server_settings={"search_path": unique}
        ) as pool:
            store = AsyncpgStore(pool)
            for connection_waits in (10.0, 0.0):
                with pytest.MonkeyPatch.context() as patched:
                    patched.setattr(on_asyncpg, "WAIT_FOR_NEXT", connection_waits)
                    resets = 0
                    for _ in range(3):
                        await store.claim([new_claim()])
                        await asyncio.sleep(0.01)
                    await store.aclose()
                    assert resets == (1 if connection_waits else 3)
            assert pool.get_idle_size() == pool.get_size()

    @pytest.mark.usefixtures("url")
    async def test_the_last_connection_of_the_callers_pool_goes_back_at_once(
        self, postgres_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(on_asyncpg, "WAIT_FOR_NEXT", 3_600.0)
        settings = {"search_path": unique}
        async with asyncpg.create_pool(postgres_url, min_size=1, max_size=1, server_settings=settings) as pool:
            store = AsyncpgStore(pool)
            assert isinstance((await store.claim([new_claim()]))[0], Acquired)
            async with asyncio.timeout(5.0):
                assert await pool.fetchval("SELECT 1") == 1

    @pytest.mark.usefixtures("url")
    async def test_c3_a_call_is_made_again_where_the_waiting_connection_of_a_callers_pool_was_dead(
        self, postgres_url: str, unique: str, caller: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(on_asyncpg, "WAIT_FOR_NEXT", 3_600.0)
        settings = {"search_path": unique, "application_name": unique}
        async with asyncpg.create_pool(postgres_url, min_size=1, max_size=2, server_settings=settings) as pool:
            store = AsyncpgStore(pool)
            await store.claim([new_claim()])
            ended = caller.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s", (unique,)
            )
            assert ended.fetchall() == [(True,)]
            assert isinstance((await store.claim([new_claim()]))[0], Acquired)
            await store.aclose()

    @pytest.mark.usefixtures("url")
    async def test_a_waiting_connection_that_asyncpg_aborted_goes_back_to_its_pool(
        self, postgres_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody else tells the pool: it would have one connection less for good."""
        monkeypatch.setattr(on_asyncpg, "WAIT_FOR_NEXT", 3_600.0)
        settings = {"search_path": unique}
        async with asyncpg.create_pool(postgres_url, min_size=0, max_size=2, server_settings=settings) as pool:
            store = AsyncpgStore(pool)
            for _ in range(3):
                await store.claim([new_claim()])
                aborted: Any = store._pool._connections._idle[-1].connection
                aborted._con._abort()
                assert isinstance((await store.claim([new_claim()]))[0], Acquired)
            await store.aclose()
            async with asyncio.timeout(5.0), pool.acquire(), pool.acquire():
                pass

    @pytest.mark.usefixtures("url")
    async def test_c3_an_answer_is_given_where_the_callers_pool_does_not_take_its_connection_back(
        self, postgres_url: str, unique: str
    ) -> None:
        async def reset(connection: Any) -> None:
            raise RuntimeError

        async with asyncpg.create_pool(
            postgres_url, min_size=0, max_size=1, reset=reset, server_settings={"search_path": unique}
        ) as pool:
            for _ in range(2):
                assert isinstance((await AsyncpgStore(pool).claim([new_claim()]))[0], Acquired)

    async def test_a_driver_that_lost_its_way_is_a_store_without_an_answer(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where the server says goodbye at the moment when a statement is sent."""
        store = AsyncpgStore(url)

        async def fetch(*arguments: Any, **options: Any) -> None:
            raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")

        with monkeypatch.context() as patched:
            patched.setattr(asyncpg.Connection, "fetch", fetch)
            with pytest.raises(StoreUnavailable, match="gave no answer"):
                await store.claim([new_claim()])
        assert isinstance((await store.claim([new_claim()]))[0], Acquired)
        await store.aclose()

    async def test_c6_a_keeper_renews_from_a_thread_with_either_driver(self, url: str) -> None:
        store = AsyncpgStore(url)
        claim = new_claim()
        renewal = Renew(claim.id, claim.nonce, token((await store.claim([claim]))[0]), 30.0)

        def keep(make: Callable[[], Any]) -> Any:
            keeper = make()
            try:
                return keeper.renew([renewal])
            finally:
                keeper.close()

        for make in (
            store.keeper,
            lambda: PostgresStore(on_asyncpg_store._BlockingPool(parse(url), 2.0), parse(url).table),
        ):
            assert await asyncio.to_thread(keep, make) == [DONE]
        await store.aclose()

    async def test_a_cancelled_call_leaves_the_store_usable(self, url: str, caller: psycopg.Connection[Any]) -> None:
        store = AsyncpgStore(url)
        await store.get([])
        caller.execute(f"LOCK TABLE {TABLE}")
        call = asyncio.create_task(store.claim([new_claim()]))
        await asyncio.to_thread(_until_somebody_waits, caller)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        caller.rollback()
        assert isinstance((await store.claim([new_claim()]))[0], Acquired)
        await store.aclose()

    def test_more_threads_than_connections_take_turns(self, url: str) -> None:
        store = PsycopgStore(f"{url}&pool_size=2", timeout=10.0)
        with ThreadPoolExecutor(8) as pool:
            replies: list[Sequence[ClaimReply | ItemError]] = list(
                pool.map(lambda _: store.claim([new_claim()]), range(40))
            )
        store.close()
        assert all(isinstance(reply, Acquired) for (reply,) in replies)

    @pytest.mark.parametrize(
        "last",
        [
            pytest.param({}, id="alike"),
            pytest.param({"trace": "é"}, id="a trace of another length"),
            pytest.param({"tenant": b""}, id="no tenant"),
            pytest.param({"fingerprint": b"\0\0other"}, id="a fingerprint of another length"),
            pytest.param({"retention": 7.0}, id="another retention"),
            pytest.param({"max_attempts": 9, "on_abandoned": "refuse"}, id="another policy"),
        ],
    )
    def test_each_item_of_a_batch_keeps_its_own_values(self, store: PsycopgStore, last: dict[str, Any]) -> None:
        """Whichever way a batch is given to the server: strings of one length go as one, others as arrays."""
        claims = [new_claim(tenant=bytes([n]) * 16, trace=f"trace-{n}", alone=n % 3) for n in range(5)]
        claims.append(new_claim(**({"tenant": b"\x05" * 16, "trace": "trace-5"} | last)))
        tokens = [token(reply) for reply in store.claim(claims)]
        results = [b"", b"one", None, b"\0" * 40, b"four", b"five"]
        pairs = zip(claims, tokens, results, strict=True)
        assert store.complete([Complete(c.id, c.nonce, t, result) for c, t, result in pairs]) == [DONE] * 6
        kept = [record for record in store.get([claim.id for claim in claims]) if record is not None]
        assert [(r.id, r.fingerprint, r.nonce, r.tenant, r.trace, r.retention, r.token, r.result) for r in kept] == [
            (c.id, c.fingerprint, c.nonce, c.tenant, c.trace, c.retention, t, result)
            for c, t, result in zip(claims, tokens, results, strict=True)
        ]
        assert [record.counts for record in kept] == [claim.alone == 2 for claim in claims]

    def test_odd_texts_do_not_fail_their_neighbours(self, store: PsycopgStore) -> None:
        claim = new_claim(trace="\0\ud800é")
        (reply,) = store.claim([claim])
        step = Checkpoint(claim.id, claim.nonce, token(reply), "\0\ud800é", b"\0")
        assert store.checkpoint([step]) == [DONE]
        assert store.release([Release(claim.id, claim.nonce, token(reply))]) == [DONE]
        (reply,) = store.claim([again(claim)])
        assert isinstance(reply, Acquired)
        assert (reply.trace, dict(reply.checkpoints)) == ("\0\ud800é", {"\0\ud800é": b"\0"})


def _until_somebody_waits(connection: psycopg.Connection[Any]) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
    while not connection.execute(waiting, (TABLE,)).fetchall()[0][0]:
        connection.execute("SELECT pg_sleep(0.001)")


class TestSeveralHosts:
    @pytest.mark.parametrize("first", ["dead", "silent"])
    async def test_the_next_host_is_tried_when_one_is_down(self, url: str, first: str) -> None:
        """A silent host accepts and never answers, as one does that was cut off or stopped."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            if first == "silent":
                listener.listen()
            user, _, rest = url.partition("@")
            both = f"{user}@127.0.0.1:{listener.getsockname()[1]},{rest}"
            blocking, on_loop = PsycopgStore(both, timeout=4.0), AsyncpgStore(both, timeout=4.0)
            claim = new_claim()
            acquired = await asyncio.to_thread(blocking.claim, [claim])
            assert isinstance(acquired[0], Acquired)
            assert await on_loop.claim([claim]) == acquired
            blocking.close()
            await on_loop.aclose()


class TestUrls:
    def test_the_stores_own_options_are_taken_out(self) -> None:
        target = parse(
            "postgresql+asyncpg://u:p@h1:1,h2:2/db?schema=s&statement_cache_size=0&pool_size=7&sslmode=require"
        )
        assert target.dsns == ("postgresql://u:p@h1:1/db?sslmode=require", "postgresql://u:p@h2:2/db?sslmode=require")
        assert (target.table, target.pool_size, target.settings(2.0)) == ('"s".retryproof_operations', 7, {})

    def test_a_socket_directory_is_kept(self) -> None:
        assert parse("postgresql:///db?host=/run/pg").dsns == ("postgresql:///db?host=%2Frun%2Fpg",)

    @pytest.mark.parametrize(
        "url",
        [
            "mysql://h/db",
            "postgresql://h/db?schema=a;b",
            "postgresql://h/db?pool_size=0",
            "postgresql://h/db?pool_size=x",
        ],
        ids=["scheme", "schema", "no-connections", "no-number"],
    )
    def test_what_makes_no_sense_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigurationError):
            parse(url)
