"""`retryproof inbox stats`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.inbox_command import with_inbox
from retryproof.cli.output import Output, add_row, duration, table
from retryproof.core.address import redacted


@click.command(epilog=exits.HELP)
@url_argument
@json_option
def stats(url: str, output: Output) -> None:
    """How an inbox stands: messages that were taken, and dead letters, with the age of the oldest of each."""
    found = with_inbox(url, lambda operator: operator.stats())
    rows = table("", "")
    for name, value in (
        ("messages", found.messages),
        ("age of the oldest", duration(found.oldest)),
        ("dead letters", found.dead),
        ("age of the oldest dead letter", duration(found.oldest_dead)),
    ):
        add_row(rows, (name, value))
    output.answer({"store": redacted(url), **found.as_document()}, rows)
