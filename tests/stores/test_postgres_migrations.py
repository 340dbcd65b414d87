"""Migrations of PostgreSQL: once each, at the same time too, and their sum is the schema that was agreed on (O4)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.sql.postgres import asyncpg as on_asyncpg
from retryproof.sql.postgres.migrate import migrate, migrations, pending, statements_of
from retryproof.sql.postgres.url import SCHEMA_VERSION, parse
from retryproof.stores.sql.psycopg import PsycopgStore

SNAPSHOT = Path(__file__).with_name("postgres_schema.txt")
NAMES = [migration.name for migration in migrations()]


@pytest.fixture
def url(postgres_url: str, unique: str) -> str:
    return f"{postgres_url}?schema={unique}"


def test_migrations_are_numbered_without_gaps_and_the_code_needs_the_newest() -> None:
    assert [migration.version for migration in migrations()] == list(range(1, SCHEMA_VERSION + 1))


def test_o4_the_schema_is_the_sum_of_its_migrations(url: str, unique: str) -> None:
    """After a new migration, change the snapshot by hand to what you meant it to do."""
    migrate(url)
    assert _described(url, unique) == SNAPSHOT.read_text(encoding="utf-8")


def test_migrating_says_what_it_does_and_does_it_once(url: str) -> None:
    said: list[str] = []
    assert pending(url) == NAMES
    assert migrate(url, progress=said.append) == NAMES
    assert said == ["waiting for other migrations", *[f"applying {name}" for name in NAMES], "committing"]
    assert pending(url) == []
    assert migrate(url, progress=said.append) == []
    assert said[-1] == "nothing to apply"


def test_migrating_at_the_same_time_applies_each_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(migrate, [url] * 4))
    assert sorted(applied) == [[], [], [], NAMES]


@pytest.fixture
def fresh_database(postgres_url: str, unique: str) -> Iterator[str]:
    """The URL of a database that nothing was done in."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(unique)))
        yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{unique}"))
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(unique)))


def test_without_a_schema_tables_go_where_the_search_path_says(fresh_database: str) -> None:
    assert migrate(fresh_database) == NAMES
    store = PsycopgStore(fresh_database)
    assert store.get([b""]) == [None]
    store.close()
    with psycopg.connect(fresh_database) as connection:
        assert connection.execute("SELECT to_regclass('public.retryproof_operations') IS NOT NULL").fetchone() == (
            True,
        )


async def test_asyncpg_migrates_where_psycopg_is_not_installed(url: str) -> None:
    from retryproof.sql.postgres import migrate as module

    plan: Callable[[], Any] = lambda: module.migrate_plan(parse(url), lambda step: None)  # noqa: E731
    assert await on_asyncpg.transaction(parse(url), plan) == NAMES
    assert pending(url) == []


def test_a_migration_that_fails_leaves_nothing(url: str, unique: str, postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute(f"CREATE SCHEMA {unique}".encode())
        connection.execute(f"CREATE VIEW {unique}.retryproof_operations_tenant AS SELECT 1".encode())
    with pytest.raises(StoreUnavailable, match="retryproof_operations_tenant"):
        migrate(url)
    assert pending(url) == NAMES


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="postgresql://"):
        migrate("redis://127.0.0.1/")


def test_statements_end_at_semicolons_that_end_a_line() -> None:
    assert statements_of("-- a; comment\nSELECT ';';\n\nSELECT\n  2;\n") == ["SELECT ';'", "SELECT\n  2"]


def _described(url: str, schema: str) -> str:
    """Columns, constraints and indexes as PostgreSQL describes them, one a line."""
    lines = []
    with psycopg.connect(parse(url).dsns[0], client_encoding="utf8") as connection:
        for query in _QUERIES:
            lines += [row[0].replace(f"{schema}.", "") for row in connection.execute(query.encode(), (schema,))]
    return "\n".join(lines) + "\n"


_QUERIES = (
    """SELECT table_name || '.' || column_name || ' ' || data_type
          || CASE is_nullable WHEN 'NO' THEN ' not null' ELSE '' END || coalesce(' default ' || column_default, '')
       FROM information_schema.columns WHERE table_schema = %s ORDER BY table_name, ordinal_position""",
    """SELECT conrelid::regclass || ': ' || conname || ' ' || pg_get_constraintdef(oid)
       FROM pg_constraint WHERE connamespace = %s::regnamespace AND contype <> 'n' ORDER BY 1""",
    "SELECT indexdef FROM pg_indexes WHERE schemaname = %s ORDER BY indexname",
    """SELECT attrelid::regclass || '.' || attname || ' storage ' || attstorage::text FROM pg_attribute
       WHERE attname = 'result' AND attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = %s::regnamespace)
       ORDER BY 1""",
)
