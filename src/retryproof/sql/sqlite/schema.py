"""The tables of the inbox and the outbox in a SQLite file: who makes them, and which release's they are (O4).

What is not there is made at the first use, in the transaction of whoever uses it, as this release has it; so a file
needs no `retryproof migrate` before. What is there from an earlier release is changed by `retryproof migrate` alone,
never behind the back of a transaction, and until then it is refused, before anything is written.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.drive import pump
from retryproof.sql.plan import Plan, Statement

VERSIONS = """CREATE TABLE IF NOT EXISTS retryproof_schema (
    part TEXT PRIMARY KEY,
    version INTEGER NOT NULL
) WITHOUT ROWID"""


@dataclass(frozen=True, slots=True)
class Part:
    """Tables that belong together. table: one that every version has. steps: each version's statements, in order."""

    name: str
    table: str
    steps: Sequence[Sequence[str]]

    @property
    def version(self) -> int:
        """What this release works on."""
        return len(self.steps)


def version_of(part: Part) -> Plan[int]:
    """Which version a file has; 0 where there is none."""
    rows = yield Statement(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name IN ('retryproof_schema', ?)", (part.table,)
    )
    names = {row[0] for row in rows}
    if part.table not in names:
        return 0
    if "retryproof_schema" not in names:
        return 1
    rows = yield Statement("SELECT version FROM retryproof_schema WHERE part = ?", (part.name,))
    return int(rows[0][0]) if rows else 1


def ready(part: Part) -> Plan[None]:
    """Make the tables where there are none; raises ConfigurationError for those of another release."""
    version = yield from version_of(part)
    if version == part.version:
        return
    if version:
        raise another_release(part, version)
    yield from _apply(part, 0)


def migrated(part: Part) -> Plan[list[str]]:
    """Bring the tables up to this release; the names of the steps that were missing. What is not there stays so."""
    version = yield from version_of(part)
    if version > part.version:
        raise another_release(part, version)
    if 0 < version < part.version:
        yield from _apply(part, version)
    return missing(part, version)


def missing(part: Part, version: int) -> list[str]:
    """The names of the steps that tables of a version lack."""
    return [f"{part.name}_{number}" for number in range(version + 1, part.version + 1)] if version else []


def another_release(part: Part, version: int) -> ConfigurationError:
    """The error of tables that this release does not work on."""
    found = (
        f"The {part.name}'s tables in this SQLite file have version {version}, and this release needs {part.version}"
    )
    todo = "upgrade retryproof" if version > part.version else "run `retryproof migrate sqlite:///…`"
    return ConfigurationError(f"{found}: {todo}. Nothing was written.")


def versions(path: str, parts: Sequence[Part], timeout: float) -> dict[str, int]:
    """The versions of a file's parts, by name, without making or changing it; raises StoreUnavailable."""
    if not os.path.exists(path):
        return {part.name: 0 for part in parts}
    try:
        connection = sqlite3.connect(f"file:{quote(str(Path(path).resolve()))}?mode=ro", uri=True, timeout=timeout)
        try:
            execute: Callable[[Statement], Sequence[tuple[object, ...]]] = lambda statement: connection.execute(  # noqa: E731
                statement.sql, statement.parameters
            ).fetchall()
            return {part.name: pump(version_of(part), execute) for part in parts}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreUnavailable(f"The SQLite database {path} cannot be read: {error}") from error


def _apply(part: Part, version: int) -> Plan[None]:
    for step in part.steps[version:]:
        for statement in step:
            yield Statement(statement)
    yield Statement(VERSIONS)
    yield Statement("INSERT OR REPLACE INTO retryproof_schema (part, version) VALUES (?, ?)", (part.name, part.version))
