"""One relay's time at an outbox: partitions, lease, claims and finishes, all fenced by its own row (T6)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from operator import attrgetter
from time import monotonic
from typing import TypeVar
from uuid import UUID, uuid4

from retryproof.core.errors import ConfigurationError, LeaseLost, StoreUnavailable
from retryproof.core.message import BatchResult, Message
from retryproof.core.record import microseconds
from retryproof.outbox.floors import Floors
from retryproof.outbox.policy import RelayPolicy
from retryproof.outbox.quota import Quota
from retryproof.sql.database import OwnDatabase
from retryproof.sql.outbox import ClaimedBatch
from retryproof.sql.plan import Plan

T = TypeVar("T")

FROM_THE_START = 60.0
"""Seconds between two claims that begin at the first message, whatever the floors say."""

log = logging.getLogger("retryproof.relay")
_NUMBER = attrgetter("sequence")


class Membership:
    """One relay's time as a member: from joining to leaving, or to the loss of its lease."""

    def __init__(self, database: OwnDatabase, policy: RelayPolicy, id: UUID, lease_end: float) -> None:
        self._database = database
        self._policy = policy
        self._id = id
        self._lease_end = lease_end
        self._lease = microseconds(policy.lease)
        self._strict = policy.order == "strict"
        self._balance_at = 0.0
        self._time = 0
        """The store's time, in µs, when this process's monotonic clock was 0; updated with each balance."""
        self._floors = Floors()
        self._start_at = 0.0
        self._quota = Quota(policy.batch)
        self._suspects = True
        self.alone = False
        """Whether the batch in flight is one message that a dead relay left."""
        self.set_aside = False
        """Whether the last claim found messages that have to wait: there may be others behind them."""
        self._unanswered = False
        """Whether the database may still be working on a statement without an answer."""

    @classmethod
    async def join(
        cls, database: OwnDatabase, policy: RelayPolicy, routes: str, *, again: bool = False
    ) -> Membership | None:
        """Become a relay; None while there are relays with another digest of routes.

        again: whether it was tried just before, and has warned already of what this role may not see.
        Raises ConfigurationError where it would lose the order.
        """
        await _check(database, policy, warn=not again)
        id, begun = uuid4(), monotonic()
        lease, strict = microseconds(policy.lease), policy.order == "strict"
        await database.perform(database.plans.bury)
        match await database.perform(lambda: database.plans.join(id, lease, strict, routes)):
            case "order":
                raise ConfigurationError(
                    f"Relays of another order than {policy.order!r} are at work on this outbox; stop them first."
                )
            case "routes":
                return None
        return cls(database, policy, id, begun + policy.lease)

    def now(self) -> int:
        """The store's time in µs, computed from the last balance."""
        return self._time + microseconds(monotonic())

    def live(self) -> bool:
        """Whether the lease is certainly not over."""
        return monotonic() < self._lease_end

    async def keep(self) -> None:
        """Renew the lease until cancelled, or until it is lost."""
        while self.live():
            await asyncio.sleep(self._policy.lease / 3)
            with contextlib.suppress(StoreUnavailable):
                if await self._fenced(lambda: self._database.plans.renew(self._id, self._lease)) is None:
                    self._lease_end = 0.0

    async def balance(self, slow: Sequence[Message] = ()) -> bool:
        """From time to time, bury dead relays and take or give up partitions; return whether they changed."""
        if monotonic() < self._balance_at and self.live():
            return False
        await self._database.perform(self._database.plans.bury)
        begun = monotonic()
        time = await self._fenced(lambda: self._database.plans.renew(self._id, self._lease))
        if time is None:
            raise self._lost()
        self._time = time - microseconds(begun)
        kept = sorted({message.partition for message in slow})
        owned = await self._database.perform(lambda: self._database.plans.balance(self._id, self._strict, kept))
        if owned is None:
            raise self._lost()
        changed = self._floors.own(owned)
        if changed:
            log.info("partitions: %d", len(owned))
        await self._look()
        self._suspects = True
        self._balance_at = monotonic() + self.heartbeat * random.uniform(0.8, 1.0)
        return changed

    async def _look(self) -> None:
        """Begin at the first message again from time to time, and where numbers were set back: what they hide."""
        last = await self._database.perform(self._database.plans.last_number)
        if last is not None and last < self._floors.highest:
            log.warning("the numbers of the outbox were set back, from %d to %d", self._floors.highest, last)
            await _check(self._database, self._policy)
            self._start_at = 0.0
        if monotonic() >= self._start_at:
            self._floors.reset()
            self._start_at = monotonic() + FROM_THE_START

    @property
    def heartbeat(self) -> float:
        """Seconds between two checks of the other relays."""
        return min(1.0, self._policy.lease / 4)

    async def claim(self, slow: Sequence[Message] = (), *, most: int | None = None) -> Sequence[Message]:
        """A batch; of one, where that is to be tried alone. slow: messages of earlier batches that are in flight.

        most: how many at most, if less than the policy's.
        """
        if not self._floors.at:
            return []
        alone, self.alone = self._suspects and not (self.alone or self._strict), False
        batch = min(self._policy.batch, most or self._policy.batch)
        taken = await self._claim(slow, batch, alone=alone)  # without an answer the next one is of the same kind
        self.alone = alone
        if self.alone and not taken.messages:
            self.alone = False
            taken = await self._claim(slow, batch, alone=False)
        self.set_aside = bool(taken.waiting)
        messages = sorted(taken.messages, key=_NUMBER)
        if slow:
            held = {message.queue_id for message in slow}
            messages = [message for message in messages if message.queue_id not in held]
        if self._strict:
            self.alone = bool(messages) and messages[0].parked
            if messages:
                self._floors.follow_all(messages[-1].sequence)
        elif not self.alone and len(messages) == len(taken.messages):
            found = self._floors.follow(messages, taken.waiting, quota=self._quota.size, batch=batch)
            self._quota.learn(found, len(self._floors.at))
        return messages

    async def _claim(self, slow: Sequence[Message], batch: int, *, alone: bool) -> ClaimedBatch:
        floors, quota = self._floors, self._quota.size
        starts = floors.begin()
        taken = await self._fenced(
            lambda: self._database.plans.claim(
                self._id,
                starts,
                batch=1 if alone else batch,
                quota=1 if alone else quota,
                lease=self._lease,
                alone=alone,
                strict=self._strict,
                slow=slow,
                open=floors.open,
                server=floors.server,
            )
        )
        if not taken.held:
            raise self._lost()
        self._suspects = taken.suspects
        floors.learn(taken)
        return taken

    async def finish(self, conclusion: BatchResult, *, all_done: bool | None) -> None:
        """Finish the batch, or slow messages of earlier ones (None); raises LeaseLost if another relay has them."""
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
            self._floors.advance()
        else:
            self._floors.stay()

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
        """Wait for a statement that may still run: a renewal waits for its locks, and the next statement sees its rows.

        A statement that itself waited for them would see the rows as they were before.
        """
        if await self._database.perform(lambda: self._database.plans.renew(self._id, self._lease)) is None:
            raise self._lost()
        self._unanswered = False

    def _lost(self) -> LeaseLost:
        self._lease_end = 0.0
        return LeaseLost("This relay's lease was lost; another one publishes what it had again, with the same ids.")


async def _check(database: OwnDatabase, policy: RelayPolicy, *, warn: bool = True) -> None:
    """Raise ConfigurationError if this relay would lose the order, or send messages of another database.

    warn: whether to say what this role may not see.
    """
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
    if settings.disordered:
        raise ConfigurationError(
            f"The numbers of this outbox cannot order its messages: {settings.disordered[0]}. "
            f"Stop the applications that add messages, and run: {settings.disordered[1]}"
        )
    if not warn:
        return
    if settings.unsure:
        log.warning(
            "this role may not ask which cluster this is; a backup of another one is noticed only where its "
            "transaction ids are ahead. To have it noticed: %s",
            settings.unsure,
        )
    if settings.unnumbered:
        log.warning(
            "this role may not ask for the last number of the outbox; numbers that were set back go unnoticed. "
            "To have it noticed: %s",
            settings.unnumbered,
        )
