"""How a relay works, and what becomes of the messages that it tried: pure (T6).

A failure is one of five kinds, and COUNTS says towards what each counts. A message is given up when one of these is
full: its age since its own first failure, the answers about itself, the relays that died while they sent it alone. A
receiver that is out of reach says nothing about a message, so it only lets it age. The age ends below the day that
receivers remember ids for: what is sent later than that may take effect a second time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import PARTITIONS, UNCOUNTED, BatchResult, Failure, Message
from retryproof.core.record import microseconds
from retryproof.publishers.base import DELIVERED, Delivered, Failed, Outcome, Untried

MAX_BATCH = 1_000
_PARKED = attrgetter("parked")
REMEMBERED = 86_400.0
"""How long receivers are assumed to remember a message's id, in seconds; a later message is new to them."""
_POSITIVE = (
    *(
        "batch",
        "lease",
        "max_attempts",
        "max_deaths",
        "give_up_after",
        "backoff",
        "max_backoff",
        "poll",
        "max_poll",
        "patience",
        "timeout",
    ),
    "partitions",
)


@dataclass(frozen=True, slots=True)
class Counts:
    """The limits that a failure counts towards. at_once: it ends the message, whatever happened before."""

    at_once: bool = False
    age: bool = False
    answers: bool = False
    deaths: bool = False


COUNTS: Mapping[str, Counts] = {
    "refusal": Counts(at_once=True),
    "answer": Counts(age=True, answers=True),
    "unreachable": Counts(age=True),
    "death": Counts(age=True, deaths=True),  # alone; beside others it counts towards the age only
    "unsent": Counts(),
}
"""By kind of failure. A death is counted when the dead relay is removed, all others when a batch ends."""


@dataclass(slots=True)
class RelayTotals:
    """What a relay did. untried: claimed and not sent, since its queue failed or the relay had to stop."""

    delivered: int = 0
    failed: int = 0
    dead: int = 0
    untried: int = 0

    @property
    def ended(self) -> int:
        """Messages that are no longer pending."""
        return self.delivered + self.dead

    @property
    def any(self) -> bool:
        """Whether anything was done at all."""
        return bool(self.delivered or self.failed or self.dead or self.untried)

    def add(self, other: RelayTotals) -> None:
        """Add the numbers of another one."""
        self.delivered += other.delivered
        self.failed += other.failed
        self.dead += other.dead
        self.untried += other.untried


@dataclass(frozen=True, slots=True)
class RelayPolicy:
    """How a relay works. Times are seconds.

    batch: how many messages a claim takes. lease: how long the messages in flight of a dead relay wait.
    give_up_after: a message whose first failure is older than this becomes a dead letter; 20 hours, less than the day
        for which receivers remember ids.
    max_attempts: after this many answers about the message itself (4xx, 500, an exception of a function), it becomes a
        dead letter. max_deaths: after this many relays died while they sent it alone, it becomes a dead letter.
    backoff, max_backoff: the longest pause after the first failure, doubled after each failure, and its limit; the
        pause is a random part of it. With the defaults, max_attempts answers take about two hours.
    on_failure: "block" holds back later messages of the key, "pass" sends them.
    order: "key", or "strict": all messages in order, one relay at a time. A message whose transaction had committed
        when another was added is sent first.
    poll, max_poll: the pause after a poll that found nothing, doubled up to the limit.
    patience: how long a batch may keep other keys waiting. A slower message continues beside the next batches; the more
        messages do so, the shorter the relay waits for a batch.
    timeout: for one message, if messages are sent one at a time; after that the message has failed.
    listen: whether `Outbox.notify` wakes the relay, over a connection of its own. On PostgreSQL only.
    drain: how long a batch may continue when the relay has to stop. partitions: must be the number in the database.
    """

    batch: int = 100
    lease: float = 15.0
    give_up_after: float = 72_000.0
    max_attempts: int = 16
    max_deaths: int = 5
    backoff: float = 1.0
    max_backoff: float = 3_600.0
    on_failure: Literal["block", "pass"] = "block"
    order: Literal["key", "strict"] = "key"
    poll: float = 0.02
    max_poll: float = 1.0
    patience: float = 1.0
    timeout: float = 30.0
    listen: bool = True
    drain: float = 10.0
    partitions: int = PARTITIONS

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        wrong = [name for name in _POSITIVE if not getattr(self, name) > 0]
        if wrong or self.drain < 0 or self.batch > MAX_BATCH:
            raise ConfigurationError(
                f"{', '.join(wrong) or 'drain or batch'} is out of range; batch is at most {MAX_BATCH}"
            )
        if self.on_failure not in ("block", "pass") or self.order not in ("key", "strict"):
            raise ConfigurationError("on_failure= is 'block' or 'pass', order= is 'key' or 'strict'")
        if self.order == "strict" and self.on_failure == "pass":
            raise ConfigurationError("order='strict' cannot skip a failed message; leave on_failure='block'")

    def delay(self, attempts: int) -> float:
        """Seconds to wait after this many failures, with full jitter."""
        return random.uniform(0.0, min(self.max_backoff, self.backoff * 2.0 ** min(attempts - 1, 60)))

    def too_old(self, message: Message, now: int) -> str | None:
        """Why a message is too old to be sent again, or None; now: µs by the store's clock."""
        if message.failed_at is None or (age := (now - message.failed_at) / 1e6) < self.give_up_after:
            return None
        return f"given up {age / 3600:.1f} h after its first failure"

    def given_up(self, message: Message, failure: Failed, now: int) -> str | None:
        """Why a message is given up after this failure, or None."""
        counts = COUNTS[failure.counts_as]
        if counts.at_once or (counts.answers and message.answers + 1 >= self.max_attempts):
            return failure.reason
        why = self.too_old(message, now) if counts.age else None
        return why and f"{failure.reason} ({why})"


def conclude(
    messages: Sequence[Message],
    outcomes: Sequence[Outcome],
    policy: RelayPolicy,
    slow: Sequence[Message] = (),
    *,
    now: int,
) -> tuple[BatchResult, RelayTotals]:
    """The result for each message; only the first failure of a queue counts. slow: messages that are still being sent.

    now: µs by the store's clock.
    """
    if outcomes.count(DELIVERED) == len(outcomes) and not any(map(_PARKED, messages)):
        return BatchResult(messages, slow=slow), RelayTotals(len(messages))
    done: list[Message] = []
    dead: list[tuple[Message, int, str]] = []
    failed: list[Failure] = []
    closed: set[tuple[int, bytes]] = set()
    for message, outcome in zip(messages, outcomes, strict=True):
        match outcome:
            case Delivered():
                done.append(message)
            case Failed() if message.queue_id in closed:
                pass
            case Failed():
                why = policy.given_up(message, outcome, now)
                if why is not None:
                    dead.append((message, message.attempts + 1, why))
                    continue
                failed.append(_failure(message, outcome, policy))
                if policy.on_failure == "block" or failed[-1].answers == UNCOUNTED:
                    closed.add(message.queue_id)  # a message that was not sent has not failed, and is not skipped
            case Untried():
                pass
    ended = (*done, *(message for message, _, _ in dead), *(failure.message for failure in failed))
    lines = {message.queue_id for message in ended if message.parked} - closed - {message.queue_id for message in slow}
    counted = sum(failure.answers != UNCOUNTED for failure in failed)
    totals = RelayTotals(len(done), counted, len(dead), len(messages) - len(done) - len(dead) - counted)
    return BatchResult(done, dead, failed, sorted(lines), slow), totals


def _failure(message: Message, outcome: Failed, policy: RelayPolicy) -> Failure:
    """A failure after which the message is tried again."""
    counts = COUNTS[outcome.counts_as]
    if not counts.age:  # not sent: it waits for this time, and nothing is counted
        pause = microseconds(outcome.retry_after or policy.backoff)
        return Failure(message, message.attempts, outcome.reason, pause, UNCOUNTED)
    attempts, answers = message.attempts + 1, message.answers + counts.answers
    delay = max(policy.delay(attempts), outcome.retry_after or 0.0)
    return Failure(message, attempts, outcome.reason, microseconds(delay), answers)
