"""`retryproof outbox stats`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.outbox_command import with_operator
from retryproof.cli.output import Output, add_row, duration, table
from retryproof.core.address import redacted


@click.command(epilog=exits.HELP)
@url_argument
@json_option
def stats(url: str, output: Output) -> None:
    """How an outbox stands: what is pending and for how long, what is held back, and how many relays are alive."""
    found = with_operator(url, lambda operator: operator.stats())
    rows = table("", "")
    for name, value in (
        ("pending", found.pending),
        ("lag: age of the oldest", duration(found.lag)),
        ("held back behind a failure", found.parked),
        ("keys held back", found.blocked),
        ("dead letters", found.dead),
        ("live relays", found.relays),
        ("partitions", found.partitions),
    ):
        add_row(rows, (name, value))
    output.answer({"store": redacted(url), **found.as_document()}, rows)
