"""What the commands on an outbox and an inbox share: an operator by URL, purging, and messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, TypeVar

from retryproof.cli.command import Refused
from retryproof.cli.output import Output
from retryproof.core.address import redacted


class Closing(Protocol):
    """An object that is closed after use."""

    async def aclose(self) -> None: ...


C = TypeVar("C", bound=Closing)
T = TypeVar("T")


def closing(make: Callable[[], C], work: Callable[[C], Awaitable[T]]) -> T:
    """Make an object, use it and close it, in a new event loop."""

    async def run() -> T:
        made = make()
        try:
            return await work(made)
        finally:
            await made.aclose()

    return asyncio.run(run())


def purge_all(url: str, output: Output, make: Callable[[], C], purge: Callable[[C], Awaitable[int]]) -> None:
    """Purge in bounded passes until nothing is left, and print the number of deleted rows."""

    async def work(operator: C) -> int:
        purged = 0
        while removed := await purge(operator):
            purged += removed
            tell(f"{purged} purged")
        return purged

    with output.progress("purging") as tell:
        count = closing(make, work)
    output.answer({"store": redacted(url), "purged": count}, f"purged: {count}")


def tell_of_letters(url: str, output: Output, word: str, count: int, names: Collection[object]) -> None:
    """Print how many dead letters were changed; raise Refused if some of the named ones do not exist."""
    output.answer({"store": redacted(url), word: count}, f"{word}: {count}")
    wanted = len(set(names))
    if count < wanted:
        raise Refused(f"{wanted - count} of {wanted} ids name no dead letter; the others are {word}.")
