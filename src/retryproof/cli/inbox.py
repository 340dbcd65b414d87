"""`retryproof inbox`: show an inbox, delete old messages, and decide about dead letters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, no_url, split_targets, url_argument
from retryproof.cli.operated import closing, purge_all, tell_of_letters
from retryproof.cli.output import Output, add_row, duration, facts, table
from retryproof.core.address import redacted
from retryproof.inbox.operator import InboxOperator
from retryproof.inbox.receive import InboxDeadLetter

T = TypeVar("T")


@click.group(epilog=exits.HELP)
def inbox() -> None:
    """Show an inbox and its dead letters: messages whose id was used before with another payload."""


def with_inbox(url: str, work: Callable[[InboxOperator], Awaitable[T]]) -> T:
    """Run an action on the inbox of a database."""

    return closing(lambda: InboxOperator(url), work)


@inbox.command("list", epilog=exits.HELP)
@url_argument
@click.option("--consumer", help="Those of one consumer.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(url: str, consumer: str | None, limit: int, output: Output) -> None:
    """List dead letters, the oldest first, with their consumers and reasons, without payloads."""
    letters = with_inbox(url, lambda operator: operator.dead(consumer=consumer, limit=limit + 1))
    shown, more = letters[:limit], len(letters) > limit
    rows = table("id", "consumer", "source", "message", "came", "reason")
    for letter in shown:
        came = letter.seen_at.isoformat(timespec="seconds")
        add_row(rows, (letter.name, letter.consumer, letter.source, letter.message_id, came, letter.reason))
    document = {"store": redacted(url), "dead": [_as_document(letter) for letter in shown], "more": more}
    output.answer(document, rows if shown else "No dead letters.", *(["… and more: --limit."] if more else []))


def _as_document(letter: InboxDeadLetter) -> dict[str, Any]:
    return {
        "id": letter.name,
        "consumer": letter.consumer,
        "source": letter.source,
        "message_id": letter.message_id,
        "reason": letter.reason,
        "bytes": len(letter.payload),
        "seen_at": letter.seen_at.isoformat(),
    }


@inbox.command(epilog=exits.HELP)
@click.argument("targets", metavar="[URL] ID...", nargs=-1, envvar="RETRYPROOF_STORE")
@json_option
def drop(targets: Sequence[str], output: Output) -> None:
    """Delete dead letters by their ids, as `inbox list` shows them. For all old ones, use `inbox purge --dead`."""
    urls, names = split_targets(targets)
    if len(urls) > 1 or not names:
        raise click.UsageError("Give one URL at most, and the ids of dead letters.")
    url = urls[0] if urls else no_url()
    count = with_inbox(url, lambda operator: operator.drop(names))
    tell_of_letters(url, output, "dropped", count, names)


@inbox.command(epilog=exits.HELP)
@url_argument
@click.option("--older-than", type=click.FloatRange(0.0), required=True, metavar="SECONDS", help="Since they came.")
@click.option("--dead", is_flag=True, help="Dead letters, instead of messages that were taken.")
@json_option
def purge(url: str, older_than: float, dead: bool, output: Output) -> None:
    """Delete old messages from the inbox, in bounded passes.

    If the broker delivers a message again after that, it takes effect again. So SECONDS must exceed the broker's
    retention, and the age at which its dead letters may be replayed.
    """

    purge_all(
        url,
        output,
        lambda: InboxOperator(url),
        lambda inbox: inbox.purge_dead(older_than) if dead else inbox.purge(older_than),
    )


@inbox.command(epilog=exits.HELP)
@url_argument
@json_option
def stats(url: str, output: Output) -> None:
    """Show how many messages and dead letters an inbox has, and the age of the oldest of each."""
    found = with_inbox(url, lambda operator: operator.stats())
    rows = facts(
        ("messages", found.messages),
        ("age of the oldest", duration(found.oldest)),
        ("dead letters", found.dead),
        ("age of the oldest dead letter", duration(found.oldest_dead)),
    )
    output.answer({"store": redacted(url), **found.as_document()}, rows)
