"""How a relay works, and what becomes of the messages that it tried: pure (T6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import PARTITIONS, Conclusion, Failure, Message
from retryproof.core.record import microseconds
from retryproof.publishers.base import DELIVERED, Delivered, Failed, Outcome, Untried

MAX_BATCH = 1_000
_POSITIVE = (
    *("batch", "lease", "max_attempts", "backoff", "max_backoff", "poll", "max_poll", "patience", "timeout"),
    "partitions",
)


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

    @property
    def any(self) -> bool:
        """Whether anything was done at all."""
        return bool(self.delivered or self.failed or self.dead or self.untried)

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
    order: "key", or "strict": all messages, one relay at a time. The one goes first whose transaction had committed
    when the other was added.
    poll, max_poll: the pause after nothing was found, doubled up to the limit.
    patience: how long a batch may keep other keys waiting; what takes longer goes on beside the next batches, which
    are waited for less the more goes on.
    timeout: for one message, where messages are sent one at a time; then it has failed.
    listen: whether to be woken by `Outbox.notify`, over a connection of its own. On PostgreSQL only.
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
    patience: float = 1.0
    timeout: float = 30.0
    listen: bool = True
    drain: float = 10.0
    partitions: int = PARTITIONS

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        wrong = [name for name in _POSITIVE if not getattr(self, name) > 0]
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
    messages: Sequence[Message], outcomes: Sequence[Outcome], policy: RelayPolicy, slow: Sequence[Message] = ()
) -> tuple[Conclusion, Totals]:
    """What becomes of each message; only the first failure of a chain counts. slow: those that are sent still."""
    if all(outcome is DELIVERED for outcome in outcomes) and not any(message.parked for message in messages):
        return Conclusion(messages, slow=slow), Totals(len(messages))
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
                failed.append(Failure(message, attempts, reason, microseconds(delay)))
                if policy.on_failure == "block":
                    closed.add(message.line)
            case Untried():
                pass
    ended = (*done, *(message for message, _, _ in dead), *(failure.message for failure in failed))
    lines = {message.line for message in ended if message.parked} - closed - {message.line for message in slow}
    totals = Totals(len(done), len(failed), len(dead), len(messages) - len(done) - len(dead) - len(failed))
    return Conclusion(done, dead, failed, sorted(lines), slow), totals
