"""An operator's actions on an inbox: show it, delete old messages, decide about dead letters (O1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from retryproof.core.errors import ConfigurationError
from retryproof.core.record import microseconds
from retryproof.inbox.receive import START, InboxDeadLetter, letter_of
from retryproof.sql.database import OwnDatabase, open_database

PURGE_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class InboxStats:
    """The numbers of an inbox, for all consumers together. Ages of the oldest message and dead letter are seconds."""

    messages: int
    oldest: float
    dead: int
    oldest_dead: float

    def as_document(self) -> dict[str, float]:
        """For `--json`."""
        return asdict(self)


class InboxOperator:
    """The inbox of a database, by URL; for one event loop."""

    def __init__(self, store: str, *, timeout: float = 5.0) -> None:
        self._database: OwnDatabase = open_database(store, timeout=timeout)

    async def stats(self) -> InboxStats:
        """The numbers of the inbox."""
        return InboxStats(*await self._database.perform(self._database.inbox.stats))

    async def dead(self, *, consumer: str | None = None, limit: int = 100) -> list[InboxDeadLetter]:
        """Dead letters, the oldest first."""
        rows = await self._database.perform(lambda: self._database.inbox.dead(limit, consumer))
        return [letter_of(row) for row in rows]

    async def drop(self, names: Sequence[str]) -> int:
        """Delete dead letters by their names; return how many there were. ConfigurationError for a wrong name."""
        starts = [_start(name) for name in names]
        return await self._database.perform(lambda: self._database.inbox.drop_named(starts))

    async def purge(self, older_than: float) -> int:
        """Delete a bounded number of messages that came more than so many seconds ago; 0 if there are no more."""
        age = microseconds(older_than)
        return await self._database.perform(lambda: self._database.inbox.purge(age, PURGE_BATCH))

    async def purge_dead(self, older_than: float) -> int:
        """`purge` of dead letters."""
        age = microseconds(older_than)
        return await self._database.perform(lambda: self._database.inbox.purge_dead(age, PURGE_BATCH))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._database.aclose()


def _start(name: str) -> tuple[bytes, bytes]:
    try:
        data = bytes.fromhex(name)
    except ValueError:
        data = b""
    if len(data) != 2 * START:
        raise ConfigurationError(f"{name!r} names no dead letter; take an id as `retryproof inbox list` shows it.")
    return data[:START], data[START:]
