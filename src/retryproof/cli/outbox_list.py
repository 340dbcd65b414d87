"""`retryproof outbox list`."""

from __future__ import annotations

from typing import Any

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.outbox_command import with_operator
from retryproof.cli.output import Output, add_row, table
from retryproof.cli.shown import moment
from retryproof.core.address import redacted
from retryproof.stores.sql.outbox import DeadLetter


@click.command("list", epilog=exits.HELP)
@url_argument
@click.option("--topic", help="Those of one topic.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(url: str, topic: str | None, limit: int, output: Output) -> None:
    """Dead letters, the oldest first: when and why they were given up. Payloads are not shown."""
    letters = with_operator(url, lambda operator: operator.dead(topic=topic, limit=limit + 1))
    shown, more = letters[:limit], len(letters) > limit
    rows = table("id", "topic", "attempts", "given up", "reason")
    for letter in shown:
        message = letter.message
        add_row(rows, (message.id, message.topic, message.attempts, moment(letter.died_at), letter.reason))
    document = {"store": redacted(url), "dead": [as_document(letter) for letter in shown], "more": more}
    output.answer(document, rows if shown else "No dead letters.", *(["… and more: --limit."] if more else []))


def as_document(letter: DeadLetter) -> dict[str, Any]:
    """What `--json` says of a dead letter."""
    message = letter.message
    return {
        "id": str(message.id),
        "topic": message.topic,
        "attempts": message.attempts,
        "reason": letter.reason,
        "bytes": len(message.payload),
        "content_type": message.content_type,
        "created_at": moment(message.created_at),
        "died_at": moment(letter.died_at),
    }
