"""SQLite has one writer: who finds it busy gets a turn, or a prompt and definite answer (T2, C10)."""

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from retryproof import Idempotency, Policy, errors
from retryproof.core.commands import DONE, LOST, Acquired, Complete, Running
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.sql.sqlite.file import SqliteFile
from retryproof.sql.sqlite.url import PATIENCE
from retryproof.stores import open_store
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.testing import StoreConformance  # noqa: F401  # before its parts, whose assertions are rewritten
from retryproof.testing.bench import again, complete, new_claim, renew

pytestmark = pytest.mark.timeout(60)

SLACK = 0.6
"""Seconds beyond the patience that busy machines may take; less than the store's time-out."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file with the store's table."""
    found = str(tmp_path / "keys.db")
    SqliteStore(found).get([b"0" * 32])
    return found


@contextlib.contextmanager
def open_transaction(path: str) -> Iterator[sqlite3.Connection]:
    """A caller's transaction, which stays open."""
    connection = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        yield connection


@pytest.mark.quiet
def test_t2_a_new_key_behind_an_open_transaction_gets_a_prompt_and_definite_answer(path: str) -> None:
    store = SqliteStore(path)
    with open_transaction(path):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable, match="kept locked by another writer"):
            store.claim([new_claim()])
        assert PATIENCE <= time.monotonic() - began < PATIENCE + SLACK
    assert isinstance(store.claim([new_claim()])[0], Acquired)


@pytest.mark.quiet
def test_t2_a_twin_and_a_replay_behind_an_open_transaction_wait_for_nobody(path: str) -> None:
    store = SqliteStore(path)
    running, done = new_claim(), new_claim()
    store.claim([running])
    [acquired] = store.claim([done])
    assert isinstance(acquired, Acquired)
    assert store.complete([complete(done, acquired, b"result")]) == [DONE]
    with open_transaction(path):
        began = time.monotonic()
        [twin] = store.claim([again(running)])
        [replay] = store.claim([again(done)])
        assert time.monotonic() - began < PATIENCE
    assert isinstance(twin, Running)
    assert getattr(replay, "result", None) == b"result"


@pytest.mark.quiet
def test_t2_what_travels_with_a_new_key_behind_an_open_transaction_is_answered_too(path: str) -> None:
    """A completion and a renewal are asked for again by who sent them, and pass when the file is free."""
    store = SqliteStore(path)
    claim = new_claim()
    [acquired] = store.claim([claim])
    assert isinstance(acquired, Acquired)
    with open_transaction(path):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            store.renew([renew(claim, acquired)])
        with pytest.raises(errors.StoreUnavailable):
            store.complete([complete(claim, acquired, b"result")])
        assert time.monotonic() - began < 2 * PATIENCE + SLACK
    assert store.renew([renew(claim, acquired)]) == [DONE]
    assert store.complete([complete(claim, acquired, b"result")]) == [DONE]


def test_c10_a_result_behind_an_open_transaction_is_stored_when_it_is_over(path: str) -> None:
    with Idempotency(f"sqlite:///{path}") as engine, contextlib.ExitStack() as stack:
        timer = threading.Timer(1.0, stack.close)

        def work() -> str:
            stack.enter_context(open_transaction_of_a_thread(path))
            timer.start()
            return "done"

        assert engine.run("k", work, scope="s").value == "done"
        timer.join()
        assert engine.run("k", work, scope="s").replayed


@contextlib.contextmanager
def open_transaction_of_a_thread(path: str) -> Iterator[None]:
    """One that another thread may end."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.close()


@pytest.mark.quiet
async def test_h7_over_http_it_is_a_503_that_says_when_to_ask_again(path: str) -> None:
    runs: list[str] = []

    async def charge(request: Request) -> PlainTextResponse:
        runs.append("run")
        return PlainTextResponse("charged", 201)

    app = Starlette(routes=[Route("/charges", charge, methods=["POST"])])
    covered = IdempotencyMiddleware(app, store=f"sqlite:///{path}", scope=single_tenant)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(covered), base_url="http://test") as client:
        with open_transaction(path):
            began = time.monotonic()
            busy = await client.post("/charges", headers={"Idempotency-Key": "k"})
            assert time.monotonic() - began < PATIENCE + SLACK
        assert (busy.status_code, busy.json()["code"], runs) == (503, "store-unavailable", [])
        assert int(busy.headers["Retry-After"]) >= 1
        assert (await client.post("/charges", headers={"Idempotency-Key": "k"})).status_code == 201
    await covered.aclose()


WRITER = """
import sqlite3, sys, time
from retryproof.core.commands import Acquired
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.testing.bench import complete, new_claim

store, own = SqliteStore(sys.argv[1]), sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
for _ in range(40):
    claim = new_claim()
    [acquired] = store.claim([claim])
    assert isinstance(acquired, Acquired)
    own.execute("BEGIN IMMEDIATE")
    own.execute("INSERT INTO work VALUES (1)")
    time.sleep(0.005)  # the work
    own.execute("COMMIT")
    store.complete([complete(claim, acquired, b"done")])
"""


@pytest.mark.slow
def test_short_writers_of_several_processes_make_no_claim_fail(path: str) -> None:
    """Half the time one of them has the file; each waits for the others longer in all than for one that stays."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE work (id integer)")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path]) for _ in range(4)]
    assert [writer.wait(50) for writer in writers] == [0, 0, 0, 0]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM work").fetchone() == (160,)


@pytest.mark.quiet
def test_the_patience_is_an_option_of_the_url(path: str) -> None:
    store = open_store(f"sqlite:///{path}?patience=0.05")
    with open_transaction(path):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            store.claim([new_claim()])
        assert time.monotonic() - began < PATIENCE
    for wrong in ("soon", "nan", "-1"):
        with pytest.raises(errors.ConfigurationError, match="patience"):
            open_store(f"sqlite:///{path}?patience={wrong}")


def test_administration_waits_for_the_whole_time_out(path: str) -> None:
    """Nobody waits for an operator's command, and it is not asked for again."""
    store = SqliteStore(path, timeout=0.6)
    with open_transaction(path):
        began = time.monotonic()
        with pytest.raises(errors.StoreUnavailable):
            store.evict([b"0" * 32])
        assert time.monotonic() - began >= 0.6
    assert Policy().store_timeout > PATIENCE


def test_c2_what_somebody_elses_triggers_write_makes_no_batch_done(tmp_path: Path) -> None:
    """An audit trigger writes a row for each that we write: two changes where one of two commands was current."""
    path = tmp_path / "keys.db"
    store = SqliteStore(str(path))
    claims = [new_claim() for _ in range(3)]
    tokens = [reply.token for reply in store.claim(claims) if isinstance(reply, Acquired)]
    with contextlib.closing(sqlite3.connect(path)) as audit, audit:
        audit.executescript(
            "CREATE TABLE audit (id);"
            "CREATE TRIGGER a AFTER INSERT ON retryproof_operations BEGIN INSERT INTO audit VALUES (new.id); END;"
            "CREATE TRIGGER b AFTER UPDATE ON retryproof_operations BEGIN INSERT INTO audit VALUES (new.id); END;"
        )
    stale = Complete(claims[1].id, b"z" * 16, tokens[1] - 1, b"2")
    assert store.complete([Complete(claims[0].id, claims[0].nonce, tokens[0], b"1"), stale]) == [DONE, LOST]

    def complete_and_claim() -> Sequence[object]:
        store.complete([Complete(claims[2].id, claims[2].nonce, tokens[2], b"3")])
        return store.claim([again(claims[1]), new_claim()])

    replies = store.commit_group(complete_and_claim)
    assert [type(reply) for reply in replies] == [Running, Acquired]
    [alone] = store.claim([new_claim()])  # so that the next one is expected to be new, and is inserted
    [twin] = store.claim([again(claims[1])])
    assert [type(alone), type(twin)] == [Acquired, Running]
    assert store.complete([stale]) == [LOST]
    store.close()


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_c1_a_file_that_is_deleted_under_its_holder_has_one_holder_afterwards(
    path: str, replaced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has the old file open would claim there what the next one claims in a new file, for as long as it lives."""
    store = SqliteStore(path)
    held, once = new_claim(), new_claim()
    [acquired] = store.claim([held])
    assert isinstance(acquired, Acquired)
    for name in (path, f"{path}-wal", f"{path}-shm"):
        Path(name).unlink()
    other = SqliteStore(path)
    if replaced:
        assert isinstance(other.claim([once])[0], Acquired)
    assert store.renew([renew(held, acquired)]) == [LOST]  # C8: its handler is told
    [first] = store.claim([again(once)])
    assert isinstance(first, Running if replaced else Acquired)
    [second] = other.claim([again(once)])
    assert isinstance(second, Running)
    assert "was deleted or replaced" in caplog.text
    store.close()
    assert isinstance(other.claim([new_claim()])[0], Acquired)  # whose log was not taken along
    other.close()


def test_c1_a_file_that_is_replaced_while_it_is_being_opened_is_let_go(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, claim, other = SqliteFile._make_schema, new_claim(), SqliteStore(path)

    def prepare_late(file: SqliteFile, connection: sqlite3.Connection) -> None:
        prepare(file, connection)
        monkeypatch.undo()
        for name in (path, f"{path}-wal", f"{path}-shm"):
            Path(name).unlink()
        assert isinstance(other.claim([claim])[0], Acquired)

    monkeypatch.setattr(SqliteFile, "_make_schema", prepare_late)
    store = SqliteStore(path)
    store.get([claim.id])
    assert isinstance(store.claim([again(claim)])[0], Running)
    store.close()
    other.close()


def test_a_file_that_cannot_be_looked_at_is_an_unavailable_store(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, look = SqliteStore(path), os.stat
    store.get([b"0" * 32])

    def refuse(name: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return look(name, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(errors.StoreUnavailable, match="Permission denied"):
        store.claim([new_claim()])
    monkeypatch.undo()
    assert isinstance(store.claim([new_claim()])[0], Acquired)
    store.close()


def test_a_relative_path_means_the_same_file_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, claim = SqliteStore("keys.db"), new_claim()
    store.claim([claim])
    monkeypatch.chdir("/")
    assert isinstance(store.claim([again(claim)])[0], Running)
    store.close()
