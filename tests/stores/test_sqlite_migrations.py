"""The tables of inbox and outbox in a SQLite file: made at their first use, changed by `retryproof migrate` alone."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.sql.sqlite import inbox
from retryproof.sql.sqlite import migrate as sqlite_migrate
from retryproof.sql.sqlite import outbox as outbox_sqlite
from retryproof.sql.sqlite.outbox_schema import SQLITE_OUTBOX
from retryproof.sql.sqlite.schema import Part
from retryproof.transaction import Inbox, Outbox, Relay
from tests.transaction.outboxes import QUICK, Noting


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    finally:
        connection.close()


def send(path: Path) -> None:
    with transaction(path) as connection:
        Outbox().add(connection, topic="t", payload=b"")


def receive(path: Path) -> None:
    with transaction(path) as connection:
        Inbox("c").receive(connection, source="s", message_id="1", payload=b"")


def names(path: Path, kind: str = "table") -> set[str]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name FROM sqlite_schema WHERE type = ? AND sql IS NOT NULL", (kind,))
        found = {name for (name,) in rows}
    connection.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.db"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on the release is a later one, whose tables have a column more."""

    def longer(part: Part) -> Part:
        return replace(part, steps=(*part.steps, (f"ALTER TABLE {part.table} ADD COLUMN extra TEXT",)))

    def change() -> None:
        outbox = longer(SQLITE_OUTBOX)
        monkeypatch.setattr(outbox_sqlite, "SQLITE_OUTBOX", outbox)
        monkeypatch.setattr(sqlite_migrate, "SQLITE_OUTBOX", outbox)
        monkeypatch.setattr(inbox, "SQLITE_INBOX", longer(inbox.SQLITE_INBOX))
        monkeypatch.setattr(sqlite_migrate, "SQLITE_INBOX", inbox.SQLITE_INBOX)

    return change


def test_o4_tables_are_made_at_the_first_use_in_the_user_s_own_transaction(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    Outbox().add(connection, topic="t", payload=b"")
    connection.execute("ROLLBACK")
    connection.close()
    assert names(path) == set()
    receive(path)
    assert names(path) == {"retryproof_inbox", "retryproof_inbox_dead", "retryproof_schema"}
    send(path)
    assert "retryproof_outbox_settings" in names(path)
    assert sqlite_migrate.pending(f"sqlite:///{path}") == sqlite_migrate.migrate(f"sqlite:///{path}") == []


def test_o4_migrating_makes_no_file_and_no_tables(path: Path) -> None:
    url = f"sqlite:///{path}"
    assert sqlite_migrate.pending(url) == sqlite_migrate.migrate(url) == []
    assert not path.exists()
    receive(path)
    before = names(path)
    assert sqlite_migrate.migrate(url) == []
    assert names(path) == before


def test_o4_tables_of_an_earlier_release_say_migrate_and_are_changed_by_that_alone(
    path: Path, later: Callable[[], None]
) -> None:
    url = f"sqlite:///{path}"
    send(path)
    receive(path)
    later()
    for use in (send, receive):
        with pytest.raises(ConfigurationError, match="retryproof migrate sqlite"):
            use(path)
    missing = [f"{part.name}_{part.version}" for part in sqlite_migrate.parts()]
    assert sqlite_migrate.pending(url) == missing
    assert sqlite_migrate.migrate(url) == missing
    assert sqlite_migrate.migrate(url) == []
    send(path)
    with transaction(path) as connection:
        assert connection.execute("SELECT count(extra), count(*) FROM retryproof_outbox").fetchall() == [(0, 2)]


async def test_o4_a_relay_refuses_tables_of_an_earlier_release(path: Path, later: Callable[[], None]) -> None:
    send(path)
    later()
    relay = Relay(f"sqlite:///{path}", Noting(), policy=QUICK)
    with pytest.raises(ConfigurationError, match="retryproof migrate sqlite"):
        await relay.run_once()
    await relay.aclose()


def test_o4_made_now_and_migrated_are_the_same(tmp_path: Path, later: Callable[[], None]) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    send(old)
    receive(old)
    later()
    sqlite_migrate.migrate(f"sqlite:///{old}")
    send(new)
    receive(new)
    assert names(old) - {"retryproof_operations", "retryproof_markers"} == names(new)
    assert names(old, "index") >= names(new, "index")


def test_o4_tables_of_a_later_release_say_upgrade(path: Path) -> None:
    send(path)
    with transaction(path) as connection:
        connection.execute("UPDATE retryproof_schema SET version = 9")
    with pytest.raises(ConfigurationError, match="upgrade retryproof"):
        send(path)


def test_o4_tables_from_before_versions_were_noted_are_the_first(path: Path) -> None:
    part = SQLITE_OUTBOX
    with transaction(path) as connection:
        for statement in part.steps[0]:
            connection.execute(statement)
    with pytest.raises(ConfigurationError, match="have version 1"):
        send(path)
    assert sqlite_migrate.migrate(f"sqlite:///{path}") == [f"outbox_{n}" for n in range(2, part.version + 1)]
    send(path)


def test_o4_a_file_that_is_no_database_is_said_to_be_none(path: Path) -> None:
    path.write_text("no database " * 100)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        sqlite_migrate.pending(f"sqlite:///{path}")
