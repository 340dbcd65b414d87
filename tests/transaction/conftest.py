"""Databases of a test's own, with the store's tables and one of the caller's."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from retryproof.stores.sql.migrate import migrate
from tests.transaction.support import Database

MIGRATED = {"retryproof_outbox_settings", "retryproof_outbox_partitions"}
"""Tables that migrations have filled."""


@pytest.fixture(scope="session")
def postgres_database(postgres_url: str) -> Iterator[str]:
    """A PostgreSQL database beside `postgres_url`, with the store's tables."""
    name = f"own_{uuid.uuid4().hex[:12]}"
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    migrate(url)
    yield url
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def postgres(postgres_database: str) -> Iterator[Database]:
    """A PostgreSQL database, empty but for its tables."""
    database = Database(postgres_database)
    database.prepare()
    yield database
    with psycopg.connect(postgres_database, autocommit=True) as connection:
        rows = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'retryproof_schema'"
        ).fetchall()
        ours = {name for (name,) in rows if name.startswith("retryproof_")}
        for name in ours - MIGRATED:
            connection.execute(f"DELETE FROM {name}".encode())
        others = ['"' + name.replace('"', '""') + '"' for (name,) in rows if name not in ours]
        connection.execute(f"DROP TABLE {', '.join(others)}".encode())


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """A SQLite file."""
    path = tmp_path / "own.db"
    database = Database(f"sqlite:///{path}", path)
    database.prepare()
    return database


@pytest.fixture(params=["postgresql", "sqlite"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each in turn."""
    found: Database = request.getfixturevalue("postgres" if request.param == "postgresql" else "sqlite")
    return found
