"""`retryproof migrate`: bring a database's schema up to this release (O4)."""

from __future__ import annotations

import sys

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.output import Output
from retryproof.core.address import redacted, scheme_of
from retryproof.stores.url import entry_of, load


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--check", is_flag=True, help="Only say what is missing; exit with 1 if anything is.")
@json_option
def migrate(url: str, check: bool, output: Output) -> None:
    """Apply the migrations that the database at URL does not have yet.

    They are numbered, only go forward, and are applied in one transaction. The previous release works on the new
    schema, and several processes may migrate at once. A SQLite file needs this only if it has an inbox or an outbox of
    an earlier release; missing tables are created at their first use.
    """
    entry = entry_of(url)
    if entry.migrations is None:
        output.answer(
            _document(url, [], []), f"Nothing to do: {scheme_of(url)}:// needs no migrations; it has no schema."
        )
        return
    migrations = load(entry, entry.migrations)
    if check:
        missing = migrations.pending(url)
        lines = [f"missing: {name}" for name in missing] or ["Nothing to do: every migration is applied."]
        output.answer(_document(url, [], missing), *lines)
        sys.exit(exits.FOUND if missing else exits.DONE)
    with output.progress("migrating") as tell:
        applied = migrations.migrate(url, progress=tell)
    lines = [f"applied {name}" for name in applied] or ["Nothing to do: every migration was applied before."]
    output.answer(_document(url, applied, []), *lines)


def _document(url: str, applied: list[str], pending: list[str]) -> dict[str, object]:
    return {"store": redacted(url), "applied": applied, "pending": pending}
