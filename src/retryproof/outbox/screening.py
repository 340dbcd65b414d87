"""Which messages of a claimed batch are sent, and why the others are not (T6).

A message waits while its topic has no route, while its destination is out of reach, or after a waiting message of its
key. It is given up if it is too large for its publisher, if it is too old, or if its attempts alone ended with the
relays' deaths. A relay keeps in memory what it knows about its destinations, and learns from each batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import monotonic

from retryproof.core.message import Message
from retryproof.core.record import microseconds
from retryproof.outbox.breaker import FIRST_PAUSE, PROBES, Breaker
from retryproof.outbox.policy import REMEMBERED, RelayPolicy
from retryproof.outbox.routes import Routes
from retryproof.publishers.base import DELIVERED, UNTRIED, Failed, Outcome, Publisher

UNROUTED = 30.0
"""Seconds until a message without a route is checked again."""
SAY_AGAIN = 60.0
"""Seconds after which a persistent problem is logged again."""


log = logging.getLogger("retryproof.relay")


class Screening:
    """A relay's destinations and limits. down: breakers of the publishers that are out of reach, by their id()."""

    def __init__(self, routes: Routes, policy: RelayPolicy) -> None:
        self._routes = routes
        self._only = routes.one
        self._policy = policy
        self._breakers: dict[int, Breaker] = {}
        self.down: dict[int, Breaker] = {}
        self._unrouted: dict[str, float] = {}

    def most(self) -> int | None:
        """How many messages to claim: 0 while every destination is out of reach, then a few; None for a full batch."""
        if not self.down or len(self.down) < len(self._routes.publishers):
            return None
        return 0 if all(breaker.closed_for for breaker in self.down.values()) else PROBES

    def learn(self, messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
        """Note which destinations are out of reach, and which are not any more."""
        if not self.down and outcomes.count(DELIVERED) == len(outcomes):
            return
        by_destination: dict[int, list[Outcome]] = {}
        for message, outcome in zip(messages, outcomes, strict=True):
            by_destination.setdefault(id(self._publisher_of(message)), []).append(outcome)
        for destination, theirs in by_destination.items():
            breaker = self._breakers.setdefault(destination, Breaker())
            breaker.note(theirs)
            if breaker.down:
                self.down[destination] = breaker
            else:
                self.down.pop(destination, None)

    def screen(
        self, messages: Sequence[Message], *, now: int, alone: bool
    ) -> tuple[Sequence[Message], list[tuple[Message, Outcome]]]:
        """The messages to send, and the others, each with what becomes of it.

        now: µs by the store's clock. alone: whether this is a message that a dead relay left, which is always tried.
        """
        limited = self._only is None or self._only.max_payload is not None or bool(self.down)
        if not limited and all(message.failed_at is None for message in messages):
            return messages, []
        sent: list[Message] = []
        refused: list[tuple[Message, Outcome]] = []
        waiting: set[tuple[int, bytes]] = set()
        for message in messages:
            behind = (self._policy.order == "strict" and bool(waiting)) or message.queue_id in waiting
            why: Outcome | None = UNTRIED if behind else self._refusal(message, now, alone)
            if why is None:
                sent.append(message)
                continue
            refused.append((message, why))
            if not (isinstance(why, Failed) and why.permanent):
                waiting.add(message.queue_id)
        return sent, refused

    def _publisher_of(self, message: Message) -> Publisher | None:
        return self._routes.of(message.topic) if self._only is None else self._only

    def _refusal(self, message: Message, now: int, alone: bool) -> Failed | None:
        """Why a message is not sent, or None."""
        publisher = self._publisher_of(message)
        if publisher is None:
            self._tell_of_unrouted(message.topic)
            pause = min(UNROUTED, self._policy.max_backoff)
            return Failed(f"no route for the topic {message.topic!r}", retry_after=pause, kind="unsent")
        limit = publisher.max_payload
        if limit is not None and len(message.payload) > limit:
            return Failed(
                f"the payload has {len(message.payload)} bytes, and the publisher takes {limit}", permanent=True
            )
        if message.deaths >= self._policy.max_deaths:
            return Failed(f"each of {message.deaths} attempts alone ended with the relay's death", permanent=True)
        if (too_old := self._policy.too_old(message, now)) is not None:
            return Failed(too_old, permanent=True)
        breaker = self.down.get(id(publisher))
        if breaker is not None and not alone and not breaker.admits(fresh=message.failed_at is None):
            pause = breaker.closed_for or FIRST_PAUSE
            return Failed("its destination is out of reach", retry_after=pause, kind="unsent")
        _warn_of_late(message, now)
        return None

    def _tell_of_unrouted(self, topic: str) -> None:
        """Log it at once, and then each minute."""
        if (now := monotonic()) >= self._unrouted.get(topic, 0.0):
            self._unrouted[topic] = now + SAY_AGAIN
            log.error(
                "no route for the topic %r: its messages, and later ones of their keys, wait until a relay has one "
                "(--to %s=URL)",
                topic,
                topic,
            )


def _warn_of_late(message: Message, now: int) -> None:
    """Say that a message is sent again after receivers may have forgotten that they had it."""
    if message.failed_at is not None and now - message.failed_at > microseconds(REMEMBERED):
        log.warning(
            "sending %s (topic %s) again more than a day after its first failure: where that had arrived after "
            "all, its receiver may not remember, and it takes effect a second time",
            message.id,
            message.topic,
        )
