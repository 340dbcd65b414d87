"""`retryproof relay` and `retryproof outbox`, over both databases."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from retryproof.outbox.operator import Operator
from retryproof.publishers import Failed
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Relay
from tests.cli.conftest import Run
from tests.transaction.outboxes import Database, Noting
from tests.transaction.receivers import Receiver, http_receiver

SECRETS = ("user:", "pass1", "path2", "token3", "sig4")


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


def test_t6_topics_go_where_they_are_told_to(run: Run, database: Database) -> None:
    database.send("a", topic="orders")
    database.send("b", topic="other")
    with http_receiver() as orders, http_receiver() as rest:
        to = ["--to", f"orders={orders.url}?a=b", "--to", f"{rest.url}?topic=orders"]
        ran = run("relay", database.url, *to, "--once", "--json")
    assert ran.code == 0
    assert ([r.body for r in orders.requests], [r.body for r in rest.requests]) == ([b"a:0"], [b"b:0"])
    assert [r.path for r in orders.requests + rest.requests] == ["/hooks?a=b", "/hooks?topic=orders"]
    assert list(ran.document["to"]) == ["orders", "*"]


async def _working(database: Database, receiver: Receiver) -> None:
    relay = Relay(database.url, receiver.url)
    await relay._joined()
    await relay._opened().aclose()


def test_t6_a_relay_with_other_destinations_sends_nothing_and_says_so(run: Run, database: Database) -> None:
    database.send("a")
    with http_receiver() as here, http_receiver() as there:
        asyncio.run(_working(database, here))
        ran = run("relay", database.url, "--to", there.url, "--once")
        assert (ran.code, there.requests) == (1, [])
        assert "other destinations" in ran.err
        assert run("relay", database.url, "--to", here.url, "--once").code == 0


def test_o1_a_destination_is_shown_by_scheme_and_host_alone(
    run: Run, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.send("a")
    with http_receiver() as receiver:
        address = receiver.url.removeprefix("http://").removesuffix("/hooks")
        to = f"http://user:pass1@{address}/hook/path2?access_token=token3&sig=sig4"
        given = run("relay", database.url, "--to", to, "--once", "--json")
        monkeypatch.setenv("RETRYPROOF_RELAY_TO", f"{to} other=http://user:pass1@{address}/path2")
        named = run("relay", database.url, "--once", "--json")
    assert given.document["to"] == {"*": f"http://{address}"}
    assert named.document["to"] == {"*": f"http://{address}", "other": f"http://{address}"}
    assert not any(secret in given.out + given.err + named.out + named.err for secret in SECRETS)


@pytest.mark.parametrize(
    "to",
    [
        "smtp://user:pass1/path2@h",
        "smtp://user:pass1?path2@h",
        "smtp://user:pass1#path2@h",
        "smtp://user:pass1@path2@h:x",
        "smtp://user:pass1[path2@h",
        "redis://:pass1/path2@h/0/s",
        "https://user:pass1/path2@h/x",
        "https://[pass1",
        "ftp://user:pass1@h/path2",
        "user:pass1@path2",
        "pass1 path2",
        "orders=smtp://user:pass1/path2@h",
    ],
)
@pytest.mark.parametrize("form", ["--json", "--once"])
def test_o1_an_address_that_cannot_be_read_is_an_error_in_words_without_the_password(
    run: Run, tmp_path: Path, to: str, form: str
) -> None:
    ran = run("relay", f"sqlite:///{tmp_path}/outbox.db", "--to", to, form)
    assert ran.code == 2
    assert "cannot be read" in ran.out + ran.err or "no publisher" in ran.out + ran.err
    assert not any(secret in ran.out + ran.err for secret in SECRETS)


def test_t6_the_age_at_which_messages_are_given_up_is_an_option(run: Run, database: Database) -> None:
    database.send("old", "new")
    database.execute("UPDATE retryproof_outbox SET failed_at = created_at - 7200000000 WHERE key = 'old'")
    with http_receiver() as receiver:
        ran = run("relay", database.url, "--to", receiver.url, "--give-up-after", "3600", "--once", "--json")
    assert (ran.document["delivered"], ran.document["dead"]) == (1, 1)
    assert "given up 2.0 h after its first failure" in run("outbox", "list", database.url).out


def test_what_makes_no_sense_is_refused(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/outbox.db"
    assert run("relay", url, "--to", "ftp://host/").code == 2
    assert run("relay", "redis://127.0.0.1/0", "--to", "json:loads", "--once").code == 2
    assert run("outbox", "stats", "memory://").code == 2
    assert run("relay", url, "--once").code == 2
    assert run("relay", url, "--to", "https://a/", "--to", "https://b/", "--once").code == 2


def test_a_relay_does_not_wait_on_a_file_that_nobody_writes_to(run: Run, tmp_path: Path) -> None:
    mistyped = tmp_path / "outobx.db"
    ran = run("relay", f"sqlite:///{mistyped}", "--to", "json:loads")
    assert ran.code == 2
    assert str(mistyped) in ran.err
    assert not mistyped.exists()


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
