"""The outbox on PostgreSQL: each step is one statement, so that it is one commit and one round trip.

A batch is found without locking or marking its messages: a partition has one relay, and a relay one batch at a time.
The messages in flight are in the relay's own row, for the relay that may have to bury it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from uuid import UUID

from retryproof.core.message import BatchResult, Message
from retryproof.sql.named import dollars
from retryproof.sql.outbox import (
    AddedRow,
    ClaimedBatch,
    DeadLetter,
    OutboxSettings,
    Rival,
    Stats,
    other_partitions,
)
from retryproof.sql.plan import Plan, Row, Statement, Straight
from retryproof.sql.postgres.outbox_statements import STATEMENTS

CHANNEL = "retryproof_outbox"
_NUMBER = attrgetter("sequence")
_HEADERS = 4
"""Where the headers are in a message's row; in the first row of a claim, what the claim found."""


@dataclass(frozen=True, slots=True)
class Numbering:
    """What numbers messages. last: the number drawn last, and highest: of a message; None where it is unknown."""

    sequence: str
    cache: int
    increment: int
    last: int | None = None
    highest: int | None = None

    @property
    def known(self) -> bool:
        """Whether this role may ask for the last number."""
        return self.last is not None

    @property
    def disorder(self) -> tuple[str, str] | None:
        """Why numbers do not order messages, and the SQL that mends it."""
        name = self.sequence
        if self.cache != 1:
            return f"{name} hands {self.cache} of them at once to each connection", f"ALTER SEQUENCE {name} CACHE 1"
        if self.increment < 1:
            return f"{name} counts by {self.increment}", f"ALTER SEQUENCE {name} INCREMENT BY 1"
        if self.last is not None and self.highest is not None and self.last < self.highest:
            return (
                f"{name} is at {self.last}, and a message has {self.highest}",
                f"SELECT setval('{name}', {self.highest})",
            )
        return None


class PostgresOutbox:
    """The plans of PostgreSQL; prefix: the schema as it stands in SQL, with its dot, or ""."""

    def __init__(self, prefix: str = "") -> None:
        names = {
            name: f"{prefix}retryproof_outbox{suffix}"
            for name, suffix in (
                ("outbox", ""),
                ("blocked", "_blocked"),
                ("letters", "_dead"),
                ("relays", "_relays"),
                ("partitions", "_partitions"),
                ("settings", "_settings"),
            )
        }
        self._sql = {name: dollars(sql.format(**names)) for name, sql in STATEMENTS.items()}
        self._add, self._add_many = self._sql["add"].sql, self._sql["add_many"].sql

    # In the caller's transaction

    def add(self, rows: Sequence[AddedRow], partitions: int) -> Straight:
        """Insert, one statement whatever the number; its parameters are a row's values, in their order."""
        if len(rows) == 1:
            return Straight(self._add, (*rows[0], partitions), self._not_added, counted=True)
        ids, *columns = zip(*rows, strict=True)
        values = (list(map(str, ids)), *map(list, columns), partitions)
        return Straight(self._add_many, values, self._not_added, counted=True)

    def _not_added(self, added: Statement) -> Plan[Sequence[Row]]:
        ((found,),) = yield self._sql["partition_number"]()
        raise other_partitions(added.parameters[-1], int(found))

    def notify(self, payload: str = "") -> Plan[None]:
        """Wake relays when the caller's transaction commits."""
        yield Statement(f"SELECT pg_notify('{CHANNEL}', $1::text)", (payload,))

    # A relay's life

    def settings(self, partitions: int) -> Plan[OutboxSettings]:
        """What the database says, and whether its transaction ids and its numbers are this server's."""
        ((partitions, cluster, last, following, role, may_ask),) = yield self._sql["settings"]()
        server, unsure = None, ""
        if may_ask:
            ((server,),) = yield self._sql["server"]()
        else:
            unsure = f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system() TO {role}"
        if server and cluster is None:
            yield self._sql["own"](cluster=server)
        elif server and cluster != server:
            return OutboxSettings(
                partitions, f"its messages were written on the cluster {cluster}, and this is {server}"
            )
        if last is not None and last >= following:
            return OutboxSettings(
                partitions, f"a message has the transaction id {last}, and this server is at {following}"
            )
        numbering = yield from self.numbering()
        unnumbered = "" if numbering.known else f"GRANT SELECT ON SEQUENCE {numbering.sequence} TO {role}"
        return OutboxSettings(partitions, "", unsure, numbering.disorder, unnumbered)

    def numbering(self) -> Plan[Numbering]:
        """Whether the numbers order messages; what this role may not read is not asked for."""
        ((sequence, cache, increment, may_read),) = yield self._sql["sequence"]()
        highest = None
        if may_read:  # first, since messages are added meanwhile
            ((highest,),) = yield self._sql["highest"]()
        last = yield from self.last_number()
        return Numbering(sequence, cache, increment, last, highest)

    def last_number(self) -> Plan[int | None]:
        """By the sequence, where this role may read it."""
        ((last,),) = yield self._sql["last_number"]()
        return None if last is None else int(last)

    def join(self, relay: UUID, lease: int, strict: bool, routes: str) -> Plan[Rival | None]:
        """Become a relay: look, be there, and look again, since two that join at once do not see each other."""
        yield self._sql["join"](relay=relay, lease=lease, strict=strict, routes=routes)
        ((there, other_order),) = yield self._sql["rivals"](relay=relay, strict=strict, routes=routes)
        if there and other_order is None:
            return None
        yield self._sql["leave"](relay=relay)
        return "order" if other_order else "routes"

    def renew(self, relay: UUID, lease: int) -> Plan[int | None]:
        """Extend the lease."""
        rows = yield self._sql["renew"](relay=relay, lease=lease)
        return int(rows[0][0]) if rows else None

    def bury(self) -> Plan[int]:
        """Remove relays whose lease is over."""
        ((buried,),) = yield self._sql["bury"]()
        return int(buried)

    def balance(self, relay: UUID, strict: bool, kept: Sequence[int] = ()) -> Plan[Sequence[int] | None]:
        """Take or give up partitions; strict order has all or none."""
        rows = yield self._sql["target"](relay=relay)
        if not rows:
            return None
        ((total, relays, mine),) = rows
        target = total if strict else -(-total // relays)
        if mine > target:
            yield self._sql["give_up"](relay=relay, keep=max(0, target - len(kept)), kept=list(kept))
        elif mine < target:
            yield self._sql["take"](relay=relay, count=target - mine)
        owned = yield self._sql["mine"](relay=relay)
        if strict and 0 < len(owned) < total:
            yield self._sql["give_up"](relay=relay, keep=0, kept=[])
            return []
        return [row[0] for row in owned]

    def leave(self, relay: UUID) -> Plan[None]:
        """Give the partitions back."""
        yield self._sql["leave"](relay=relay)

    # A batch

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
        """Take a batch."""
        known = {"open": list(open), "lows": list(open.values()), "server": server}
        if strict:
            floor = min(floors.values(), default=0)
            rows = yield self._sql["claim_strict"](relay=relay, floor=floor, batch=batch, lease=lease, **known)
        else:
            rows = yield self._sql["claim"](
                relay=relay,
                partitions=_as_text(floors),
                floors=_as_text(floors.values()),
                batch=batch,
                quota=quota,
                lease=lease,
                alone=alone,
                slow=_numbers(slow),
                **known,
            )
        about, *taken = rows
        held, suspects, waiting, low, running, unlisted, own, started = json.loads(about[_HEADERS])
        messages = [Message(*row[:]) for row in taken]  # a slice is a tuple, which is unpacked faster than a record
        for message in messages:
            message.headers = json.loads(message.headers) if message.headers else {}  # type: ignore[arg-type]  # text
        return ClaimedBatch(held, suspects, messages, waiting or (), low, running, unlisted, own, started)

    def finish(self, relay: UUID, result: BatchResult, *, lease: int, strict: bool, passing: bool) -> Plan[bool]:
        """End a batch."""
        done = _as_text(map(_NUMBER, result.done))
        if result.plain and not strict:
            ((held,),) = yield self._sql["finish_plain"](relay=relay, lease=lease, done=done)
            return bool(held)
        dead, failed, slow = result.dead, result.failed, result.slow
        rows = yield self._sql["finish_strict" if strict else "finish"](
            relay=relay,
            lease=lease,
            done=done,
            dead=_numbers([message for message, _, _ in dead]),
            dead_attempts=[attempts for _, attempts, _ in dead],
            dead_reasons=[_clean(reason) for _, _, reason in dead],
            failed=_numbers([failure.message for failure in failed]),
            failed_attempts=[failure.attempts for failure in failed],
            failed_reasons=[_clean(failure.reason) for failure in failed],
            delays=[failure.delay for failure in failed],
            answers=[failure.answers for failure in failed],
            slow=_numbers(slow),
            slow_partitions=[message.partition for message in slow],
            slow_queues=[message.queue for message in slow],
            free_partitions=[partition for partition, _ in result.freed],
            free_queues=[queue for _, queue in result.freed],
            passing=passing,
        )
        return bool(rows[0][0])

    # For operators

    def stats(self) -> Plan[Stats]:
        """How it stands."""
        ((pending, parked, blocked, dead, relays, partitions, lag),) = yield self._sql["stats"]()
        return Stats(pending, parked, blocked, dead, relays, partitions, float(lag))

    def dead(self, *, topic: str | None, limit: int, ids: Sequence[UUID] = ()) -> Plan[Sequence[DeadLetter]]:
        """Dead letters, the oldest first."""
        rows = yield self._sql["letters"](topic=topic, limit=limit, ids=[str(id) for id in ids])
        return [DeadLetter(_message(row[:12]), row[12], row[13]) for row in rows]

    def requeue(self, ids: Sequence[UUID], remembered: int) -> Plan[tuple[int, int]]:
        """Put dead letters back, at the end: their old numbers are behind what was sent meanwhile."""
        ((count, late),) = yield self._sql["requeue"](ids=[str(id) for id in ids], remembered=remembered)
        return int(count), int(late)

    def drop(self, ids: Sequence[UUID]) -> Plan[int]:
        """Forget dead letters."""
        ((count,),) = yield self._sql["drop"](ids=[str(id) for id in ids])
        return int(count)

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Forget a bounded number of old dead letters."""
        ((count,),) = yield self._sql["purge"](older_than=older_than, limit=limit)
        return int(count)

    def adopt(self) -> Plan[int]:
        """Make messages of another cluster this server's own; the next relay that may ask says which server it is."""
        ((count,),) = yield self._sql["adopt"]()
        return int(count)


def _numbers(messages: Sequence[Message]) -> list[int]:
    return [message.sequence for message in messages]


def _as_text(numbers: Iterable[int]) -> str:
    """An array in PostgreSQL's own notation."""
    return f"{{{','.join(map(str, numbers))}}}"


def _clean(reason: str) -> str:
    return reason.replace("\0", "")[:2_000]


def _message(row: Row) -> Message:
    """A row of the columns of a message, and perhaps whether it was parked."""
    message = Message(*row)
    message.headers = json.loads(message.headers) if message.headers else {}  # type: ignore[arg-type] # text in the row
    return message
