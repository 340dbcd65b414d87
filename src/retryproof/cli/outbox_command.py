"""What the outbox's commands have in common: the outbox by URL, and which dead letters are meant."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar
from uuid import UUID

import click

from retryproof.cli.command import Function, apart, no_url
from retryproof.cli.operated import closing, tell_of_letters
from retryproof.cli.output import Output
from retryproof.core.message import PARTITIONS
from retryproof.transaction.operator import Operator

T = TypeVar("T")
PAGE = 1_000


def with_operator(url: str, work: Callable[[Operator], Awaitable[T]], partitions: int = PARTITIONS) -> T:
    """Do something to the outbox of a database."""

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
    """Do something to the dead letters that are meant, and say to how many."""
    urls, names = apart(targets)
    ids = _ids(names)
    if len(urls) > 1:
        raise click.UsageError("Give one URL at most.")
    if bool(ids) == everything or (topic is not None and not everything):
        raise click.UsageError("Name dead letters by their ids, or all of them: --all, with --topic where wanted.")
    url = urls[0] if urls else no_url()

    async def work(operator: Operator) -> int:
        if not everything:
            return await action(operator, ids)
        done, seen = 0, set[UUID]()
        while letters := await operator.dead(topic=topic, limit=PAGE):
            new = [letter.message.id for letter in letters if letter.message.id not in seen]
            if not new:  # what comes last died again meanwhile
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
