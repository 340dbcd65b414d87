"""The outbox on PostgreSQL: each step is one statement, so that it is one commit and one round trip.

A batch is found without locking or marking its messages: a partition has one relay, and a relay one batch at a time.
What is on its way is written in the relay's own row, for whoever has to bury it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import UUID

from retryproof.core.message import Conclusion, Message
from retryproof.sql.outbox import DeadLetter, Rival, Settings, Stats, Taken
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.postgres.outbox_statements import STATEMENTS

CHANNEL = "retryproof_outbox"


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
        self._sql = {name: sql.format(**names) for name, sql in STATEMENTS.items()}

    def _statement(self, name: str, *parameters: Any) -> Statement:
        return Statement(self._sql[name], parameters)

    # In the caller's transaction

    def add(self, messages: Sequence[Message], partitions: int) -> Plan[int | None]:
        """Insert, one statement whatever the number."""
        if len(messages) == 1:
            message = messages[0]
            rows = yield Statement(self._sql["add"], (partitions, message.id, *_columns(message)))
        else:
            ids = [str(message.id) for message in messages]
            columns = zip(*(_columns(message) for message in messages), strict=True)
            rows = yield self._statement("add_many", partitions, ids, *(list(column) for column in columns))
        if rows:
            return None
        ((found,),) = yield self._statement("partition_number")
        return int(found)

    def notify(self, payload: str = "") -> Plan[None]:
        """Wake relays when the caller's transaction commits."""
        yield Statement(f"SELECT pg_notify('{CHANNEL}', $1::text)", (payload,))

    # A relay's life

    def settings(self, partitions: int) -> Plan[Settings]:
        """What the database says, and whether its transaction ids and its numbers are this server's."""
        ((partitions, cluster, last, following, role, may_ask),) = yield self._statement("settings")
        server, unsure = None, ""
        if may_ask:
            ((server,),) = yield self._statement("server")
        else:
            unsure = f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system() TO {role}"
        if server and cluster is None:
            yield self._statement("own", server)
        elif server and cluster != server:
            return Settings(partitions, f"its messages were written on the cluster {cluster}, and this is {server}")
        if last is not None and last >= following:
            return Settings(partitions, f"a message has the transaction id {last}, and this server is at {following}")
        numbering = yield from self.numbering()
        unnumbered = "" if numbering.known else f"GRANT SELECT ON SEQUENCE {numbering.sequence} TO {role}"
        return Settings(partitions, "", unsure, numbering.disorder, unnumbered)

    def numbering(self) -> Plan[Numbering]:
        """Whether the numbers order messages; what this role may not read is not asked for."""
        ((sequence, cache, increment, may_read),) = yield self._statement("sequence")
        highest = None
        if may_read:  # first, since messages are added meanwhile
            ((highest,),) = yield self._statement("highest")
        last = yield from self.last_number()
        return Numbering(sequence, cache, increment, last, highest)

    def last_number(self) -> Plan[int | None]:
        """By the sequence, where this role may read it."""
        ((last,),) = yield self._statement("last_number")
        return None if last is None else int(last)

    def join(self, relay: UUID, lease: int, strict: bool, routes: str) -> Plan[Rival | None]:
        """Become a relay: look, be there, and look again, since two that join at once do not see each other."""
        yield self._statement("join", relay, lease, strict, routes)
        ((there, other_order),) = yield self._statement("rivals", relay, strict, routes)
        if there and other_order is None:
            return None
        yield self._statement("leave", relay)
        return "order" if other_order else "routes"

    def renew(self, relay: UUID, lease: int) -> Plan[int | None]:
        """Extend the lease."""
        rows = yield self._statement("renew", relay, lease)
        return int(rows[0][0]) if rows else None

    def bury(self) -> Plan[int]:
        """Remove relays whose lease is over."""
        ((buried,),) = yield self._statement("bury")
        return int(buried)

    def balance(self, relay: UUID, strict: bool, kept: Sequence[int] = ()) -> Plan[Sequence[int] | None]:
        """Take or give up partitions; strict order has all or none."""
        rows = yield self._statement("target", relay)
        if not rows:
            return None
        ((total, relays, mine),) = rows
        target = total if strict else -(-total // relays)
        if mine > target:
            yield self._statement("give_up", relay, max(0, target - len(kept)), list(kept))
        elif mine < target:
            yield self._statement("take", relay, target - mine)
        owned = yield self._statement("mine", relay)
        if strict and 0 < len(owned) < total:
            yield self._statement("give_up", relay, 0, [])
            return []
        return [row[0] for row in owned]

    def leave(self, relay: UUID) -> Plan[None]:
        """Give the partitions back."""
        yield self._statement("leave", relay)

    # A batch

    def claim(
        self,
        relay: UUID,
        floors: Mapping[int, int],
        *,
        batch: int,
        share: int,
        lease: int,
        alone: bool,
        strict: bool,
        slow: Sequence[Message] = (),
        open: Mapping[int, int] = MappingProxyType({}),
        server: int = 0,
    ) -> Plan[Taken]:
        """Take a batch."""
        known = list(open), list(open.values()), server
        if strict:
            rows = yield self._statement("claim_strict", relay, min(floors.values(), default=0), batch, lease, *known)
        else:
            starts = list(floors), list(floors.values())
            parameters = (*starts, batch, share, lease, alone, _numbers(slow), *known)
            rows = yield self._statement("claim", relay, *parameters)
        held, suspects, waiting, low, running, unlisted, own, started = rows[0][:8]
        messages = [_message(row[8:]) for row in rows[1:]]
        return Taken(held, suspects, messages, waiting or (), low, running, unlisted, own, started)

    def finish(self, relay: UUID, conclusion: Conclusion, *, lease: int, strict: bool, passing: bool) -> Plan[bool]:
        """End a batch."""
        done = _numbers(conclusion.done)
        if conclusion.plain and not strict:
            ((held,),) = yield self._statement("finish_plain", relay, lease, done)
            return bool(held)
        dead, failed = conclusion.dead, conclusion.failed
        parameters = (
            done,
            _numbers([message for message, _, _ in dead]),
            [attempts for _, attempts, _ in dead],
            [_clean(reason) for _, _, reason in dead],
            _numbers([failure.message for failure in failed]),
            [failure.attempts for failure in failed],
            [_clean(failure.reason) for failure in failed],
            [failure.delay for failure in failed],
            [failure.answers for failure in failed],
            _numbers(conclusion.slow),
        )
        if strict:
            rows = yield self._statement("finish_strict", relay, lease, *parameters)
        else:
            held_back = _lines([message.line for message in conclusion.slow])
            rows = yield self._statement(
                "finish", relay, lease, *parameters, *held_back, *_lines(conclusion.chains), passing
            )
        return bool(rows[0][0])

    # For operators

    def stats(self) -> Plan[Stats]:
        """How it stands."""
        ((pending, parked, blocked, dead, relays, partitions, lag),) = yield self._statement("stats")
        return Stats(pending, parked, blocked, dead, relays, partitions, float(lag))

    def dead(self, *, topic: str | None, limit: int, ids: Sequence[UUID] = ()) -> Plan[Sequence[DeadLetter]]:
        """Dead letters, the oldest first."""
        rows = yield self._statement("letters", topic, limit, [str(id) for id in ids])
        return [DeadLetter(_message(row[:12]), row[12], row[13]) for row in rows]

    def requeue(self, ids: Sequence[UUID], remembered: int) -> Plan[tuple[int, int]]:
        """Put dead letters back, at the end: their old numbers are behind what was sent meanwhile."""
        ((count, late),) = yield self._statement("requeue", [str(id) for id in ids], remembered)
        return int(count), int(late)

    def drop(self, ids: Sequence[UUID]) -> Plan[int]:
        """Forget dead letters."""
        ((count,),) = yield self._statement("drop", [str(id) for id in ids])
        return int(count)

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Forget a bounded number of old dead letters."""
        ((count,),) = yield self._statement("purge", older_than, limit)
        return int(count)

    def adopt(self) -> Plan[int]:
        """Make messages of another cluster this server's own; the next relay that may ask says which server it is."""
        ((count,),) = yield self._statement("adopt")
        return int(count)


def _columns(message: Message) -> tuple[Any, ...]:
    return (
        message.partition,
        message.chain,
        message.topic,
        message.payload,
        message.key,
        json.dumps(dict(message.headers)) if message.headers else None,
        message.content_type,
        message.trace,
    )


def _numbers(messages: Sequence[Message]) -> list[int]:
    return [message.sequence for message in messages]


def _lines(lines: Sequence[tuple[int, bytes]]) -> tuple[list[int], list[bytes]]:
    return [partition for partition, _ in lines], [chain for _, chain in lines]


def _clean(reason: str) -> str:
    return reason.replace("\0", "")[:2_000]


def _message(row: Row) -> Message:
    """A row of the columns of a message, and perhaps whether it was parked."""
    message = Message(*row)
    message.headers = json.loads(message.headers) if message.headers else {}  # type: ignore[arg-type] # text in the row
    return message
