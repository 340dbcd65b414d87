"""`retryproof keys list`."""

from __future__ import annotations

import os
from itertools import islice

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, opened, url_argument
from retryproof.cli.find import PEPPER_VARIABLE, pages
from retryproof.cli.output import Output, add_row, duration, table
from retryproof.cli.shown import abandoned, as_document, moment, state_of
from retryproof.core.address import redacted
from retryproof.core.keys import short_digest, tenant_digest
from retryproof.core.record import MICROSECONDS, Record, State

STATES = ("in_progress", "abandoned", "released", "completed", "tombstone")


@click.command("list", epilog=exits.HELP)
@url_argument
@click.option(
    "--state",
    type=click.Choice(STATES),
    help="Only these; abandoned: unknown whether it happened, and nobody is at it.",
)
@click.option("--tenant", help="Only those of this tenant: its name, or its digest as `keys show` gives it.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@click.option("--all", "everything", is_flag=True, help="Without a limit.")
@json_option
def list_keys(url: str, state: str | None, tenant: str | None, limit: int, everything: bool, output: Output) -> None:
    """List operations of the store at URL in the order of their digests."""
    wanted = None if state in (None, "abandoned") else State[state.upper()]
    with opened(url) as store, output.progress("reading") as tell:
        found: list[Record] = []
        records = pages(store, state=wanted, tenant=_tenant(tenant))
        if state == "abandoned":
            records = (record for record in records if abandoned(record))
        for record in islice(records, None if everything else limit + 1):
            found.append(record)
            if len(found) % 100 == 0:
                tell(f"{len(found)} records")
    more = not everything and len(found) > limit
    shown = found if everything else found[:limit]
    document = {"store": redacted(url), "records": [as_document(record) for record in shown], "more": more}
    rows = table("digest", "state", "attempt", "first seen", "lease left", "expires")
    for record in shown:
        add_row(rows, _cells(record), "yellow" if abandoned(record) else "")
    output.answer(document, rows if shown else "No records.", *(["… and more: --all, or --limit."] if more else []))


def _cells(record: Record) -> tuple[object, ...]:
    left = (record.lease_until - record.read_at) / MICROSECONDS
    return (
        short_digest(record.id),
        state_of(record),
        record.attempt,
        moment(record.first_seen),
        duration(left) if not record.settled and left > 0 else "-",
        moment(record.expires_at),
    )


def _tenant(given: str | None) -> bytes | None:
    if given is None:
        return None
    try:
        digest = bytes.fromhex(given)
    except ValueError:
        digest = b""
    if len(digest) == 16:
        return digest
    return tenant_digest(given, pepper=os.environ.get(PEPPER_VARIABLE, "").encode())
