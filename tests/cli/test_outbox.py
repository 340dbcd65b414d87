"""`retryproof relay` and `retryproof outbox`, over both databases."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from retryproof.publishers import Failed
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Relay
from retryproof.transaction.operator import Operator
from tests.cli.conftest import Run
from tests.transaction.outboxes import Database, Noting
from tests.transaction.receivers import http_receiver


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Database:
    if request.param == "sqlite":
        return Database(f"sqlite:///{tmp_path}/outbox.db")
    url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
    migrate(url)
    return Database(url)


def test_t6_relay_sends_what_is_due_and_says_how_much(run: Run, database: Database) -> None:
    database.send("a", "b")
    with http_receiver() as receiver:
        ran = run("relay", database.url, "--to", receiver.url, "--once", "--json")
        assert ran.code == 0
        assert (ran.document["delivered"], ran.document["dead"]) == (2, 0)
        assert sorted(request.body for request in receiver.requests) == [b"a:0", b"b:1"]


def test_o1_dead_letters_are_listed_requeued_and_dropped(run: Run, database: Database) -> None:
    first, second, third = database.send("a", "b", "c")
    with http_receiver() as receiver:
        receiver.answer = lambda request: (410, {})
        run("relay", database.url, "--to", receiver.url, "--once")
    listed = run("outbox", "list", database.url, "--json").document["dead"]
    assert {letter["id"] for letter in listed} == {str(message.id) for message in (first, second, third)}
    assert "410" in listed[0]["reason"]
    assert "410" in run("outbox", "list", database.url).out
    assert run("outbox", "requeue", database.url, str(first.id)).code == 0
    assert run("outbox", "drop", database.url, str(uuid4())).code == 1
    assert run("outbox", "drop", database.url).code == 2
    assert run("outbox", "drop", database.url, str(second.id)).code == 0
    stats = run("outbox", "stats", database.url, "--json").document
    assert (stats["pending"], stats["dead"]) == (1, 1)
    assert run("outbox", "purge", database.url, "--older-than", "3600", "--json").document["purged"] == 0
    assert run("outbox", "requeue", database.url, "--all", "--json").document["requeued"] == 1
    assert database.pending == 2


def test_o1_all_dead_letters_are_requeued_once_though_a_relay_gives_them_up_again(
    run: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.send("a", "b", "c")
    publisher = Noting(lambda message: Failed("never", permanent=True))
    requeue = Operator.requeue

    async def requeued_and_given_up(operator: Operator, ids: Sequence[UUID]) -> int:
        count = await requeue(operator, ids)
        await Relay(database.url, publisher).run_until_idle()
        return count

    with http_receiver() as receiver:
        receiver.answer = lambda request: (410, {})
        run("relay", database.url, "--to", receiver.url, "--once")
    monkeypatch.setattr(Operator, "requeue", requeued_and_given_up)
    assert run("outbox", "requeue", database.url, "--all", "--json").document["requeued"] == 3
    assert len(publisher.tried) == 3


def test_t6_relay_drains_on_sigterm(database: Database) -> None:
    with http_receiver() as receiver:
        database.send(*"abc")
        command = [sys.executable, "-m", "retryproof.cli", "relay", database.url, "--to", receiver.url, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            while database.rows("SELECT count(*) FROM retryproof_outbox")[0][0]:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0
    assert b'"delivered": 3' in out
    assert database.rows("SELECT count(*) FROM retryproof_outbox_relays") == [(0,)]


def test_what_makes_no_sense_is_refused(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/outbox.db"
    assert run("relay", url, "--to", "ftp://host/").code == 2
    assert run("relay", "redis://127.0.0.1/0", "--to", "json:loads", "--once").code == 2
    assert run("outbox", "stats", "memory://").code == 2


def test_a_function_in_the_present_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "sending.py").write_text("def send(message): ...\n")
    program = (
        "import sys; sys.path = [part for part in sys.path if part]; from retryproof.cli.__main__ import main; main()"
    )
    relay = ["relay", f"sqlite:///{tmp_path}/outbox.db", "--to", "sending:send", "--once"]
    done = subprocess.run(
        [sys.executable, "-c", program, *relay], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
