"""The relay: takes what an outbox holds, publishes it outside of any transaction, and deletes what was delivered (T6).

    joined → balance partitions → claim a batch → publish → finish → …

A claim and a finish are one transaction each, both fenced by the relay's own row. Where a relay dies, its lease runs
out, another one buries it, and what was on its way is published again, with the same ids, one message at a time: so a
message that kills its relay is found, and only that one (C15). Where a relay sleeps past its lease, it stops between
two messages, and its finish changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from time import monotonic
from typing import Any, Literal, TypeVar, cast
from uuid import UUID, uuid4

from retryproof.core.errors import ConfigurationError, LeaseLost, StoreUnavailable
from retryproof.core.message import PARTITIONS, Conclusion, Failure, Message
from retryproof.publishers.base import (
    DELIVERED,
    Batch,
    Delivered,
    Failed,
    Outcome,
    Publisher,
    Untried,
    described,
)
from retryproof.publishers.function import FunctionPublisher
from retryproof.publishers.url import open_publisher
from retryproof.stores.sql.outbox import Stats, Taken
from retryproof.stores.sql.plan import Plan
from retryproof.transaction.outbox_database import Database, open_database

T = TypeVar("T")
MICROSECONDS = 1_000_000
MAX_BATCH = 1_000
SPREAD = 8
"""Partitions that a full batch comes from at least, where so many have messages: keys are published side by side."""
LONGEST_PAUSE = 5.0
"""Seconds between tries while the database gives no answer."""

log = logging.getLogger("retryproof.relay")


@dataclass(slots=True)
class Totals:
    """What a relay did. untried: claimed and not sent, since its chain failed, or the relay was to stop."""

    delivered: int = 0
    failed: int = 0
    dead: int = 0
    untried: int = 0

    @property
    def ended(self) -> int:
        """Messages that are no longer pending."""
        return self.delivered + self.dead

    def add(self, other: Totals) -> None:
        """Count another's as well."""
        self.delivered += other.delivered
        self.failed += other.failed
        self.dead += other.dead
        self.untried += other.untried


@dataclass(frozen=True, slots=True)
class RelayPolicy:
    """How a relay works. Times are seconds.

    batch: messages a claim. lease: how long what a dead relay held stays unpublished.
    max_attempts: failures, or deaths of the relay while it published the message alone, until dead letters.
    backoff, max_backoff: the longest pause after the first failure, doubled after each, and its limit; the pause is a
    random part of it. on_failure: "block" holds later messages of the key back, "pass" sends them.
    order: "key", or "strict": all messages in the order of commits, one relay at a time.
    poll, max_poll: the pause after nothing was found, doubled up to the limit.
    drain: how long a batch may go on once the relay is to stop. partitions: must be the database's number.
    """

    batch: int = 100
    lease: float = 15.0
    max_attempts: int = 8
    backoff: float = 1.0
    max_backoff: float = 300.0
    on_failure: Literal["block", "pass"] = "block"
    order: Literal["key", "strict"] = "key"
    poll: float = 0.02
    max_poll: float = 1.0
    drain: float = 10.0
    partitions: int = PARTITIONS

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        wrong = [
            name
            for name in ("batch", "lease", "max_attempts", "backoff", "max_backoff", "poll", "max_poll", "partitions")
            if not getattr(self, name) > 0
        ]
        if wrong or self.drain < 0 or self.batch > MAX_BATCH:
            raise ConfigurationError(
                f"{', '.join(wrong) or 'drain or batch'} is out of range; batch is at most {MAX_BATCH}"
            )
        if self.on_failure not in ("block", "pass") or self.order not in ("key", "strict"):
            raise ConfigurationError("on_failure= is 'block' or 'pass', order= is 'key' or 'strict'")
        if self.order == "strict" and self.on_failure == "pass":
            raise ConfigurationError("order='strict' cannot pass a message over; leave on_failure='block'")

    def delay(self, attempts: int) -> float:
        """Seconds to wait after so many failures: full jitter."""
        return random.uniform(0.0, min(self.max_backoff, self.backoff * 2.0 ** min(attempts - 1, 60)))


def conclude(
    messages: Sequence[Message], outcomes: Sequence[Outcome], policy: RelayPolicy
) -> tuple[Conclusion, Totals]:
    """What becomes of each message; only the first failure of a chain counts."""
    if all(outcome is DELIVERED for outcome in outcomes) and not any(message.parked for message in messages):
        return Conclusion(messages), Totals(len(messages))
    done: list[Message] = []
    dead: list[tuple[Message, int, str]] = []
    failed: list[Failure] = []
    closed: set[tuple[int, bytes]] = set()
    for message, outcome in zip(messages, outcomes, strict=True):
        attempts = message.attempts + 1
        match outcome:
            case Delivered():
                done.append(message)
            case Failed() if message.line in closed:
                pass
            case Failed(reason=reason, permanent=permanent) if permanent or attempts >= policy.max_attempts:
                dead.append((message, attempts, reason))
            case Failed(reason=reason, retry_after=retry_after):
                delay = max(policy.delay(attempts), retry_after or 0.0)
                failed.append(Failure(message, attempts, reason, round(delay * MICROSECONDS)))
                if policy.on_failure == "block":
                    closed.add(message.line)
            case Untried():
                pass
    ended = (*done, *(message for message, _, _ in dead), *(failure.message for failure in failed))
    lines = {message.line for message in ended if message.parked} - closed
    totals = Totals(len(done), len(failed), len(dead), len(messages) - len(done) - len(dead) - len(failed))
    return Conclusion(done, dead, failed, sorted(lines)), totals


class Relay:
    """Publishes what the outbox of a database holds.

    store: the database's URL. publisher: a Publisher, its URL, or a function of one message.
    Of one event loop; nothing is opened before `run` or `run_once`. Several may work on one database.
    """

    def __init__(
        self,
        store: str,
        publisher: Publisher | str | Callable[[Message], Any],
        *,
        policy: RelayPolicy | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.policy = policy or RelayPolicy()
        self.totals = Totals()
        self._url = store
        self._timeout = timeout
        self._publisher = _publisher(publisher)
        self._on_loop = inspect.iscoroutinefunction(self._publisher.publish)
        self._database: Database | None = None
        self._stopping = asyncio.Event()
        self._stop_at = float("inf")
        self._member: _Membership | None = None

    async def run(self) -> Totals:
        """Work until `stop` is called; what is on its way is finished first.

        A database that gives no answer is tried again. Raises ConfigurationError for one that must not be worked on.
        """
        pause = 0.0
        try:
            while not self._stopping.is_set():
                pause = await self._next_pause(pause)
                await self._idle(pause)
        finally:
            await self.aclose()
        return self.totals

    async def _next_pause(self, pause: float) -> float:
        """Do one batch; seconds to wait after it."""
        try:
            totals = await self.run_once()
        except StoreUnavailable as error:
            log.warning("the outbox's database gives no answer: %s", error)
            return min(LONGEST_PAUSE, max(0.1, 2 * pause)) * random.uniform(0.5, 1.0)
        except LeaseLost as error:
            log.warning("%s", error)
            self._member = None
            return 0.0
        return self._longer(pause) if totals is None else 0.0

    async def run_until_idle(self) -> Totals:
        """Work until nothing is due or `stop` is called; what waits for its next attempt stays."""
        try:
            while not self._stopping.is_set() and (await self.run_once()) is not None:
                pass
        finally:
            await self.aclose()
        return self.totals

    def stop(self) -> None:
        """Take no more messages; a batch that is on its way has `policy.drain` seconds to end. Safe in a handler."""
        self._stop_at = min(self._stop_at, monotonic() + self.policy.drain)
        self._stopping.set()

    async def run_once(self) -> Totals | None:
        """One batch, or None where there is nothing to be done.

        Raises LeaseLost where the lease was lost, StoreUnavailable, ConfigurationError.
        """
        member = await self._joined()
        await member.balance()
        taken = await member.claim()
        if not taken:
            return None
        outcomes = await self._publish(member, taken)
        conclusion, totals = conclude(taken, outcomes, self.policy)
        await member.finish(conclusion, all_done=len(conclusion.done) == len(taken))
        for message, attempts, reason in conclusion.dead:
            log.warning("dead letter %s (topic %s) after %d attempts: %s", message.id, message.topic, attempts, reason)
        self.totals.add(totals)
        return totals

    async def stats(self) -> Stats:
        """How the outbox stands."""
        database = self._opened()
        return await database.perform(database.plans.stats)

    async def aclose(self) -> None:
        """Give the partitions back, and close what was opened here."""
        member, self._member = self._member, None
        if member is not None:
            with contextlib.suppress(StoreUnavailable):
                await member.leave()
        closed = self._publisher.close()
        if inspect.isawaitable(closed):
            await closed
        database, self._database = self._database, None
        if database is not None:
            await database.aclose()

    # Inside

    def _opened(self) -> Database:
        if self._database is None:
            self._database = open_database(self._url, timeout=self._timeout)
        return self._database

    async def _joined(self) -> _Membership:
        if self._member is None:
            self._member = await _Membership.join(self._opened(), self.policy)
        return self._member

    def _longer(self, pause: float) -> float:
        return min(self.policy.max_poll, max(self.policy.poll, 2 * pause))

    async def _idle(self, seconds: float) -> None:
        if not seconds:
            return await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _publish(self, member: _Membership, messages: Sequence[Message]) -> Sequence[Outcome]:
        """Publish with the lease renewed meanwhile; what is too large, or killed its relay too often, is not sent."""
        limit = self._publisher.max_payload
        if not member.alone and (limit is None or max(len(message.payload) for message in messages) <= limit):
            return await self._send(member, messages)
        refused = [self._refusal(message, member.alone) for message in messages]
        left = [message for message, why in zip(messages, refused, strict=True) if why is None]
        published = iter(await self._send(member, left) if left else ())
        return [next(published) if why is None else why for why in refused]

    def _refusal(self, message: Message, alone: bool) -> Failed | None:
        limit = self._publisher.max_payload
        if limit is not None and len(message.payload) > limit:
            return Failed(
                f"the payload has {len(message.payload)} bytes, and the publisher takes {limit}", permanent=True
            )
        if alone and message.attempts >= self.policy.max_attempts:
            why = f"each of {message.attempts} attempts ended with the relay's death or a failure"
            return Failed(why, permanent=True)
        return None

    async def _send(self, member: _Membership, messages: Sequence[Message]) -> Sequence[Outcome]:
        if self.policy.order == "strict":
            messages = [replace(message, chain=b"") for message in messages]
        batch = Batch(messages, lambda: member.live() and monotonic() < self._stop_at)
        renewing = asyncio.create_task(member.keep())
        try:
            if self._on_loop:
                published: Any = await self._publisher.publish(batch)  # type: ignore[misc] # a coroutine, as was checked
            else:
                published = await asyncio.to_thread(self._publisher.publish, batch)
        except Exception as error:
            log.warning("publishing %d messages failed", len(messages), exc_info=True)
            published = [Failed(described(error)) for _ in messages]
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
        outcomes: Sequence[Outcome] = list(published)
        if len(outcomes) != len(messages):
            raise ConfigurationError(
                f"The publisher gave {len(outcomes)} outcomes for {len(messages)} messages; it must give one each."
            )
        return outcomes


def _publisher(given: Publisher | str | Callable[[Message], Any]) -> Publisher:
    if isinstance(given, str):
        return open_publisher(given)
    if hasattr(given, "publish"):
        return cast(Publisher, given)
    return FunctionPublisher(given)


_PLACE = attrgetter("xid", "sequence")


class _Membership:
    """One relay's time as a member: from joining to leaving, or to the loss of its lease."""

    def __init__(self, database: Database, policy: RelayPolicy, id: UUID, lease_end: float) -> None:
        self._database = database
        self._policy = policy
        self._id = id
        self._lease_end = lease_end
        self._lease = round(policy.lease * MICROSECONDS)
        self._strict = policy.order == "strict"
        self._balance_at = 0.0
        self._floors: dict[int, int] = {}
        """By partition, in the order in which they are asked."""
        self._ahead: dict[int, int] = {}
        """The floors once all of the batch on its way is done."""
        self._share = max(1, policy.batch // SPREAD)
        self._suspects = True
        self.alone = False
        """Whether the batch on its way is a message that a dead relay left."""

    @classmethod
    async def join(cls, database: Database, policy: RelayPolicy) -> _Membership:
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
        id, begun = uuid4(), monotonic()
        lease, strict = round(policy.lease * MICROSECONDS), policy.order == "strict"
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

    async def balance(self) -> None:
        """From time to time: bury dead relays, take or give up partitions."""
        if monotonic() < self._balance_at and self.live():
            return
        await self._database.perform(self._database.plans.bury)
        if not await self._fenced(lambda: self._database.plans.renew(self._id, self._lease)):
            raise self._lost()
        owned = await self._database.perform(lambda: self._database.plans.balance(self._id, self._strict))
        if owned is None:
            raise self._lost()
        if set(owned) != set(self._floors):
            log.info("partitions: %d", len(owned))
            self._floors = dict.fromkeys(owned, 0)
        self._suspects = True
        self._balance_at = monotonic() + min(1.0, self._policy.lease / 4) * random.uniform(0.8, 1.0)

    async def claim(self) -> Sequence[Message]:
        """A batch; of one, where that is to be tried alone."""
        if not self._floors:
            return []
        self.alone = self._suspects and not self.alone and not self._strict
        taken = await self._claim(alone=self.alone)
        if self.alone and not taken.messages:
            self.alone = False
            taken = await self._claim(alone=False)
        messages = sorted(taken.messages, key=_PLACE)
        self._ahead = {}
        if self._strict:
            self.alone = bool(messages) and messages[0].parked
            if messages:
                self._ahead = dict.fromkeys(self._floors, messages[-1].xid)
        elif not self.alone:
            self._follow(messages, taken.fence)
        return messages

    async def _claim(self, *, alone: bool) -> Taken:
        floors, share, batch = self._floors, min(self._share, self._policy.batch), self._policy.batch
        taken = await self._fenced(
            lambda: self._database.plans.claim(
                self._id,
                floors,
                batch=1 if alone else batch,
                share=1 if alone else share,
                lease=self._lease,
                alone=alone,
                strict=self._strict,
            )
        )
        if not taken.held:
            raise self._lost()
        self._suspects = taken.suspects
        return taken

    def _follow(self, messages: Sequence[Message], fence: int) -> None:
        """Where the next claim begins, and how much of each partition it takes."""
        found: dict[int, int] = {}
        for message in messages:
            partition = message.partition
            found[partition] = found.get(partition, 0) + 1
            if not message.parked:
                self._ahead[partition] = message.xid if message.xid < fence else fence
        if len(messages) >= self._policy.batch:
            if len(found) < SPREAD < len(self._floors):
                self._share = max(1, self._policy.batch // SPREAD, self._share // 2)
        elif found and max(found.values()) >= self._share:
            self._share = min(self._policy.batch, 2 * self._share)
        self._rotate(found)

    def _rotate(self, found: dict[int, int]) -> None:
        """Begin after the last partition that gave something."""
        order = list(self._floors)
        last = max((place for place, partition in enumerate(order) if partition in found), default=-1) + 1
        self._floors = {partition: self._floors[partition] for partition in (*order[last:], *order[:last])}

    async def finish(self, conclusion: Conclusion, *, all_done: bool) -> None:
        """End the batch; raises LeaseLost where another relay has it by now."""
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
        if all_done:
            self._floors.update(ahead)
        else:
            self._floors = dict.fromkeys(self._floors, 0)

    async def leave(self) -> None:
        """Give the partitions back."""
        await self._database.perform(lambda: self._database.plans.leave(self._id))

    async def _fenced(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan that extends the lease, and count it from before it was sent."""
        begun = monotonic()
        result = await self._database.perform(plan)
        self._lease_end = max(self._lease_end, begun + self._policy.lease) if self._lease_end else 0.0
        return result

    def _lost(self) -> LeaseLost:
        self._lease_end = 0.0
        return LeaseLost("This relay's lease was lost; another one publishes what it had again, with the same ids.")
