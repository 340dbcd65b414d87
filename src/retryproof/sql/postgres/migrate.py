"""Migrations of SQL servers: numbered, forward only, each recorded in the database; safe to run at the same time.

All that is missing is applied in one transaction behind an advisory lock: everything or nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypeVar

from retryproof.core.errors import ConfigurationError
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.postgres.url import PostgresTarget, parse

T = TypeVar("T")
LOCK = 0x72_65_74_72_79_70_66  # "retrypf": held while migrating


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: its number, its name (the file's) and its statements."""

    version: int
    name: str
    sql: str


def migrations() -> Sequence[Migration]:
    """All there are, in order."""
    folder = resources.files("retryproof.sql.postgres") / "migrations"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return [
        Migration(int(file.name.partition("_")[0]), file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))
        for file in files
    ]


def migrate(url: str | PostgresTarget, *, progress: Callable[[str], None] = lambda step: None) -> list[str]:
    """Apply what is missing and say so; the names of what was applied.

    progress: told each step in words.
    Raises StoreUnavailable, ConfigurationError for a URL without migrations.
    """
    target = parse(url) if isinstance(url, str) else url
    return transaction(target, lambda: migrate_plan(target, progress))


def pending(url: str | PostgresTarget) -> list[str]:
    """The names of the migrations that the database has not seen."""
    target = parse(url) if isinstance(url, str) else url
    return transaction(target, lambda: pending_plan(target))


def migrate_plan(target: PostgresTarget, progress: Callable[[str], None]) -> Plan[list[str]]:
    """Apply what is missing, inside a transaction."""
    progress("waiting for other migrations")
    yield Statement("SELECT pg_advisory_xact_lock($1::bigint)", (LOCK,))
    if target.schema:
        yield Statement(f'CREATE SCHEMA IF NOT EXISTS "{target.schema}"')
        yield Statement(f'SET LOCAL search_path = "{target.schema}"')
    yield Statement(
        f"CREATE TABLE IF NOT EXISTS {target.versions} (version integer PRIMARY KEY, name text NOT NULL,"
        " applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    missing = yield from _missing(target)
    for migration in missing:
        progress(f"applying {migration.name}")
        for statement in statements_of(migration.sql):
            yield Statement(statement)
        record = f"INSERT INTO {target.versions} (version, name) VALUES ($1::int, $2::text)"
        yield Statement(record, (migration.version, migration.name))
    progress("committing" if missing else "nothing to apply")
    return [migration.name for migration in missing]


def pending_plan(target: PostgresTarget) -> Plan[list[str]]:
    """What is missing."""
    ((exists,),) = yield Statement("SELECT to_regclass($1::text) IS NOT NULL", (target.versions,))
    missing = (yield from _missing(target)) if exists else migrations()
    return [migration.name for migration in missing]


def _missing(target: PostgresTarget) -> Plan[Sequence[Migration]]:
    rows = yield Statement(f"SELECT version FROM {target.versions}")
    applied = {row[0] for row in rows}
    return [migration for migration in migrations() if migration.version not in applied]


def statements_of(sql: str) -> Sequence[str]:
    """The statements of a migration: each ends with a semicolon at the end of a line."""
    lines = [line for line in sql.splitlines() if line.strip() and not line.lstrip().startswith("--")]
    return [statement.strip() for statement in ("\n".join(lines) + "\n").split(";\n") if statement.strip()]


def transaction(target: PostgresTarget, plan: Callable[[], Plan[T]]) -> T:
    """Run a plan in one transaction, on whichever driver is installed."""
    if target.driver == "asyncpg":
        return _transaction_on_loop(target, plan)
    try:
        from retryproof.sql.postgres import psycopg
    except ModuleNotFoundError:
        return _transaction_on_loop(target, plan)
    return psycopg.transaction(target, plan)


def _transaction_on_loop(target: PostgresTarget, plan: Callable[[], Plan[T]]) -> T:
    try:
        from retryproof.sql.postgres import asyncpg
    except ModuleNotFoundError as error:
        raise ConfigurationError("PostgreSQL needs a driver: pip install 'retryproof[postgres]'") from error
    return asyncio.run(asyncpg.transaction(target, plan))
