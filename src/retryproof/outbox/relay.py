"""The relay: claims messages of an outbox, publishes them outside any transaction, deletes delivered ones (T6).

    join → balance partitions → claim a batch → send it → finish it → balance → …

A claim and a finish are one transaction each. Both are fenced by the relay's own row. If a relay dies, its lease ends,
and another relay buries it. Then the messages that it had in flight are sent again, with the same ids, one at a time.
So a message that kills its relay is found, and only that one (C15). If a relay was suspended past its lease, it stops
between two messages, and its finish changes nothing.
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
from retryproof.outbox.in_flight import InFlight
from retryproof.outbox.membership import Membership
from retryproof.outbox.policy import REMEMBERED, RelayPolicy, RelayTotals, conclude
from retryproof.outbox.routes import EVERYTHING, Destination, Routes
from retryproof.outbox.screening import SAY_AGAIN, Screening
from retryproof.outbox.wakeups import Wakeups
from retryproof.publishers.base import Outcome
from retryproof.sql.database import OwnDatabase, open_database
from retryproof.sql.outbox import Stats

LONGEST_PAUSE = 5.0
"""Seconds between attempts while the database gives no answer."""

log = logging.getLogger("retryproof.relay")


class Relay:
    """Publishes the messages of an outbox.

    store: the database's URL. publisher: a Publisher, its URL, or a function of one message. routes: publishers of
    topics that go elsewhere. Without a publisher, messages of other topics wait, and the log says so.
    A relay belongs to one event loop, and opens nothing before `run` or `run_once`. Several may work on one database.
    If a later one has other publishers or routes, it stands by until the earlier ones have left.
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
        self._screening = Screening(self._routes, self.policy)
        self._woken = asyncio.Event()
        only = self._routes.one
        self._in_flight = InFlight(self._routes if only is None else only, self._woken.set)
        self._standing_by_since: float | None = None
        self._say_again_at = 0.0
        self._database: OwnDatabase | None = None
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
        """Work until `stop` is called; then finish the messages in flight.

        A database that gives no answer is tried again. Raises ConfigurationError for a database that it must not use.
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
        """Listen to notifications meanwhile, if the database has them and the policy says so."""
        database = self._opened()
        if not (self.policy.listen and database.listens):
            return nullcontext()
        return Wakeups(database, self._woken.set).heard()

    async def _next_pause(self, pause: float) -> float:
        """Do one batch; return how many seconds to wait after it."""
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
        """Work until nothing is due or `stop` is called; messages that wait for their next attempt stay."""
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
        """Take no more messages; a batch in flight has `policy.drain` seconds to end. Safe in a signal handler."""
        self._stop_at = min(self._stop_at, monotonic() + self.policy.drain)
        self._stopping = True
        self._woken.set()

    async def run_once(self) -> RelayTotals | None:
        """Do one batch; None if there is nothing to do.

        Raises LeaseLost if the lease was lost, StoreUnavailable, ConfigurationError.
        """
        self._woken.clear()
        self._looked_at = monotonic()
        member = await self._membership()
        if member is None:
            return None
        try:
            return await self._claim_send_finish(member)
        except LeaseLost:
            await self._in_flight.abandon()
            self._member = None
            raise

    async def _claim_send_finish(self, member: Membership) -> RelayTotals | None:
        """Record messages of earlier batches that have ended; then claim a batch, send it, and finish it."""
        totals = await self._finish(member)
        await member.balance(self._in_flight.messages())
        if self._in_flight.full:
            await self._until_any_ended(member)
            totals.add(await self._finish(member))
        claimed = await self._claim(member)
        if claimed:
            refused = await self._send(member, claimed)
            totals.add(await self._finish(member, refused, batch=True))
        return totals if claimed or totals.any or member.set_aside else None

    async def _claim(self, member: Membership) -> Sequence[Message]:
        """A batch; empty if the relay has to stop, or while all its destinations are out of reach."""
        if self._stopping and self._in_flight:
            return []
        most = self._screening.most()
        if most == 0:
            member.set_aside = False  # nothing is looked at until then
            return []
        return await member.claim(self._in_flight.messages(), most=most)

    async def _send(self, member: Membership, claimed: Sequence[Message]) -> list[tuple[Message, Outcome]]:
        """Send the messages that may be sent, and wait as the policy says; return the others with their outcomes.

        In strict order, nothing may overtake a batch. A message that is tried alone for the last time must have nothing
        beside it. In both cases the relay waits until the end.
        """
        messages, refused = self._screening.screen(claimed, now=member.now(), alone=member.alone)
        if not messages:
            return refused
        strict = self.policy.order == "strict"
        last = member.alone and messages[0].deaths + 1 >= self.policy.max_deaths

        def live() -> bool:
            return member.live() and monotonic() < self._stop_at

        if not await self._in_flight.begin(messages, live, self.policy.timeout, as_one_queue=strict):
            async with self._renewed(member):
                await self._in_flight.wait(
                    inf if strict or last else self.policy.patience, over=lambda: monotonic() >= self._stop_at
                )
        return refused

    async def _finish(
        self, member: Membership, refused: Sequence[tuple[Message, Outcome]] = (), *, batch: bool = False
    ) -> RelayTotals:
        """Record the outcomes of messages: of a batch, or of messages that continued beside later batches."""
        messages, outcomes = self._in_flight.ended()
        if not (messages or refused or self._in_flight.unrecorded):
            return RelayTotals()
        self._screening.learn(messages, outcomes)
        if refused:
            pairs = sorted([*refused, *zip(messages, outcomes, strict=True)], key=_number)
            messages, outcomes = [message for message, _ in pairs], [outcome for _, outcome in pairs]
        result, totals = conclude(messages, outcomes, self.policy, self._in_flight.slow(), now=member.now())
        all_done = len(result.done) == len(messages)
        await member.finish(result, all_done=all_done if batch else None)
        self._in_flight.recorded()
        for message, attempts, reason in result.dead:
            log.warning("dead letter %s (topic %s) after %d attempts: %s", message.id, message.topic, attempts, reason)
        self.totals.add(totals)
        return totals

    async def stats(self) -> Stats:
        """The numbers of the outbox."""
        database = self._opened()
        return await database.perform(database.plans.stats)

    async def aclose(self) -> None:
        """Give the partitions back and close connections; messages that are being sent have until `policy.drain`."""
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

    def _opened(self) -> OwnDatabase:
        if self._database is None:
            self._database = open_database(self._url, timeout=self._timeout)
        return self._database

    @property
    def standing_by(self) -> bool:
        """Whether this relay does nothing, because relays with other routes were working at the last check."""
        return self._standing_by_since is not None

    async def _joined(self) -> Membership:
        """This relay's membership; raises ConfigurationError if it has to stand by."""
        member = await self._membership()
        if member is None:
            raise ConfigurationError("Relays with other routes are at work on this outbox.")
        return member

    async def _membership(self) -> Membership | None:
        """This relay's membership; None while relays with other routes are working."""
        if self._member is None:
            self._member = await Membership.join(
                self._opened(), self.policy, self._routes.digest, again=self.standing_by
            )
            self._tell_of_standing_by()
        return self._member

    def _tell_of_standing_by(self) -> None:
        """Log that this relay stands by, at once and each minute, and when it stops standing by."""
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
        """Wait at most this long until there may be something to do; the lease is renewed meanwhile."""
        if not seconds:
            return await asyncio.sleep(0)
        until = monotonic() + seconds
        while not self._stopping and (left := until - monotonic()) > 0:
            beat = self._member.heartbeat if self._member else left
            if await self._wait(min(left, beat)):
                break
            if left > beat and await self._has_new_partitions():
                break
        if not self._stopping and not self._in_flight.any_ended:  # it polls at most once in this time
            await asyncio.sleep(self._looked_at + self.policy.poll - monotonic())

    async def _wait(self, seconds: float) -> bool:
        """Wait until `stop`, a notification, or the end of a message wakes the relay."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        return self._woken.is_set()

    async def _has_new_partitions(self) -> bool:
        """Renew an idle relay's lease, and check the others'; return whether this relay has new partitions."""
        try:
            return self._member is not None and await self._member.balance(self._in_flight.messages())
        except (StoreUnavailable, LeaseLost):
            return True  # the next claim raises the same, and handles it

    async def _until_any_ended(self, member: Membership, until: float = inf) -> None:
        """Wait until a message has ended whose outcome is not recorded yet."""
        async with self._renewed(member):
            while monotonic() < until and not self._in_flight.any_ended:
                self._woken.clear()
                if self._stopping and until == inf:
                    return
                await self._wait(min(member.heartbeat, max(0.0, until - monotonic())))

    async def _drained(self, member: Membership) -> None:
        """Wait for the messages in flight, as long as the policy allows, and record their outcomes."""
        until = min(self._stop_at, monotonic() + self.policy.drain)
        self._in_flight.close()
        while self._in_flight:
            await self._until_any_ended(member, until)
            await self._finish(member)
            if monotonic() >= until:
                return

    @asynccontextmanager
    async def _renewed(self, member: Membership) -> AsyncIterator[None]:
        """Renew the lease inside the block."""
        renewing = asyncio.create_task(member.keep())
        try:
            yield
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing


def _number(pair: tuple[Message, Outcome]) -> int:
    return pair[0].sequence
