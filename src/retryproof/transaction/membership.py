"""One relay's time at an outbox: partitions, lease, claims and finishes, all fenced by its own row (T6)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from time import monotonic
from typing import TypeVar
from uuid import UUID, uuid4

from retryproof.core.errors import ConfigurationError, LeaseLost, StoreUnavailable
from retryproof.core.message import Conclusion, Message
from retryproof.core.record import microseconds
from retryproof.stores.sql.outbox import Taken
from retryproof.stores.sql.plan import Plan
from retryproof.transaction.outbox_database import Database
from retryproof.transaction.relay_policy import RelayPolicy
from retryproof.transaction.share import Share

T = TypeVar("T")

MOST_OPEN = 16
"""Transactions open for long that a claim asks after; more of them hold the floors back."""

log = logging.getLogger("retryproof.relay")
_PLACE = attrgetter("xid", "sequence")


class Membership:
    """One relay's time as a member: from joining to leaving, or to the loss of its lease."""

    def __init__(self, database: Database, policy: RelayPolicy, id: UUID, lease_end: float) -> None:
        self._database = database
        self._policy = policy
        self._id = id
        self._lease_end = lease_end
        self._lease = microseconds(policy.lease)
        self._strict = policy.order == "strict"
        self._balance_at = 0.0
        self._floors: dict[int, int] = {}
        """By partition, in the order in which they are asked."""
        self._ahead: dict[int, int] = {}
        """The floors once all of the batch on its way is done."""
        self._running: frozenset[int] = frozenset()
        self._open: tuple[int, ...] = ()
        """Transactions that were open at the last look and at the one before, and may be below the floors."""
        self._share = Share(policy.batch)
        self._suspects = True
        self.alone = False
        """Whether the batch on its way is a message that a dead relay left."""
        self.set_aside = False
        """Whether the last claim came upon messages that have to wait: there may be others behind them."""
        self._unanswered = False
        """Whether the database may still be at work on what it gave no answer to."""

    @classmethod
    async def join(cls, database: Database, policy: RelayPolicy) -> Membership:
        """Become a relay; raises ConfigurationError where that would lose the order."""
        settings = await database.perform(lambda: database.plans.settings(policy.partitions))
        if settings.partitions != policy.partitions:
            raise ConfigurationError(
                f"This relay has partitions={policy.partitions}, and the database {settings.partitions}."
            )
        if settings.foreign:
            raise ConfigurationError(
                f"The outbox was restored from another PostgreSQL cluster: {settings.foreign}. Messages may have been "
                "sent already after the backup. Look at them, and run `retryproof outbox adopt` to have them sent."
            )
        if settings.unsure:
            log.warning(
                "this role may not ask which cluster this is; a backup of another one is noticed only where its "
                "transaction ids are ahead. To have it noticed: %s",
                settings.unsure,
            )
        id, begun = uuid4(), monotonic()
        lease, strict = microseconds(policy.lease), policy.order == "strict"
        if not await database.perform(lambda: database.plans.join(id, lease, strict)):
            raise ConfigurationError(
                f"Relays of another order than {policy.order!r} are at work on this outbox; stop them first."
            )
        return cls(database, policy, id, begun + policy.lease)

    def live(self) -> bool:
        """Whether the lease is certain to last still."""
        return monotonic() < self._lease_end

    async def keep(self) -> None:
        """Renew the lease until cancelled, or until it is lost."""
        while self.live():
            await asyncio.sleep(self._policy.lease / 3)
            with contextlib.suppress(StoreUnavailable):
                if not await self._fenced(lambda: self._database.plans.renew(self._id, self._lease)):
                    self._lease_end = 0.0

    async def balance(self, slow: Sequence[Message] = ()) -> bool:
        """From time to time: bury dead relays, take or give up partitions; whether there are others than before."""
        if monotonic() < self._balance_at and self.live():
            return False
        await self._database.perform(self._database.plans.bury)
        if not await self._fenced(lambda: self._database.plans.renew(self._id, self._lease)):
            raise self._lost()
        kept = sorted({message.partition for message in slow})
        owned = await self._database.perform(lambda: self._database.plans.balance(self._id, self._strict, kept))
        if owned is None:
            raise self._lost()
        changed = set(owned) != set(self._floors)
        if changed:
            log.info("partitions: %d", len(owned))
            self._floors = dict.fromkeys(owned, 0)
        if not self._strict:
            await self._look()
        self._suspects = True
        self._balance_at = monotonic() + self.heartbeat * random.uniform(0.8, 1.0)
        return changed

    async def _look(self) -> None:
        """Find the transactions that are open for long: they are not to hold the floors back."""
        running = await self._database.perform(self._database.plans.running)
        still = tuple(xid for xid in running if xid in self._running)[:MOST_OPEN]
        if over := set(self._open).difference(still):
            self._lower(min(over))
        self._running, self._open = frozenset(running), still

    def _lower(self, xid: int) -> None:
        """Begin again where a transaction may have left something that nobody asked for."""
        self._floors = {partition: min(floor, xid) for partition, floor in self._floors.items()}
        self._ahead = {}

    @property
    def heartbeat(self) -> float:
        """Seconds between two looks at the other relays."""
        return min(1.0, self._policy.lease / 4)

    async def claim(self, slow: Sequence[Message] = ()) -> Sequence[Message]:
        """A batch; of one, where that is to be tried alone. slow: what is on its way from earlier batches."""
        if not self._floors:
            return []
        alone, self.alone = self._suspects and not (self.alone or self._strict), False
        taken = await self._claim(slow, alone=alone)  # without an answer the next one is of the same kind
        self.alone = alone
        if self.alone and not taken.messages:
            self.alone = False
            taken = await self._claim(slow, alone=False)
        self.set_aside = bool(taken.waiting)
        messages = sorted(taken.messages, key=_PLACE)
        if slow:
            held = {message.line for message in slow}
            messages = [message for message in messages if message.line not in held]
        self._ahead = {}
        if self._strict:
            self.alone = bool(messages) and messages[0].parked
            if messages:
                self._ahead = dict.fromkeys(self._floors, messages[-1].xid)
        elif not self.alone and len(messages) == len(taken.messages):
            self._follow(messages, taken)
        if self._open and taken.ended:
            self._lower(min(self._open))
            self._open = ()
        return messages

    async def _claim(self, slow: Sequence[Message], *, alone: bool) -> Taken:
        floors, share, batch = self._floors, self._share.size, self._policy.batch
        taken = await self._fenced(
            lambda: self._database.plans.claim(
                self._id,
                floors,
                batch=1 if alone else batch,
                share=1 if alone else share,
                lease=self._lease,
                alone=alone,
                strict=self._strict,
                slow=slow,
                open=self._open,
            )
        )
        if not taken.held:
            raise self._lost()
        self._suspects = taken.suspects
        return taken

    def _follow(self, messages: Sequence[Message], taken: Taken) -> None:
        """Where the next claim begins, and how much of each partition it takes."""
        found: dict[int, int] = dict(Counter(taken.waiting)) if taken.waiting else {}
        fence = taken.fence
        for message in messages:
            partition = message.partition
            found[partition] = found.get(partition, 0) + 1
            if not message.parked:
                self._ahead[partition] = message.xid if message.xid < fence else fence
        self._share.learn(found, len(self._floors))
        self._rotate(found)

    def _rotate(self, found: dict[int, int]) -> None:
        """Begin after the last partition that gave something."""
        order = list(self._floors)
        last = max((place for place, partition in enumerate(order) if partition in found), default=-1) + 1
        self._floors = {partition: self._floors[partition] for partition in (*order[last:], *order[:last])}

    async def finish(self, conclusion: Conclusion, *, all_done: bool | None) -> None:
        """End the batch, or what went on from earlier ones (None); raises LeaseLost where another relay has it."""
        ahead, self._ahead = self._ahead, {}
        held = await self._fenced(
            lambda: self._database.plans.finish(
                self._id,
                conclusion,
                lease=self._lease,
                strict=self._strict,
                passing=self._policy.on_failure == "pass",
            )
        )
        if not held:
            raise self._lost()
        if all_done and not (self._strict and conclusion.slow):
            self._floors.update(ahead)
        elif all_done is not None:
            self._floors = dict.fromkeys(self._floors, 0)

    async def leave(self) -> None:
        """Give the partitions back."""
        await self._database.perform(lambda: self._database.plans.leave(self._id))

    async def _fenced(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan that extends the lease, and count it from before it was sent."""
        if self._unanswered:
            await self._answered()
        begun = monotonic()
        try:
            result = await self._database.perform(plan)
        except StoreUnavailable:
            self._unanswered = True
            raise
        self._lease_end = max(self._lease_end, begun + self._policy.lease) if self._lease_end else 0.0
        return result

    async def _answered(self) -> None:
        """Wait for what may be done still: its locks end a renewal's wait, and the next statement sees all of it.

        A statement that itself waited for them would see the rows as they were before.
        """
        if not await self._database.perform(lambda: self._database.plans.renew(self._id, self._lease)):
            raise self._lost()
        self._unanswered = False

    def _lost(self) -> LeaseLost:
        self._lease_end = 0.0
        return LeaseLost("This relay's lease was lost; another one publishes what it had again, with the same ids.")
