"""`retryproof inbox`, over both databases."""

import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pytest

from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Inbox
from tests.cli.conftest import Run


class Database:
    """One with an inbox."""

    def __init__(self, url: str) -> None:
        self.url = url

    def take(self, consumer: str, *messages: tuple[str, bytes]) -> None:
        """Take messages, in one transaction."""
        if self.url.startswith("sqlite"):
            connection: Any = sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=20.0)
            connection.execute("BEGIN IMMEDIATE")
        else:
            url, _, schema = self.url.partition("?schema=")
            connection = psycopg.connect(url, options=f"-c search_path={schema}")
            connection.execute("SELECT 1")
        Inbox(consumer).receive_many(connection, "orders", messages)
        connection.commit()
        connection.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Database:
    if request.param == "sqlite":
        return Database(f"sqlite:///{tmp_path}/inbox.db")
    url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
    migrate(url)
    return Database(url)


def test_o1_an_inbox_says_how_it_stands_also_before_its_first_message(run: Run, database: Database) -> None:
    assert run("inbox", "stats", database.url, "--json").document["messages"] == 0
    assert run("inbox", "list", database.url).out == "No dead letters.\n"
    database.take("billing", ("1", b"a"), ("2", b"b"), ("2", b"other"))
    stats = run("inbox", "stats", database.url, "--json").document
    assert (stats["messages"], stats["dead"]) == (2, 1)
    assert 0.0 <= stats["oldest"] < 60.0
    assert "dead letters" in run("inbox", "stats", database.url).out


def test_o1_dead_letters_of_an_inbox_are_listed_and_dropped(run: Run, database: Database) -> None:
    database.take("billing", ("1", b"a"), ("1", b"b"), ("1", b"c"))
    database.take("shipping", ("1", b"a"), ("1", b"secret"))
    listed = run("inbox", "list", database.url, "--json").document["dead"]
    assert [letter["consumer"] for letter in listed].count("billing") == 2
    assert len({letter["id"] for letter in listed}) == 3
    (one,) = run("inbox", "list", database.url, "--consumer", "shipping", "--json").document["dead"]
    assert (one["source"], one["message_id"], one["bytes"]) == ("orders", "1", 6)
    out = run("inbox", "list", database.url, "--limit", "2").out
    assert "another payload" in out
    assert "secret" not in out
    assert "and more" in out
    assert run("inbox", "drop", database.url, one["id"], "--json").document["dropped"] == 1
    assert run("inbox", "drop", database.url, one["id"]).code == 1
    assert run("inbox", "drop", database.url, "nonsense").code == 2
    assert run("inbox", "drop", database.url).code == 2
    assert run("inbox", "stats", database.url, "--json").document["dead"] == 2


def test_o1_old_messages_and_old_dead_letters_are_purged_apart(run: Run, database: Database) -> None:
    database.take("billing", ("1", b"a"), ("2", b"b"), ("2", b"other"))
    assert run("inbox", "purge", database.url, "--older-than", "3600", "--json").document["purged"] == 0
    assert run("inbox", "purge", database.url, "--older-than", "0", "--dead", "--json").document["purged"] == 1
    assert run("inbox", "purge", database.url, "--older-than", "0", "--json").document["purged"] == 2
    stats = run("inbox", "stats", database.url, "--json").document
    assert (stats["messages"], stats["dead"], stats["oldest"]) == (0, 0, 0.0)


def test_a_store_without_an_inbox_is_refused(run: Run) -> None:
    assert run("inbox", "stats", "memory://").code == 2
