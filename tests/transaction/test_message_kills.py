"""A message, its writer or relay killed at each point: never without its transaction, never lost (T5, T7)."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retryproof.stores.sql.migrate import migrate
from tests.transaction.outboxes import Database, sqlite_url
from tests.transaction.receivers import Receiver, http_receiver

pytestmark = [pytest.mark.crash, pytest.mark.timeout(60)]
ROOT = Path(__file__).parents[2]
SENT_AGAIN = {"before it is taken": 1, "before it is sent": 1, "after it is sent": 2, "after it is noted": 1}
"""Where a relay dies, and how often the message arrives in the end."""


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Database:
    if request.param == "sqlite":
        url = sqlite_url(tmp_path)
    else:
        url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
        migrate(url)
    found = Database(url)
    found.send("k")  # makes the tables, on SQLite
    with found.transaction() as connection:
        connection.execute("DELETE FROM retryproof_outbox")
        connection.execute("CREATE TABLE effects (id integer)")
    return found


def run(kind: str, database: Database, receiver: Receiver, point: str = "") -> int:
    """The exit status of a process."""
    command = [sys.executable, "-m", "tests.transaction.outgoing", kind, database.url, receiver.url or "-", point]
    return subprocess.run(command, cwd=ROOT, timeout=30, check=False).returncode


def relay_until_empty(database: Database, receiver: Receiver) -> None:
    """What a dead relay had taken is due when its lease is over."""
    deadline = time.monotonic() + 20
    while database.pending:
        assert time.monotonic() < deadline
        assert run("relay", database, receiver) == 0


@pytest.mark.parametrize("point", ["before the commit", "after the commit"])
def test_t5_a_message_is_there_with_its_transaction_or_not_at_all(database: Database, point: str) -> None:
    with http_receiver() as receiver:
        assert run("add", database, receiver, point) == -signal.SIGKILL
        committed = database.rows("SELECT count(*) FROM effects")[0][0]
        assert committed == (point == "after the commit")
        assert database.pending == committed
        relay_until_empty(database, receiver)
    assert [request.body for request in receiver.requests] == [b"done"] * committed


@pytest.mark.parametrize("point", SENT_AGAIN)
def test_t7_a_killed_relays_message_is_sent_by_the_next_under_the_same_id(database: Database, point: str) -> None:
    (message,) = database.send("k")
    with http_receiver() as receiver:
        assert run("relay", database, receiver, point) == -signal.SIGKILL
        assert database.pending == (point != "after it is noted")
        relay_until_empty(database, receiver)
    assert [request.headers["webhook-id"] for request in receiver.requests] == [str(message.id)] * SENT_AGAIN[point]
