"""`retryproof inbox list`."""

from __future__ import annotations

from typing import Any

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.inbox_command import with_inbox
from retryproof.cli.output import Output, add_row, table
from retryproof.core.address import redacted
from retryproof.transaction.inbox import DeadLetter


@click.command("list", epilog=exits.HELP)
@url_argument
@click.option("--consumer", help="Those of one consumer.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(url: str, consumer: str | None, limit: int, output: Output) -> None:
    """Dead letters, the oldest first: whose they are, and why. Payloads are not shown."""
    letters = with_inbox(url, lambda operator: operator.dead(consumer=consumer, limit=limit + 1))
    shown, more = letters[:limit], len(letters) > limit
    rows = table("id", "consumer", "source", "message", "came", "reason")
    for letter in shown:
        came = letter.seen_at.isoformat(timespec="seconds")
        add_row(rows, (letter.name, letter.consumer, letter.source, letter.message_id, came, letter.reason))
    document = {"store": redacted(url), "dead": [_as_document(letter) for letter in shown], "more": more}
    output.answer(document, rows if shown else "No dead letters.", *(["… and more: --limit."] if more else []))


def _as_document(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.name,
        "consumer": letter.consumer,
        "source": letter.source,
        "message_id": letter.message_id,
        "reason": letter.reason,
        "bytes": len(letter.payload),
        "seen_at": letter.seen_at.isoformat(),
    }
