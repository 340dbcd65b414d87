"""`retryproof migrate` for a SQLite file: inbox and outbox of an earlier release, brought up to this one (O4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retryproof.sql.plan import Plan
from retryproof.sql.sqlite.file import SqliteFile
from retryproof.sql.sqlite.inbox import SQLITE_INBOX
from retryproof.sql.sqlite.outbox_schema import SQLITE_OUTBOX
from retryproof.sql.sqlite.schema import Part, migrated, missing, versions
from retryproof.sql.sqlite.url import parse

TIMEOUT = 30.0
"""Seconds to wait for another writer."""


def parts() -> Sequence[Part]:
    """What is migrated; the records' own table is made and kept by the store as it opens the file."""
    return (SQLITE_INBOX, SQLITE_OUTBOX)


def migrate(url: str, *, progress: Callable[[str], None] = lambda step: None) -> list[str]:
    """Change what is of an earlier release, in one transaction; the names of what was applied."""
    if not pending(url):
        return []
    file = SqliteFile(parse(url, TIMEOUT))
    progress("waiting for other writers")
    try:
        return file.write(_everything)
    finally:
        file.close()


def pending(url: str) -> list[str]:
    """The names of what is missing; the file is neither made nor changed."""
    found = versions(parse(url).path, parts(), TIMEOUT)
    return [name for part in parts() for name in missing(part, found[part.name])]


def _everything() -> Plan[list[str]]:
    applied: list[str] = []
    for part in parts():
        applied += yield from migrated(part)
    return applied
