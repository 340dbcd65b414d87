"""The plans of an outbox; each dialect implements them (T5 to T7).

A relay is fenced by its own row: each of its statements locks the row, and changes nothing if the row is gone. A relay
that finds another one's lease over removes the row, frees the partitions and marks the messages in flight, all in one
step. A relay gets a new id each time it joins, so a relay that was suspended cannot come back with its old id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias
from uuid import UUID

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import BatchResult, Message
from retryproof.sql.plan import Plan, Row, Straight

HELD = (1 << 63) - 1
"""The due time of a queue whose first message is being sent: never, until its relay records the outcome or dies."""


@dataclass(frozen=True, slots=True)
class ClaimedBatch:
    """The result of a claim.

    held: whether the relay is still one. suspects: whether there are messages to be tried alone.
    waiting: the partition of each message that was found, and parked, since its queue is held back.
    low: where partitions were begun at the most, below their floors, or None. open: transactions that the claim's
    snapshot lists as open, and those asked after that are. unlisted: whether others may have had their ids by then.
    own: the claim's id; whoever has a higher one got it later. server: tells one start of one server from others.
    """

    held: bool
    suspects: bool = False
    messages: Sequence[Message] = ()
    waiting: Sequence[int] = ()
    low: int | None = None
    open: Sequence[int] = ()
    unlisted: bool = False
    own: int = 0
    server: int = 0


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """The state of an outbox in its database.

    foreign: why its transaction ids are not this server's, or "". unsure: why that may have gone unnoticed, or "".
    disordered: why its numbers do not order messages, and the SQL that mends it. unnumbered: as unsure, of numbers.
    """

    partitions: int
    foreign: str = ""
    unsure: str = ""
    disordered: tuple[str, str] | None = None
    unnumbered: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """The numbers of an outbox. Ages are seconds.

    pending: messages that are visible, parked among them. blocked: queues that are held back.
    lag: age of the oldest pending message.
    """

    pending: int
    parked: int
    blocked: int
    dead: int
    relays: int
    partitions: int
    lag: float

    def as_document(self) -> Mapping[str, float]:
        """For `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up; died_at: µs."""

    message: Message
    reason: str
    died_at: int


AddedRow: TypeAlias = tuple[UUID, int, bytes, str, bytes, str | None, str | None, str | None, str | None]
"""What is added of a message: id, partition, queue, topic, payload, key, headers as text, content type, trace."""


def other_partitions(given: int, found: int) -> ConfigurationError:
    """The error of an outbox whose number of partitions is not the database's."""
    return ConfigurationError(
        f"This outbox has partitions={given}, and the database {found}: messages of one key would lose their order. "
        f"Nothing was written; make it Outbox(partitions={found})."
    )


Rival: TypeAlias = Literal["order", "routes"]
"""In what relays differ, of which only one kind may be at work."""


class OutboxPlans(Protocol):
    """The plans of one dialect. Each is one transaction; `lease` and `delay` are µs."""

    def add(self, rows: Sequence[AddedRow], partitions: int) -> Plan[Sequence[Row]] | Straight:
        """Insert into the caller's transaction; ConfigurationError, and nothing inserted, for other `partitions`."""

    def notify(self, payload: str = "") -> Plan[None]:
        """Wake relays when the caller's transaction commits; with a payload, only tell them that."""

    def settings(self, partitions: int) -> Plan[OutboxSettings]:
        """What the database says; where tables are made on the way, they get so many partitions."""

    def join(self, relay: UUID, lease: int, strict: bool, routes: str) -> Plan[Rival | None]:
        """Become a relay with a digest of its routes; or in what those differ that are there.

        Bury those whose lease is over before: until then they could come back, and stand in the way. Of two that join
        at the same time with different routes at most one stays; the other one tries again.
        """

    def renew(self, relay: UUID, lease: int) -> Plan[int | None]:
        """Extend the lease; the store's time in µs, or None where it was lost."""

    def bury(self) -> Plan[int]:
        """Remove relays whose lease is over; their messages in flight will be tried alone.

        A message that was tried alone has one death more: here and nowhere else, so that only deaths are counted, and
        each once (C15). The age of all of them begins, since they may have been sent.
        """

    def balance(self, relay: UUID, strict: bool, kept: Sequence[int] = ()) -> Plan[Sequence[int] | None]:
        """Take or give up partitions until all live relays have as many; those it has, or None where it is gone.

        kept: those that are not given up, since messages of them are in flight: a queue has one relay at a time.
        """

    def leave(self, relay: UUID) -> Plan[None]:
        """Give the partitions back; with something in flight nothing is done, and the lease has to run out."""

    def claim(
        self,
        relay: UUID,
        floors: Mapping[int, int],
        *,
        batch: int,
        quota: int,
        lease: int,
        alone: bool,
        strict: bool,
        slow: Sequence[Message] = (),
        open: Mapping[int, int] = MappingProxyType({}),
        server: int = 0,
    ) -> Plan[ClaimedBatch]:
        """Take a batch, the lowest numbers: at most `quota` of each partition, in the order of `floors`.

        alone: one message that a dead relay left. slow: messages that stay in flight.
        floors: where to begin in each partition. open: transactions, each with a number that is below all of its own:
        where one of them has ended, partitions are begun there at the most. server: on another one, at the first.
        """

    def last_number(self) -> Plan[int | None]:
        """The number that was drawn last, 0 where none was; None where it cannot be asked or cannot be set back."""

    def finish(self, relay: UUID, result: BatchResult, *, lease: int, strict: bool, passing: bool) -> Plan[bool]:
        """End a batch; False, and nothing changed, where the relay is gone."""

    def stats(self) -> Plan[Stats]:
        """The numbers of the outbox."""

    def dead(self, *, topic: str | None, limit: int, ids: Sequence[UUID] = ()) -> Plan[Sequence[DeadLetter]]:
        """Dead letters, the oldest first."""

    def requeue(self, ids: Sequence[UUID], remembered: int) -> Plan[tuple[int, int]]:
        """Put dead letters back, at the end, with their ids and nothing counted.

        How many there were, and how many of them are older than `remembered` µs.
        """

    def drop(self, ids: Sequence[UUID]) -> Plan[int]:
        """Delete dead letters."""

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Delete a bounded number of dead letters that died more than so many µs ago."""

    def adopt(self) -> Plan[int]:
        """Make messages of another cluster's backup this server's own, in their order; how many."""
