"""`retryproof outbox`: show an outbox, and decide about its dead letters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID

import click

from retryproof.cli import exits
from retryproof.cli.command import Function, Refused, json_option, no_url, split_targets, url_argument
from retryproof.cli.operated import closing, purge_all, tell_of_letters
from retryproof.cli.output import Output, add_row, duration, facts, table
from retryproof.cli.shown import moment
from retryproof.core.address import redacted
from retryproof.core.message import PARTITIONS
from retryproof.outbox.operator import Operator
from retryproof.sql.outbox import DeadLetter

T = TypeVar("T")
PAGE = 1_000


@click.group(epilog=exits.HELP)
def outbox() -> None:
    """Show an outbox and its dead letters: messages that were given up."""


def with_operator(url: str, work: Callable[[Operator], Awaitable[T]], partitions: int = PARTITIONS) -> T:
    """Run an action on the outbox of a database."""

    return closing(lambda: Operator(url, partitions=partitions), work)


def letters_argument(function: Function) -> Function:
    """`[URL] [ID]…` and `--all`; read by `act`."""
    for option in (
        click.option("--topic", help="With --all: those of one topic."),
        click.option("--all", "everything", is_flag=True, help="All dead letters."),
        click.argument("targets", metavar="[URL] [ID]...", nargs=-1, envvar="RETRYPROOF_STORE"),
    ):
        function = option(function)
    return function


def act(
    targets: Sequence[str],
    everything: bool,
    topic: str | None,
    output: Output,
    action: Callable[[Operator, Sequence[UUID]], Awaitable[int]],
    word: str,
) -> None:
    """Run an action on the named dead letters, and print how many it changed."""
    urls, names = split_targets(targets)
    ids = _ids(names)
    if len(urls) > 1:
        raise click.UsageError("Give one URL at most.")
    if bool(ids) == everything or (topic is not None and not everything):
        raise click.UsageError("Name dead letters by their ids, or use --all (with --topic for one topic).")
    url = urls[0] if urls else no_url()

    async def work(operator: Operator) -> int:
        if not everything:
            return await action(operator, ids)
        done, seen = 0, set[UUID]()
        while letters := await operator.dead(topic=topic, limit=PAGE):
            new = [letter.message.id for letter in letters if letter.message.id not in seen]
            if not new:  # the last ones died again meanwhile
                break
            seen.update(new)
            done += await action(operator, new)
            tell(f"{done} done")
        return done

    with output.progress(word) as tell:
        count = with_operator(url, work)
    tell_of_letters(url, output, word, count, ids)


def _ids(texts: Sequence[str]) -> list[UUID]:
    try:
        return [UUID(text) for text in texts]
    except ValueError as error:
        raise click.UsageError("A dead letter's id is a UUID, as `outbox list` shows it.") from error


@outbox.command("list", epilog=exits.HELP)
@url_argument
@click.option("--topic", help="Those of one topic.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_dead(url: str, topic: str | None, limit: int, output: Output) -> None:
    """List dead letters, the oldest first, with the time and reason, without payloads."""
    letters = with_operator(url, lambda operator: operator.dead(topic=topic, limit=limit + 1))
    shown, more = letters[:limit], len(letters) > limit
    rows = table("id", "topic", "attempts", "given up", "reason")
    for letter in shown:
        message = letter.message
        add_row(rows, (message.id, message.topic, message.attempts, moment(letter.died_at), letter.reason))
    document = {"store": redacted(url), "dead": [as_document(letter) for letter in shown], "more": more}
    output.answer(document, rows if shown else "No dead letters.", *(["… and more: --limit."] if more else []))


def as_document(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter for `--json`."""
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


@outbox.command(epilog=exits.HELP)
@letters_argument
@json_option
def requeue(targets: Sequence[str], everything: bool, topic: str | None, output: Output) -> None:
    """Send dead letters again, after all pending messages; their ids stay the same."""
    act(targets, everything, topic, output, lambda operator, ids: operator.requeue(ids), "requeued")


@outbox.command(epilog=exits.HELP)
@letters_argument
@json_option
def drop(targets: Sequence[str], everything: bool, topic: str | None, output: Output) -> None:
    """Delete dead letters: they are never sent."""
    act(targets, everything, topic, output, lambda operator, ids: operator.drop(ids), "dropped")


@outbox.command(epilog=exits.HELP)
@url_argument
@click.option("--older-than", type=click.FloatRange(0.0), required=True, metavar="SECONDS", help="Since given up.")
@json_option
def purge(url: str, older_than: float, output: Output) -> None:
    """Delete old dead letters, in bounded passes."""

    purge_all(url, output, lambda: Operator(url), lambda outbox: outbox.purge(older_than))


@outbox.command(epilog=exits.HELP)
@url_argument
@json_option
def stats(url: str, output: Output) -> None:
    """Show what is pending and for how long, what is held back, and how many relays are alive."""
    found = with_operator(url, lambda operator: operator.stats())
    rows = facts(
        ("pending", found.pending),
        ("lag: age of the oldest", duration(found.lag)),
        ("held back behind a failure", found.parked),
        ("keys held back", found.blocked),
        ("dead letters", found.dead),
        ("live relays", found.relays),
        ("partitions", found.partitions),
    )
    output.answer({"store": redacted(url), **found.as_document()}, rows)


@outbox.command(epilog=exits.HELP)
@url_argument
@json_option
def adopt(url: str, output: Output) -> None:
    """Allow relays to send messages that came from a backup of another PostgreSQL cluster.

    The messages may have been sent already, after the backup was made. Receivers that check ids notice that, others do
    not.
    """

    async def work(operator: Operator) -> int:
        if (await operator.stats()).relays:
            raise Refused("Relays are alive; stop them first.")
        return await operator.adopt()

    count = with_operator(url, work)
    output.answer({"store": redacted(url), "adopted": count}, f"adopted: {count}")
