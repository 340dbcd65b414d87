"""The outbox on SQLite: the same tables and steps as on PostgreSQL, each step a transaction that holds the write lock.

A number is drawn behind the write lock, which its transaction keeps until it has committed: numbers are in the order
of commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from uuid import UUID

from retryproof.clock import wall_clock
from retryproof.core.message import UNCOUNTED, BatchResult, Message
from retryproof.sql.outbox import (
    HELD,
    AddedRow,
    ClaimedBatch,
    DeadLetter,
    OutboxSettings,
    Rival,
    Stats,
    other_partitions,
)
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.sqlite.outbox_schema import SQLITE_OUTBOX
from retryproof.sql.sqlite.schema import ready

ALL = -1
"""In place of a partition where the order is strict: what is held back is everything, and its queue is empty."""

_KEPT = "sequence, partition, attempts, created_at, id, chain, topic, payload, key, headers, content_type, trace"
_MESSAGE = f"{_KEPT}, failed_at, answers, deaths"
_ADD = "created_at, partition, id, chain, topic, payload, key, headers, content_type, trace"
_INSERT = f"INSERT INTO retryproof_outbox ({_ADD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_AMONG = "(SELECT value FROM json_each(?))"


class SqliteOutbox:
    """The plans of SQLite; clock: µs since the epoch."""

    def __init__(self, clock: Callable[[], int] = wall_clock) -> None:
        self._clock = clock

    # In the caller's transaction

    def add(self, rows: Sequence[AddedRow], partitions: int) -> Plan[Sequence[Row]]:
        """Insert; the tables are made, in this transaction, where there are none."""
        found = yield from self._partitions(partitions)
        if found != partitions:
            raise other_partitions(partitions, found)
        now = self._clock()
        for id, partition, *others in rows:
            yield Statement(_INSERT, (now, partition, str(id), *others))
        return ()

    def notify(self, payload: str = "") -> Plan[None]:
        """Nothing: who looks at a file needs no message that it changed."""
        yield from ()

    def _partitions(self, partitions: int) -> Plan[int]:
        yield from ready(SQLITE_OUTBOX)
        rows = yield Statement("SELECT partitions FROM retryproof_outbox_settings")
        if rows:
            return int(rows[0][0])
        yield Statement("INSERT INTO retryproof_outbox_settings (one, partitions) VALUES (1, ?)", (partitions,))
        yield Statement(
            "INSERT OR IGNORE INTO retryproof_outbox_partitions (partition) "
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?) SELECT i FROM n",
            (partitions,),
        )
        return partitions

    # A relay's life

    def settings(self, partitions: int) -> Plan[OutboxSettings]:
        """What the database says."""
        found = yield from self._partitions(partitions)
        return OutboxSettings(found)

    def join(self, relay: UUID, lease: int, strict: bool, routes: str) -> Plan[Rival | None]:
        """Become a relay."""
        others = yield Statement(
            "SELECT strict <> ? FROM retryproof_outbox_relays WHERE id <> ? AND (strict <> ? OR routes IS NOT ?) "
            "ORDER BY 1 DESC LIMIT 1",
            (strict, str(relay), strict, routes),
        )
        if others:
            return "order" if others[0][0] else "routes"
        yield Statement(
            "INSERT OR IGNORE INTO retryproof_outbox_relays (id, lease_until, strict, routes) VALUES (?, ?, ?, ?)",
            (str(relay), self._clock() + lease, strict, routes),
        )
        return None

    def renew(self, relay: UUID, lease: int) -> Plan[int | None]:
        """Extend the lease."""
        now = self._clock()
        rows = yield Statement(
            "UPDATE retryproof_outbox_relays SET lease_until = ? WHERE id = ? RETURNING 1", (now + lease, str(relay))
        )
        return now if rows else None

    def bury(self) -> Plan[int]:
        """Remove relays whose lease is over."""
        over = yield Statement(
            "DELETE FROM retryproof_outbox_relays WHERE lease_until < ? RETURNING id, strict, flight, lease_until",
            (self._clock(),),
        )
        for relay, strict, in_flight, died_at in over:
            yield Statement("UPDATE retryproof_outbox_partitions SET relay = NULL WHERE relay = ?", (relay,))
            suspects = yield Statement(
                "UPDATE retryproof_outbox SET parked = NOT ?, alone = 1, "
                "attempts = attempts + alone, deaths = deaths + alone, "
                f"failed_at = coalesce(failed_at, max(?, created_at)) WHERE sequence IN {_AMONG} "
                "RETURNING partition, chain",
                (strict, died_at, in_flight),
            )
            queues = {(ALL, b"") if strict else (row[0], row[1]) for row in suspects}
            for partition, queue in queues:  # due at once, although it was held while a message took long
                yield from _block(partition, queue, 0, alone=True)
        return len(over)

    def balance(self, relay: UUID, strict: bool, kept: Sequence[int] = ()) -> Plan[Sequence[int] | None]:
        """Take or give up partitions; strict order has all or none."""
        relays = yield Statement("SELECT id FROM retryproof_outbox_relays")
        if str(relay) not in {row[0] for row in relays}:
            return None
        rows = yield Statement("SELECT partition, relay FROM retryproof_outbox_partitions ORDER BY partition")
        mine = [row[0] for row in rows if row[1] == str(relay)]
        free = [row[0] for row in rows if row[1] is None]
        target = len(rows) if strict else -(-len(rows) // len(relays))
        others = [partition for partition in [*mine, *free] if partition not in kept]
        owned = sorted([*kept, *others[: max(0, target - len(kept))]])
        if strict and len(owned) < len(rows):
            owned = []
        given, taken = sorted(set(mine) - set(owned)), sorted(set(owned) - set(mine))
        for value, places in ((None, given), (str(relay), taken)):
            if places:
                yield Statement(
                    f"UPDATE retryproof_outbox_partitions SET relay = ? WHERE partition IN {_AMONG}",
                    (value, json.dumps(places)),
                )
        return owned

    def leave(self, relay: UUID) -> Plan[None]:
        """Give the partitions back."""
        left = yield Statement(
            "DELETE FROM retryproof_outbox_relays WHERE id = ? AND flight = '[]' RETURNING 1", (str(relay),)
        )
        if left:
            yield Statement("UPDATE retryproof_outbox_partitions SET relay = NULL WHERE relay = ?", (str(relay),))

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
        now = self._clock()
        held = yield Statement("SELECT flight FROM retryproof_outbox_relays WHERE id = ?", (str(relay),))
        waiting: list[int] = []
        if not held:
            return ClaimedBatch(False)
        if strict:
            taken = yield from self._strict(batch, now)
        elif alone:
            taken = yield from self._due(floors, 1, 1, now, alone=True)
        else:
            taken = yield from self._due(floors, batch, quota, now, alone=False)
            ready, waiting = yield from self._ready(floors, batch, quota)
            taken += ready
        yield Statement(
            "UPDATE retryproof_outbox_relays SET lease_until = ?, flight = ? WHERE id = ?",
            (now + lease, _sequences([*slow, *taken]), str(relay)),
        )
        suspects = yield Statement(
            f"SELECT 1 FROM retryproof_outbox_blocked WHERE partition IN {_AMONG} AND alone AND due_at <= ? LIMIT 1",
            (json.dumps(list(floors)), now),
        )
        return ClaimedBatch(True, bool(suspects) and not strict, taken, waiting)

    def _due(self, floors: Mapping[int, int], batch: int, quota: int, now: int, *, alone: bool) -> Plan[list[Message]]:
        queues = yield Statement(
            f"SELECT partition, chain FROM retryproof_outbox_blocked WHERE partition IN {_AMONG} AND alone = ? "
            "AND due_at <= ? ORDER BY due_at LIMIT ?",
            (json.dumps(list(floors)), alone, now, batch),
        )
        taken: list[Message] = []
        for partition, queue in queues:
            if len(taken) >= batch:
                break
            rows = yield Statement(
                f"SELECT {_MESSAGE} FROM retryproof_outbox WHERE parked AND partition = ? AND chain = ? "
                "ORDER BY sequence LIMIT ?",
                (partition, queue, min(quota, batch - len(taken))),
            )
            taken += [_message(row, parked=True) for row in rows]
        return taken

    def _ready(self, floors: Mapping[int, int], batch: int, quota: int) -> Plan[tuple[list[Message], list[int]]]:
        """Ready messages; those of queues that are held back are parked: the partition of each."""
        taken: list[Message] = []
        parked: list[int] = []
        seen = 0
        for partition in floors:
            if seen >= batch:
                break
            rows = yield Statement(
                f"SELECT {_MESSAGE}, EXISTS (SELECT 1 FROM retryproof_outbox_blocked b "
                "WHERE b.partition = o.partition AND b.chain = o.chain) FROM retryproof_outbox o "
                "WHERE NOT parked AND partition = ? ORDER BY sequence LIMIT ?",
                (partition, min(quota, batch - seen)),
            )
            seen += len(rows)
            taken += [_message(row[:-1]) for row in rows if not row[-1]]
            waiting = [row[0] for row in rows if row[-1]]
            if waiting:
                yield Statement(
                    f"UPDATE retryproof_outbox SET parked = 1 WHERE sequence IN {_AMONG}", (json.dumps(waiting),)
                )
                parked += [partition] * len(waiting)
        return taken, parked

    def _strict(self, batch: int, now: int) -> Plan[list[Message]]:
        pause = yield Statement("SELECT due_at FROM retryproof_outbox_blocked WHERE partition = ?", (ALL,))
        if pause and pause[0][0] > now:
            return []
        rows = yield Statement(f"SELECT {_MESSAGE}, alone FROM retryproof_outbox ORDER BY sequence LIMIT ?", (batch,))
        if rows and rows[0][-1]:
            return [_message(rows[0][:-1], parked=True)]
        first_alone = next((place for place, row in enumerate(rows) if row[-1]), len(rows))
        return [_message(row[:-1]) for row in rows[:first_alone]]

    def last_number(self) -> Plan[int | None]:
        """None: a number is never below that of a row that is there, and no claim begins at a floor."""
        yield from ()
        return None

    def finish(self, relay: UUID, result: BatchResult, *, lease: int, strict: bool, passing: bool) -> Plan[bool]:
        """End a batch."""
        now = self._clock()
        held = yield Statement(
            "UPDATE retryproof_outbox_relays SET lease_until = ?, flight = ? WHERE id = ? RETURNING 1",
            (now + lease, _sequences(result.slow), str(relay)),
        )
        if not held:
            return False
        for message, attempts, reason in result.dead:
            yield Statement(
                f"INSERT OR REPLACE INTO retryproof_outbox_dead ({_ADD}, sequence, attempts, reason, died_at) "
                f"SELECT {_ADD}, sequence, ?, ?, ? FROM retryproof_outbox WHERE sequence = ?",
                (attempts, reason[:2_000], now, message.sequence),
            )
        ended = [message.sequence for message in (*result.done, *(dead[0] for dead in result.dead))]
        if ended:
            yield Statement(f"DELETE FROM retryproof_outbox WHERE sequence IN {_AMONG}", (json.dumps(ended),))
        backing_off = set()
        for failure in result.failed:
            message = failure.message
            counted = failure.answers != UNCOUNTED
            queue = message.id.bytes if passing and counted and not strict else message.queue
            yield Statement(
                "UPDATE retryproof_outbox SET parked = ?, alone = alone AND NOT ?, attempts = ?, reason = ?, "
                "chain = ?, answers = CASE WHEN ? THEN ? ELSE answers END, "
                "failed_at = CASE WHEN ? THEN coalesce(failed_at, ?) ELSE failed_at END WHERE sequence = ?",
                (
                    *(not strict, counted, failure.attempts, failure.reason[:2_000], queue),
                    *(counted, failure.answers, counted, now, message.sequence),
                ),
            )
            if not strict:
                alone = yield from _has_alone(message.partition, queue)
                yield from _block(message.partition, queue, now + failure.delay, alone=alone)
                backing_off.add((message.partition, queue))
        if strict:
            yield from self._pause(result, now)
        for partition, queue in () if strict else result.freed:
            if (partition, queue) not in backing_off:
                yield from self._go_on(partition, queue)
        yield from self._hold(result.slow)
        return True

    def _hold(self, slow: Sequence[Message]) -> Plan[None]:
        """Keep the queues back whose messages are being sent still."""
        if not slow:
            return
        yield Statement(f"UPDATE retryproof_outbox SET parked = 1 WHERE sequence IN {_AMONG}", (_sequences(slow),))
        partitions = json.dumps([message.partition for message in slow])
        held = yield Statement(
            f"SELECT partition, chain FROM retryproof_outbox_blocked WHERE due_at = {HELD} AND partition IN {_AMONG}",
            (partitions,),
        )
        known = {tuple(row) for row in held}
        for message in slow:
            if message.queue_id in known:
                continue
            alone = yield from _has_alone(message.partition, message.queue)
            yield from _block(message.partition, message.queue, HELD, alone=alone)

    def _pause(self, result: BatchResult, now: int) -> Plan[None]:
        if result.failed:
            yield from _block(ALL, b"", now + result.failed[0].delay, alone=False)
        else:
            yield Statement("DELETE FROM retryproof_outbox_blocked WHERE partition = ?", (ALL,))

    def _go_on(self, partition: int, queue: bytes) -> Plan[None]:
        more = yield Statement(
            "SELECT 1 FROM retryproof_outbox WHERE parked AND partition = ? AND chain = ? LIMIT 1", (partition, queue)
        )
        if more:
            alone = yield from _has_alone(partition, queue)
            yield from _block(partition, queue, 0, alone=alone)
        else:
            yield Statement(
                "DELETE FROM retryproof_outbox_blocked WHERE partition = ? AND chain = ?", (partition, queue)
            )

    # For operators

    def stats(self) -> Plan[Stats]:
        """How it stands."""
        ((pending, parked, blocked, dead, relays, partitions, oldest),) = yield Statement(
            "SELECT (SELECT count(*) FROM retryproof_outbox), (SELECT count(*) FROM retryproof_outbox WHERE parked), "
            "(SELECT count(*) FROM retryproof_outbox_blocked), (SELECT count(*) FROM retryproof_outbox_dead), "
            "(SELECT count(*) FROM retryproof_outbox_relays WHERE lease_until > ?), "
            "(SELECT partitions FROM retryproof_outbox_settings), (SELECT min(created_at) FROM retryproof_outbox)",
            (self._clock(),),
        )
        lag = max(0.0, (self._clock() - oldest) / 1e6) if oldest is not None else 0.0
        return Stats(pending, parked, blocked, dead, relays, partitions, lag)

    def dead(self, *, topic: str | None, limit: int, ids: Sequence[UUID] = ()) -> Plan[Sequence[DeadLetter]]:
        """Dead letters, the oldest first."""
        rows = yield Statement(
            f"SELECT {_KEPT}, NULL, 0, 0, reason, died_at FROM retryproof_outbox_dead WHERE (? IS NULL OR topic = ?) "
            f"AND (? OR id IN {_AMONG}) ORDER BY died_at, id LIMIT ?",
            (topic, topic, not ids, _texts(ids), limit),
        )
        return [DeadLetter(_message(row[:-2]), row[-2], row[-1]) for row in rows]

    def requeue(self, ids: Sequence[UUID], remembered: int) -> Plan[tuple[int, int]]:
        """Put dead letters back, at the end."""
        ((late,),) = yield Statement(
            f"SELECT count(*) FROM retryproof_outbox_dead WHERE id IN {_AMONG} AND created_at < ?",
            (_texts(ids), self._clock() - remembered),
        )
        yield Statement(
            f"INSERT INTO retryproof_outbox ({_ADD}) SELECT {_ADD} FROM retryproof_outbox_dead "
            f"WHERE id IN {_AMONG} ORDER BY sequence",
            (_texts(ids),),
        )
        count = yield from self.drop(ids)
        return count, late

    def drop(self, ids: Sequence[UUID]) -> Plan[int]:
        """Forget dead letters."""
        rows = yield Statement(f"DELETE FROM retryproof_outbox_dead WHERE id IN {_AMONG} RETURNING 1", (_texts(ids),))
        return len(rows)

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Forget a bounded number of old dead letters."""
        rows = yield Statement(
            "DELETE FROM retryproof_outbox_dead WHERE id IN (SELECT id FROM retryproof_outbox_dead "
            "WHERE died_at < ? ORDER BY died_at, id LIMIT ?) RETURNING 1",
            (self._clock() - older_than, limit),
        )
        return len(rows)

    def adopt(self) -> Plan[int]:
        """Nothing: a copy of the file is complete."""
        yield from ()
        return 0


def _has_alone(partition: int, queue: bytes) -> Plan[bool]:
    rows = yield Statement(
        "SELECT 1 FROM retryproof_outbox WHERE alone AND partition = ? AND chain = ? LIMIT 1", (partition, queue)
    )
    return bool(rows)


def _block(partition: int, queue: bytes, due_at: int, *, alone: bool) -> Plan[None]:
    yield Statement(
        "INSERT INTO retryproof_outbox_blocked (partition, chain, due_at, alone) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (partition, chain) DO UPDATE SET due_at = excluded.due_at, alone = excluded.alone",
        (partition, queue, due_at, alone),
    )


def _sequences(messages: Sequence[Message]) -> str:
    return json.dumps([message.sequence for message in messages])


def _texts(ids: Sequence[UUID]) -> str:
    return json.dumps([str(id) for id in ids])


def _message(row: Row, *, parked: bool = False) -> Message:
    sequence, partition, attempts, created_at, id, queue, topic, payload, key, headers, content_type, trace = row[:12]
    failed_at, answers, deaths = row[12:]
    return Message(
        id=UUID(id),
        topic=topic,
        payload=payload,
        key=key,
        headers=json.loads(headers) if headers else {},
        content_type=content_type,
        trace=trace,
        attempts=attempts,
        created_at=created_at,
        sequence=sequence,
        partition=partition,
        queue=queue,
        failed_at=failed_at,
        answers=answers,
        deaths=deaths,
        parked=parked,
    )
