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
import logging
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from math import inf
from time import monotonic

from retryproof.core.errors import ConfigurationError, LeaseLost, StoreUnavailable
from retryproof.core.message import Message
from retryproof.core.record import microseconds
from retryproof.outbox.breaker import FIRST_PAUSE, PROBES, Breaker
from retryproof.outbox.in_flight import InFlight
from retryproof.outbox.membership import Membership
from retryproof.outbox.policy import REMEMBERED, RelayPolicy, RelayTotals, conclude
from retryproof.outbox.routes import EVERYTHING, Destination, Routes
from retryproof.outbox.wakeups import Wakeups
from retryproof.publishers.base import DELIVERED, UNTRIED, Failed, Outcome, Publisher
from retryproof.sql.database import Database, open_database
from retryproof.sql.outbox import Stats

LONGEST_PAUSE = 5.0
"""Seconds between tries while the database gives no answer."""

UNROUTED = 30.0
"""Seconds until a message without a route is looked at again."""
SAY_AGAIN = 60.0
"""Seconds after which what is wrong still is said again."""

log = logging.getLogger("retryproof.relay")


class Relay:
    """Publishes what the outbox of a database holds.

    store: the database's URL. publisher: a Publisher, its URL, or a function of one message. routes: the same by topic,
    for those that go elsewhere; without a publisher, messages of other topics wait, and the log says so.
    Of one event loop; nothing is opened before `run` or `run_once`. Several may work on one database; where they have
    other publishers or routes, the later ones stand by until the earlier ones have left.
    """

    def __init__(
        self,
        store: str,
        publisher: Destination | None = None,
        *,
        routes: Mapping[str, Destination] | None = None,
        policy: RelayPolicy | None = None,
        timeout: float = 5.0,
    ) -> None:
        self.policy = policy or RelayPolicy()
        self.totals = RelayTotals()
        self._url = store
        self._timeout = timeout
        self._routes = Routes({**({} if publisher is None else {EVERYTHING: publisher}), **(routes or {})})
        self._only = self._routes.one
        self._woken = asyncio.Event()
        self._in_flight = InFlight(self._routes if self._only is None else self._only, self._woken.set)
        self._breakers: dict[int, Breaker] = {}
        self._down: dict[int, Breaker] = {}
        self._unrouted: dict[str, float] = {}
        self._standing_by_since: float | None = None
        self._say_again_at = 0.0
        self._database: Database | None = None
        self._stopping = False
        self._stop_at = inf
        self._member: Membership | None = None
        self._looked_at = 0.0
        if self.policy.give_up_after > REMEMBERED:
            log.warning(
                "give_up_after= is %.0f h, and receivers remember ids for a day as a rule: what is sent again later "
                "may take effect a second time",
                self.policy.give_up_after / 3600,
            )

    async def run(self) -> RelayTotals:
        """Work until `stop` is called; what is on its way is finished first.

        A database that gives no answer is tried again. Raises ConfigurationError for one that must not be worked on.
        """
        pause = 0.0
        try:
            async with self._listening():
                while not self._stopping:
                    pause = await self._next_pause(pause)
                    await self._idle(pause)
        except asyncio.CancelledError:
            self._stop_at = 0.0  # nothing is waited for
            raise
        finally:
            await self.aclose()
        return self.totals

    def _listening(self) -> AbstractAsyncContextManager[None]:
        """Being woken by notifications meanwhile, where there are any and it is wanted."""
        database = self._opened()
        if not (self.policy.listen and database.listens):
            return nullcontext()
        return Wakeups(database, self._woken.set).heard()

    async def _next_pause(self, pause: float) -> float:
        """Do one batch; seconds to wait after it."""
        try:
            totals = await self.run_once()
        except StoreUnavailable as error:
            log.warning("the outbox's database gives no answer: %s", error)
            return min(LONGEST_PAUSE, max(0.1, 2 * pause)) * random.uniform(0.5, 1.0)
        except LeaseLost as error:
            log.warning("%s", error)
            return 0.0
        return self._longer(pause) if totals is None else 0.0

    async def run_until_idle(self) -> RelayTotals:
        """Work until nothing is due or `stop` is called; what waits for its next attempt stays."""
        try:
            while not self._stopping:
                if await self.run_once() is None:
                    if not self._in_flight:
                        break
                    await self._wait(self.policy.poll)
        finally:
            await self.aclose()
        return self.totals

    def stop(self) -> None:
        """Take no more messages; a batch that is on its way has `policy.drain` seconds to end. Safe in a handler."""
        self._stop_at = min(self._stop_at, monotonic() + self.policy.drain)
        self._stopping = True
        self._woken.set()

    async def run_once(self) -> RelayTotals | None:
        """One batch, or None where there is nothing to be done.

        Raises LeaseLost where the lease was lost, StoreUnavailable, ConfigurationError.
        """
        self._woken.clear()
        self._looked_at = monotonic()
        member = await self._member_or_not()
        if member is None:
            return None
        try:
            return await self._pass(member)
        except LeaseLost:
            await self._in_flight.abandon()
            self._member = None
            raise

    async def _pass(self, member: Membership) -> RelayTotals | None:
        """End what landed, then claim, publish and end a batch."""
        totals = await self._finish(member)
        await member.balance(self._in_flight.on_their_way())
        if self._in_flight.full:
            await self._until_landed(member)
            totals.add(await self._finish(member))
        taken = await self._claimed(member)
        if taken:
            refused = await self._publish(member, taken)
            totals.add(await self._finish(member, refused, batch=True))
        return totals if taken or totals.any or member.set_aside else None

    async def _claimed(self, member: Membership) -> Sequence[Message]:
        """A batch; none once the relay is to stop, or while all that it sends to is down, and then a few."""
        if self._stopping and self._in_flight:
            return []
        most = None
        if self._down and len(self._down) == len(self._routes.publishers):
            if all(breaker.closed_for for breaker in self._down.values()):
                member.set_aside = False  # nothing is looked at until then
                return []
            most = PROBES
        return await member.claim(self._in_flight.on_their_way(), most=most)

    def _learn(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Note which destinations are out of reach, and which are not any more."""
        if not self._down and all(outcome is DELIVERED for outcome in outcomes):
            return
        by_destination: dict[int, list[Outcome]] = {}
        for message, outcome in zip(messages, outcomes, strict=True):
            by_destination.setdefault(id(self._publisher_of(message)), []).append(outcome)
        for destination, theirs in by_destination.items():
            breaker = self._breakers.setdefault(destination, Breaker())
            breaker.note(theirs)
            if breaker.down:
                self._down[destination] = breaker
            else:
                self._down.pop(destination, None)

    def _publisher_of(self, message: Message) -> Publisher | None:
        return self._routes.of(message.topic) if self._only is None else self._only

    async def _finish(
        self, member: Membership, refused: Sequence[tuple[Message, Outcome]] = (), *, batch: bool = False
    ) -> RelayTotals:
        """Tell the database what became of messages: of a batch, or of what went on beside others."""
        messages, outcomes = self._in_flight.landed()
        if not (messages or refused or self._in_flight.unheld):
            return RelayTotals()
        self._learn(messages, outcomes)
        if refused:
            pairs = sorted([*refused, *zip(messages, outcomes, strict=True)], key=_number)
            messages, outcomes = [message for message, _ in pairs], [outcome for _, outcome in pairs]
        conclusion, totals = conclude(messages, outcomes, self.policy, self._in_flight.slow(), now=member.now())
        all_done = len(conclusion.done) == len(messages)
        await member.finish(conclusion, all_done=all_done if batch else None)
        self._in_flight.noted()
        for message, attempts, reason in conclusion.dead:
            log.warning("dead letter %s (topic %s) after %d attempts: %s", message.id, message.topic, attempts, reason)
        self.totals.add(totals)
        return totals

    async def stats(self) -> Stats:
        """How the outbox stands."""
        database = self._opened()
        return await database.perform(database.plans.stats)

    async def aclose(self) -> None:
        """Give the partitions back, and close what was opened here; what is being sent has until `policy.drain`."""
        member, self._member = self._member, None
        if member is not None:
            with contextlib.suppress(StoreUnavailable, LeaseLost, ConfigurationError):
                await self._drained(member)
                await member.leave()
        await self._in_flight.abandon()
        await self._routes.close()
        database, self._database = self._database, None
        if database is not None:
            await database.aclose()

    # Inside

    def _opened(self) -> Database:
        if self._database is None:
            self._database = open_database(self._url, timeout=self._timeout)
        return self._database

    @property
    def standing_by(self) -> bool:
        """Whether relays with other routes were at work at the last look, so that this one does nothing."""
        return self._standing_by_since is not None

    async def _joined(self) -> Membership:
        """This relay's membership; raises ConfigurationError where it has to stand by."""
        member = await self._member_or_not()
        if member is None:
            raise ConfigurationError("Relays with other routes are at work on this outbox.")
        return member

    async def _member_or_not(self) -> Membership | None:
        """This relay's membership; None while relays with other routes are at work."""
        if self._member is None:
            self._member = await Membership.join(
                self._opened(), self.policy, self._routes.digest, again=self.standing_by
            )
            self._tell_of_standing_by()
        return self._member

    def _tell_of_standing_by(self) -> None:
        """Say that this relay stands by, at once and each minute, and that it does so no more."""
        now, since = monotonic(), self._standing_by_since
        if self._member is not None:
            if since is not None:
                log.warning("the relays with other routes have left; this one works from now on")
            self._standing_by_since = None
            return
        if since is None:
            self._standing_by_since = since = self._say_again_at = now
        if now >= self._say_again_at:
            self._say_again_at = now + SAY_AGAIN
            log.warning(
                "standing by for %.0f s: relays with other routes are at work on this outbox. This one takes over when "
                "they have left; two that are to work beside each other need the same destinations",
                now - since,
            )

    def _longer(self, pause: float) -> float:
        return min(self.policy.max_poll, max(self.policy.poll, 2 * pause))

    async def _idle(self, seconds: float) -> None:
        """Wait, at most so long, until something may be there to do; the lease is kept meanwhile."""
        if not seconds:
            return await asyncio.sleep(0)
        until = monotonic() + seconds
        while not self._stopping and (left := until - monotonic()) > 0:
            beat = self._member.heartbeat if self._member else left
            if await self._wait(min(left, beat)):
                break
            if left > beat and await self._moved():
                break
        if not self._stopping and not self._in_flight.any_landed:  # however many wake it, it looks once in so long
            await asyncio.sleep(self._looked_at + self.policy.poll - monotonic())

    async def _wait(self, seconds: float) -> bool:
        """Wait until woken: by `stop`, by a notification, by what landed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        return self._woken.is_set()

    async def _moved(self) -> bool:
        """Keep the lease of an idle relay, and look after the others'; whether there are new partitions to look at."""
        try:
            return self._member is not None and await self._member.balance(self._in_flight.on_their_way())
        except (StoreUnavailable, LeaseLost):
            return True  # the next look at the outbox says the same, and is where it is dealt with

    async def _until_landed(self, member: Membership, until: float = inf) -> None:
        """Wait until something landed that the database does not know of."""
        async with self._kept(member):
            while monotonic() < until and not self._in_flight.any_landed:
                self._woken.clear()
                if self._stopping and until == inf:
                    return
                await self._wait(min(member.heartbeat, max(0.0, until - monotonic())))

    async def _drained(self, member: Membership) -> None:
        """Wait for what is being sent, as long as may be, and note what became of it."""
        until = min(self._stop_at, monotonic() + self.policy.drain)
        self._in_flight.close()
        while self._in_flight:
            await self._until_landed(member, until)
            await self._finish(member)
            if monotonic() >= until:
                return

    @asynccontextmanager
    async def _kept(self, member: Membership) -> AsyncIterator[None]:
        """The lease is renewed meanwhile."""
        renewing = asyncio.create_task(member.keep())
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing

    async def _publish(self, member: Membership, messages: Sequence[Message]) -> list[tuple[Message, Outcome]]:
        """Publish; what is not to be sent, and what waits behind that, is given back with the reason."""
        tried = [message for message in messages if message.failed_at is not None]
        limited = self._only is None or self._only.max_payload is not None or bool(self._down)
        if not (tried or limited):
            await self._send(member, messages)
            return []
        refused: list[tuple[Message, Outcome]] = []
        left: list[Message] = []
        waiting: set[tuple[int, bytes]] = set()
        for message in messages:
            why: Outcome | None = UNTRIED if self._line(message) in waiting else self._refusal(message, member)
            if why is None:
                left.append(message)
                continue
            refused.append((message, why))
            if not (isinstance(why, Failed) and why.permanent):
                waiting.add(self._line(message))
        if left:
            await self._send(member, left)
        return refused

    def _line(self, message: Message) -> tuple[int, bytes]:
        """What waits while an earlier one does: its queue, or everything where the order is strict."""
        return (0, b"") if self.policy.order == "strict" else message.queue_id

    def _refusal(self, message: Message, member: Membership) -> Failed | None:
        """Why a message is not sent, or None."""
        publisher = self._publisher_of(message)
        if publisher is None:
            self._tell_of_unrouted(message.topic)
            pause = min(UNROUTED, self.policy.max_backoff)
            return Failed(f"no route for the topic {message.topic!r}", retry_after=pause, kind="unsent")
        limit = publisher.max_payload
        if limit is not None and len(message.payload) > limit:
            return Failed(
                f"the payload has {len(message.payload)} bytes, and the publisher takes {limit}", permanent=True
            )
        if message.deaths >= self.policy.max_deaths:
            return Failed(f"each of {message.deaths} attempts alone ended with the relay's death", permanent=True)
        if (too_old := self.policy.too_old(message, member.now())) is not None:
            return Failed(too_old, permanent=True)
        breaker = self._down.get(id(publisher))
        if breaker is not None and not member.alone and not breaker.admits(fresh=message.failed_at is None):
            pause = breaker.closed_for or FIRST_PAUSE
            return Failed("its destination is out of reach", retry_after=pause, kind="unsent")
        self._warn_of_late(message, member.now())
        return None

    def _warn_of_late(self, message: Message, now: int) -> None:
        """Say that a message is sent again after receivers forgot that they had it."""
        if message.failed_at is not None and now - message.failed_at > microseconds(REMEMBERED):
            log.warning(
                "sending %s (topic %s) again more than a day after its first failure: where that had arrived after "
                "all, its receiver may not remember, and it takes effect a second time",
                message.id,
                message.topic,
            )

    def _tell_of_unrouted(self, topic: str) -> None:
        """Say it at once and each minute."""
        if (now := monotonic()) >= self._unrouted.get(topic, 0.0):
            self._unrouted[topic] = now + SAY_AGAIN
            log.error(
                "no route for the topic %r: its messages, and later ones of their keys, wait until a relay has one "
                "(--to %s=URL)",
                topic,
                topic,
            )

    async def _send(self, member: Membership, messages: Sequence[Message]) -> None:
        """Send a batch; one that others must not overtake, or be suspected with, for as long as it takes."""
        strict = self.policy.order == "strict"
        last = member.alone and messages[0].deaths + 1 >= self.policy.max_deaths

        def live() -> bool:
            return member.live() and monotonic() < self._stop_at

        if not await self._in_flight.begin(messages, live, self.policy.timeout, as_one_queue=strict):
            async with self._kept(member):
                await self._in_flight.go_on(
                    inf if strict or last else self.policy.patience, lambda: monotonic() >= self._stop_at
                )


def _number(pair: tuple[Message, Outcome]) -> int:
    return pair[0].sequence
