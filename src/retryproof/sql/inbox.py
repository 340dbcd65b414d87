"""The plans of an inbox; each engine has the statements (T4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retryproof.sql.named import Named
from retryproof.sql.plan import Plan, Row, Statement


@dataclass(frozen=True, slots=True)
class KnownMessage:
    """What the inbox has of a message that came before."""

    fingerprint: bytes
    result: bytes | None
    outgoing: bytes | None


@dataclass(frozen=True, slots=True)
class InboxStatements:
    """The statements that take no list, in an engine's own words; each change returns a row for each row it changed.

    keep: result, outgoing, id. refuse: id, fingerprint, consumer, source, message_id, reason, payload.
    dead: consumer or None, limit. drop: id, fingerprint. drop_named: id, fingerprint, each by its first eight bytes.
    purge, purge_dead: older_than in µs, limit; they never wait for a lock.
    stats: one row of messages, seconds since the oldest, dead letters, seconds since the oldest of them.
    """

    keep: Named
    refuse: Named
    dead: Named
    drop: Named
    drop_named: Named
    purge: Named
    purge_dead: Named
    stats: Named


class InboxPlans(ABC):
    """The plans; an engine says how it takes and finds many ids at once."""

    def __init__(self, statements: InboxStatements) -> None:
        self._statements = statements

    def ready(self) -> Plan[None]:
        """Make the tables, on an engine where that is done at the first use."""
        yield from ()

    @abstractmethod
    def _insert(self, ids: Sequence[bytes], fingerprints: Sequence[bytes]) -> Statement:
        """Insert the new ones, in the order of the ids, waiting for rivals; return their ids."""

    @abstractmethod
    def _find(self, ids: Sequence[bytes]) -> Statement:
        """Id, fingerprint, result and outgoing messages of each."""

    def take(self, fingerprints: Mapping[bytes, bytes]) -> Plan[dict[bytes, KnownMessage | None]]:
        """Take each id that is new (None), by one statement in the order of the ids; and what is there of the others.

        It waits for a rival that has not committed, since only its end says whether the message is done.
        """
        yield from self.ready()
        ids = sorted(fingerprints)
        taken = yield self._insert(ids, [fingerprints[id] for id in ids])
        found: dict[bytes, KnownMessage | None] = {bytes(row[0]): None for row in taken}
        known = [id for id in ids if id not in found]
        if known:
            for id, *rest in (yield self._find(known)):
                found[bytes(id)] = KnownMessage(*rest)
        return found

    def keep(self, id: bytes, result: bytes | None, outgoing: bytes | None) -> Plan[bool]:
        """Store the result of the first run; return whether the message was taken."""
        return bool((yield self._statements.keep(id=id, result=result, outgoing=outgoing)))

    def refuse(self, id: bytes, fingerprint: bytes, words: Sequence[str], payload: bytes) -> Plan[None]:
        """Store a message that cannot be taken. words: consumer, source, message id, reason."""
        consumer, source, message_id, reason = words
        yield self._statements.refuse(
            id=id,
            fingerprint=fingerprint,
            consumer=consumer,
            source=source,
            message_id=message_id,
            reason=reason,
            payload=payload,
        )

    def dead(self, limit: int, consumer: str | None = None) -> Plan[Sequence[Row]]:
        """The oldest dead letters: id, fingerprint, consumer, source, message id, reason, payload, seen_at."""
        yield from self.ready()
        return (yield self._statements.dead(consumer=consumer, limit=limit))

    def drop(self, id: bytes, fingerprint: bytes) -> Plan[bool]:
        """Delete a dead letter; return whether it existed."""
        yield from self.ready()
        return bool((yield self._statements.drop(id=id, fingerprint=fingerprint)))

    def drop_named(self, starts: Sequence[tuple[bytes, bytes]]) -> Plan[int]:
        """Delete dead letters by the first eight bytes of their ids and fingerprints; return how many there were."""
        yield from self.ready()
        count = 0
        for id, fingerprint in starts:
            count += len((yield self._statements.drop_named(id=id, fingerprint=fingerprint)))
        return count

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Delete at most `limit` messages older than so many microseconds; return how many. Never waits for a lock."""
        yield from self.ready()
        return len((yield self._statements.purge(older_than=older_than, limit=limit)))

    def purge_dead(self, older_than: int, limit: int) -> Plan[int]:
        """`purge` of dead letters."""
        yield from self.ready()
        return len((yield self._statements.purge_dead(older_than=older_than, limit=limit)))

    def stats(self) -> Plan[tuple[int, float, int, float]]:
        """Messages, the age of the oldest in seconds, dead letters, the age of their oldest."""
        yield from self.ready()
        ((messages, oldest, dead, oldest_dead),) = yield self._statements.stats()
        return messages, max(0.0, float(oldest)), dead, max(0.0, float(oldest_dead))
