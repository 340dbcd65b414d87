"""Batches of several kinds on SQLite behind a writer that stays: what only reads is answered (T2), leases last (C6)."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retryproof import Idempotency, Policy, errors
from retryproof.core.commands import Acquired, Finished, Running, Unreachable
from retryproof.sql.sqlite.url import PATIENCE
from retryproof.stores.lanes import ThreadCoalescer
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.testing import StoreConformance  # noqa: F401  # before its parts, whose assertions are rewritten
from retryproof.testing.bench import again, complete, new_claim, renew

pytestmark = pytest.mark.timeout(60)

SLACK = 0.6
"""Seconds that busy machines may take."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file with the store's table."""
    found = str(tmp_path / "keys.db")
    with contextlib.closing(SqliteStore(found)) as store:
        store.get([b"0" * 32])
    return found


@contextlib.contextmanager
def open_transaction(path: str) -> Iterator[sqlite3.Connection]:
    """A caller's transaction, which stays open; any thread may end it."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        yield connection


@pytest.mark.quiet
def test_t2_replays_and_twins_that_travel_with_what_writes_are_answered_behind_an_open_transaction(path: str) -> None:
    patience = 2 * PATIENCE
    store = SqliteStore(path, patience=patience)
    running, done = new_claim(), new_claim()
    [held], [acquired] = store.claim([running]), store.claim([done])
    assert isinstance(held, Acquired)
    assert isinstance(acquired, Acquired)
    store.complete([complete(done, acquired, b"result")])
    threads = ThreadCoalescer(store, lambda claim, reply: None)
    mixed = [complete(running, held, b"late"), new_claim(), again(done), again(running), renew(running, held)]
    with open_transaction(path):
        began = time.monotonic()
        replies = threads.perform_many(mixed, 10.0)
        assert time.monotonic() - began < 2 * patience  # not once for each kind
    assert [type(reply) for reply in replies] == [Unreachable, Unreachable, Finished, Running, Unreachable]
    replies = threads.perform_many(mixed[:2], 10.0)
    assert [type(reply).__name__ for reply in replies] == ["Done", "Acquired"]


def test_c6_a_lease_outlives_a_writer_that_stays_beyond_the_patience_at_its_renewals(path: str) -> None:
    """Half a lease, from before a renewal is due; the keeper asks again, and beats the rival to it."""
    policy = Policy(lease=1.2)
    rival_replies: list[str] = []

    def work() -> str:
        with open_transaction(path):
            threading.Event().wait(0.5)  # a renewal is due after 0.4 s, and fails
            threading.Event().wait(0.2)
        threading.Event().wait(0.9)  # past the lease that was not renewed
        try:
            rival.run("k", lambda: "taken over", scope="s")
        except errors.InProgress:
            rival_replies.append("in progress")
        return "done"

    with (
        Idempotency(f"sqlite:///{path}", policy=policy) as engine,
        Idempotency(f"sqlite:///{path}", policy=policy) as rival,
    ):
        outcome = engine.run("k", work, scope="s")
    assert (outcome.value, outcome.attempt, rival_replies) == ("done", 1, ["in progress"])


def test_t2_who_waits_for_writers_that_come_and_go_outlasts_the_patience(path: str) -> None:
    """Each of them commits before the patience is over, and all together take longer."""
    with writers_that_follow_each_other(path, 8):
        assert isinstance(SqliteStore(path, patience=0.2).claim([new_claim()])[0], Acquired)


@pytest.mark.quiet
def test_t2_who_waits_for_writers_without_end_is_told_so_at_the_time_out(path: str) -> None:
    store = SqliteStore(path, patience=0.2, timeout=0.4)
    store.get([b"0" * 32])
    with writers_that_follow_each_other(path, 30):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            store.evict([b"0" * 32])
        assert 0.4 <= time.monotonic() - began < 0.4 + SLACK


@contextlib.contextmanager
def writers_that_follow_each_other(path: str, number: int) -> Iterator[None]:
    """Each has the file for 0.1 s, and the next one has it a moment later, before who waits looks again."""
    began, stop = threading.Event(), threading.Event()

    def come_and_go() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as own:
            own.execute("CREATE TABLE work (id integer)")
            for _ in range(number):
                own.execute("BEGIN IMMEDIATE")
                began.set()
                own.execute("INSERT INTO work VALUES (1)")
                stop.wait(0.1)
                own.execute("COMMIT")

    writer = threading.Thread(target=come_and_go)
    writer.start()
    assert began.wait(10.0)
    yield
    stop.set()
    writer.join(10.0)


def test_an_in_memory_database_groups_and_rolls_back(path: str) -> None:
    store = SqliteStore(":memory:")
    claim = new_claim()
    [acquired] = store.claim([claim])
    assert isinstance(acquired, Acquired)

    def fail() -> None:
        store.complete([complete(claim, acquired, b"undone")])
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        store.commit_group(fail)
    assert isinstance(store.claim([again(claim)])[0], Running)

    def replay() -> object:
        store.complete([complete(claim, acquired, b"done")])
        return store.claim([again(claim)])[0]

    assert isinstance(store.commit_group(replay), Finished)
    assert isinstance(store.claim([again(claim)])[0], Finished)


@pytest.mark.quiet
def test_t2_a_file_that_cannot_be_written_still_replays(path: str) -> None:
    """As on a disk that was mounted again for reading."""
    store = SqliteStore(path)
    done = new_claim()
    [acquired] = store.claim([done])
    assert isinstance(acquired, Acquired)
    store.complete([complete(done, acquired, b"result")])
    store._file._connected().execute("PRAGMA query_only = 1")
    [alone] = store.claim([again(done)])
    assert isinstance(alone, Finished)
    threads = ThreadCoalescer(store, lambda claim, reply: None)
    began = time.monotonic()
    replies = threads.perform_many([new_claim(), again(done)], 10.0)
    assert time.monotonic() - began < PATIENCE + SLACK
    assert [type(reply) for reply in replies] == [Unreachable, Finished]


def test_a_reader_waits_for_who_locks_the_whole_file(path: str) -> None:
    """As one who closes it does, or who recovers it after a crash."""
    store = SqliteStore(path)
    store.get([b"0" * 32])
    store.close()
    owner = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    owner.execute("PRAGMA locking_mode = EXCLUSIVE")
    owner.execute("SELECT count(*) FROM retryproof_operations")
    store._file._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.0)
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.extend(store.get([b"0" * 32])))
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    owner.close()
    reader.join(10.0)
    assert found == [None]
