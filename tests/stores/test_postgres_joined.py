"""The plans of a caller's own transaction on PostgreSQL, at each isolation level, against whoever writes the record
meanwhile (T1): what is not the current attempt's, unsettled, and in the transaction that was joined changes nothing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, errors

from retryproof.core.commands import DONE, LOST, Acquired, Checkpoint, Claim, Complete, Release, Renew, Running
from retryproof.core.hold import Hold
from retryproof.core.record import State
from retryproof.sql.plan import Joining
from retryproof.sql.postgres import joined as joining
from retryproof.sql.postgres import statements as postgres_statements
from retryproof.stores.sql.migrate import migrate
from retryproof.stores.sql.psycopg import PsycopgStore
from tests.stores.support import again, new_claim, pump, until_blocked

TABLE = postgres_statements.TABLE
ONE_SNAPSHOT = ["REPEATABLE READ", "SERIALIZABLE"]
LEVELS = ["READ COMMITTED", *ONE_SNAPSHOT]


@pytest.fixture
def store(postgres_url: str, unique: str) -> Iterator[PsycopgStore]:
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    store = PsycopgStore(url)
    yield store
    store.close()


@pytest.fixture
def connect(postgres_url: str, unique: str) -> Callable[..., psycopg.Connection[Any]]:
    def connect(level: str = "READ COMMITTED") -> psycopg.Connection[Any]:
        options = f"-c search_path={unique}"
        connection = psycopg.connect(postgres_url, options=options, client_encoding="utf8")
        connection.isolation_level = IsolationLevel[level.replace(" ", "_")]
        return connection

    return connect


Connect = Callable[..., psycopg.Connection[Any]]


def held(store: PsycopgStore, claim: Claim) -> Hold:
    [acquired] = store.claim([claim])
    assert isinstance(acquired, Acquired)
    return Hold(claim, acquired, 0.0)


def complete(connection: psycopg.Connection[Any], command: Complete) -> Any:
    return pump(connection, joining.complete_joined_plan(command))


def state_of(store: PsycopgStore, hold: Hold) -> State:
    [record] = store.get([hold.id])
    assert record is not None
    return record.state


@pytest.mark.parametrize("level", LEVELS)
def test_t1_a_completion_in_the_transaction_that_was_joined_is_done_with_its_commit(
    store: PsycopgStore, connect: Connect, level: str
) -> None:
    hold = held(store, new_claim())
    with connect(level) as caller:
        assert pump(caller, joining.join_plan(hold)) == Joining(held=level in ONE_SNAPSHOT)
        assert complete(caller, hold.complete(b"result")) == DONE
        assert state_of(store, hold) is State.IN_PROGRESS
        caller.commit()
    assert state_of(store, hold) is State.COMPLETED


@pytest.mark.parametrize("wrong", ["id", "nonce", "token", "mark", "not joined", "savepoint", "next transaction"])
@pytest.mark.parametrize("kind", ["complete", "checkpoint"])
def test_t1_what_is_not_the_attempts_that_joined_changes_nothing(
    store: PsycopgStore, connect: Connect, kind: str, wrong: str
) -> None:
    hold, other = held(store, new_claim()), held(store, new_claim())
    given: dict[str, Any] = {"id": hold.id, "nonce": hold.nonce, "token": hold.token}
    given |= {wrong: getattr(other, wrong)} if wrong in ("id", "nonce", "token") else {}
    with connect() as caller:
        if wrong == "savepoint":
            caller.execute("SAVEPOINT before")
        if wrong != "not joined":
            pump(caller, joining.join_plan(hold))
        if wrong == "token":  # it is the record that is compared, not only the mark
            caller.execute("SELECT set_config('retryproof.joined', %s, true)", (str(other.token),))
        elif wrong == "mark":
            pump(caller, joining.join_plan(other))
        elif wrong == "savepoint":
            caller.execute("ROLLBACK TO before")
        elif wrong == "next transaction":
            caller.commit()
        expected = LOST if wrong in ("id", "nonce", "token") else None  # another transaction is told apart
        if kind == "complete":
            assert complete(caller, Complete(**given, result=b"result")) == expected
        else:
            kept = Checkpoint(**given, name="step", value=b"value")
            assert pump(caller, joining.checkpoint_joined_plan(kept)) == expected
        caller.commit()
    assert state_of(store, hold) is state_of(store, other) is State.IN_PROGRESS


@pytest.mark.parametrize("kind", ["complete", "checkpoint"])
@pytest.mark.parametrize("settled", ["completed", "released"])
def test_t1_what_was_settled_outside_of_the_transaction_is_not_settled_in_it(
    store: PsycopgStore, connect: Connect, settled: str, kind: str
) -> None:
    """Nonce and token are still the attempt's."""
    hold = held(store, new_claim())
    with connect() as caller:
        pump(caller, joining.join_plan(hold))
        if settled == "completed":
            assert store.complete([hold.complete(b"first")]) == [DONE]
        else:
            assert store.release([hold.release()]) == [DONE]
        if kind == "complete":
            assert complete(caller, hold.complete(b"second")) == LOST
        else:
            assert pump(caller, joining.checkpoint_joined_plan(hold.checkpoint("step", b"value"))) == LOST
        caller.commit()
    [record] = store.get([hold.id])
    assert record is not None
    assert (record.state, record.result) == (
        (State.COMPLETED, b"first") if settled == "completed" else (State.RELEASED, None)
    )
    assert not record.checkpoints


RENEWED = "UPDATE retryproof_operations SET lease_until = lease_until + 1000000"
TAKEN = "UPDATE retryproof_operations SET nonce = decode(repeat('00', 16), 'hex'), token = token + 1"
RELEASED = "UPDATE retryproof_operations SET state = 2"
GONE = "DELETE FROM retryproof_operations"


@pytest.mark.parametrize(
    ("meanwhile", "expected"), [(RENEWED, DONE), (TAKEN, LOST), (RELEASED, LOST), (GONE, LOST)], ids=str
)
@pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
def test_t1_a_completion_waits_for_who_has_the_row_and_looks_at_what_it_left(
    store: PsycopgStore, connect: Connect, meanwhile: str, expected: object, committed: bool
) -> None:
    hold = held(store, new_claim())
    with connect() as caller, connect() as rival, ThreadPoolExecutor(1) as pool:
        pump(caller, joining.join_plan(hold))
        rival.execute(meanwhile.encode())
        waiting = pool.submit(complete, caller, hold.complete(b"result"))
        until_blocked(rival, caller.info.backend_pid)
        rival.commit() if committed else rival.rollback()
        assert waiting.result(10.0) == (expected if committed else DONE)
        caller.commit()


@pytest.mark.parametrize("level", ONE_SNAPSHOT)
def test_t1_a_record_that_one_snapshot_holds_is_neither_renewed_nor_taken_over_before_the_end(
    store: PsycopgStore, connect: Connect, level: str
) -> None:
    claim = new_claim(lease=0.05)
    hold = held(store, claim)
    with connect(level) as caller:
        assert pump(caller, joining.join_plan(hold)) == Joining(held=True)
        caller.execute("SELECT pg_sleep(0.1)")
        [refused] = store.renew([Renew(hold.id, hold.nonce, hold.token, 10.0)])
        assert isinstance(refused, Exception)
        assert isinstance(store.claim([again(claim)])[0], Running)
        [refused] = store.release([Release(hold.id, hold.nonce, hold.token)])
        assert isinstance(refused, Exception)
        assert store.reap().settled == 0
        assert complete(caller, hold.complete(b"result")) == DONE
        caller.commit()
    assert state_of(store, hold) is State.COMPLETED


@pytest.mark.parametrize("level", ONE_SNAPSHOT)
def test_t1_a_snapshot_from_before_the_claim_joins_nothing(store: PsycopgStore, connect: Connect, level: str) -> None:
    with connect(level) as caller:
        caller.execute("SELECT 1")
        hold = held(store, new_claim())
        assert pump(caller, joining.join_plan(hold)) is None


@pytest.mark.parametrize("level", ONE_SNAPSHOT)
def test_t1_a_snapshot_from_before_a_renewal_fails_when_it_joins_and_not_when_it_commits(
    store: PsycopgStore, connect: Connect, level: str
) -> None:
    hold = held(store, new_claim())
    with connect(level) as caller:
        caller.execute(f"SELECT FROM {TABLE}")
        assert store.renew([hold.renew()]) == [DONE]
        with pytest.raises(errors.SerializationFailure):
            pump(caller, joining.join_plan(hold))


def test_t1_a_trigger_that_drops_the_update_makes_it_lost(store: PsycopgStore, connect: Connect) -> None:
    """Nothing was stored, so nothing may be said to be."""
    hold = held(store, new_claim())
    with connect() as owner:
        owner.execute("CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        owner.execute(f"CREATE TRIGGER dropping BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION drop_it()")
    with connect() as caller:
        pump(caller, joining.join_plan(hold))
        assert complete(caller, hold.complete(b"result")) == LOST


def test_t1_a_trigger_that_writes_the_row_first_does_not_hide_it(store: PsycopgStore, connect: Connect) -> None:
    """Such as one for the caller's own table, which notes in the record's row what it did."""
    hold = held(store, new_claim())
    with connect() as owner:
        owner.execute("CREATE TABLE work (id integer)")
        owner.execute(
            f"CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
            f"'BEGIN UPDATE {TABLE} SET trace = ''noted''; RETURN NEW; END'"
        )
        owner.execute("CREATE TRIGGER noting AFTER INSERT ON work FOR EACH ROW EXECUTE FUNCTION note()")
    with connect() as caller:
        pump(caller, joining.join_plan(hold))
        caller.execute("INSERT INTO work VALUES (1)")
        assert complete(caller, hold.complete(b"result")) == DONE
        caller.commit()
    assert state_of(store, hold) is State.COMPLETED


@pytest.mark.parametrize("listed", [True, False])
def test_c12_retention_starts_with_the_completion_and_not_with_its_transaction(
    store: PsycopgStore, connect: Connect, listed: bool
) -> None:
    hold = held(store, new_claim(retention=100.0))
    with connect() as caller:
        pump(caller, joining.join_plan(hold))
        caller.execute("SELECT pg_sleep(0.05)")
        before = caller.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchall()[0][0]
        assert complete(caller, Complete(hold.id, hold.nonce, hold.token, None, listed)) == DONE
        caller.commit()
    [record] = store.get([hold.id])
    assert record is not None
    assert record.state is State.TOMBSTONE
    assert 0 <= record.expires_at - before - 100_000_000 < 5_000_000
    assert 0 <= record.lease_until - before < 5_000_000


def test_t1_an_attempt_that_is_not_current_joins_nothing(store: PsycopgStore, connect: Connect) -> None:
    hold, other = held(store, new_claim()), held(store, new_claim())
    stale, foreign = Hold(*_parts(hold)), Hold(*_parts(hold))
    stale.token -= 1
    foreign.nonce = other.nonce
    with connect() as caller:
        joined = [pump(caller, joining.join_plan(one)) for one in (stale, foreign, hold)]
        assert joined == [None, None, Joining(held=False)]
        assert store.release([hold.release()]) == [DONE]
        assert pump(caller, joining.join_plan(hold)) is None


def _parts(hold: Hold) -> tuple[Claim, Acquired, float]:
    claim = new_claim(id=hold.id, nonce=hold.nonce)
    return claim, Acquired(hold.token, hold.attempt, hold.first_seen, hold.birth), 0.0
