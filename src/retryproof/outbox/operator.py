"""An operator's actions on an outbox: show it, and decide about dead letters (O1)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from uuid import UUID

from retryproof.core.message import PARTITIONS
from retryproof.core.record import microseconds
from retryproof.outbox.policy import REMEMBERED
from retryproof.sql.database import OwnDatabase, open_database
from retryproof.sql.outbox import DeadLetter, Stats

PURGE_BATCH = 1_000

log = logging.getLogger("retryproof.relay")


class Operator:
    """The outbox of a database, by URL; for one event loop."""

    def __init__(self, store: str, *, timeout: float = 5.0, partitions: int = PARTITIONS) -> None:
        self._database: OwnDatabase = open_database(store, timeout=timeout)
        self._partitions = partitions
        self._ready = False

    async def stats(self) -> Stats:
        """The numbers of the outbox."""
        await self._prepare()
        return await self._database.perform(self._database.plans.stats)

    async def dead(self, *, topic: str | None = None, limit: int = 100, ids: Sequence[UUID] = ()) -> list[DeadLetter]:
        """Dead letters, the oldest first."""
        await self._prepare()
        return list(await self._database.perform(lambda: self._database.plans.dead(topic=topic, limit=limit, ids=ids)))

    async def requeue(self, ids: Sequence[UUID]) -> int:
        """Send dead letters again, after all pending messages, with their old ids; return how many there were.

        Their ages and counts start again. If some are older than receivers remember, the log warns.
        """
        await self._prepare()
        remembered = microseconds(REMEMBERED)
        count, late = await self._database.perform(lambda: self._database.plans.requeue(ids, remembered))
        if late:
            log.warning(
                "%d of the %d requeued messages are older than a day, for which receivers remember ids: one that "
                "reached its receiver before may take effect a second time",
                late,
                count,
            )
        return count

    async def drop(self, ids: Sequence[UUID]) -> int:
        """Delete dead letters."""
        await self._prepare()
        return await self._database.perform(lambda: self._database.plans.drop(ids))

    async def purge(self, older_than: float) -> int:
        """Delete a bounded number of dead letters older than so many seconds; 0 if there are no more."""
        await self._prepare()
        age = microseconds(older_than)
        return await self._database.perform(lambda: self._database.plans.purge(age, PURGE_BATCH))

    async def adopt(self) -> int:
        """Allow sending messages that were restored from another cluster; no relay may run meanwhile."""
        await self._prepare()
        return await self._database.perform(self._database.plans.adopt)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._database.aclose()

    async def _prepare(self) -> None:
        """Create SQLite's tables, if there are none."""
        if not self._ready:
            await self._database.perform(lambda: self._database.plans.settings(self._partitions))
            self._ready = True
