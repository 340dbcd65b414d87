"""What the SQLite store does, as plans: statements out, rows in. The decisions are those of `core.record`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

from retryproof.core import record as table
from retryproof.core.commands import (
    DONE,
    LOST,
    NOTHING,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Finished,
    Release,
    Renew,
)
from retryproof.core.hold import Hold
from retryproof.core.record import Record, State
from retryproof.sql.plan import Joining, Plan, Row, Statement

Fenced = TypeVar("Fenced", Complete, Release, Renew, Checkpoint)

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS retryproof_operations (
    id          BLOB    NOT NULL UNIQUE,
    state       INTEGER NOT NULL,
    fingerprint BLOB    NOT NULL,
    birth       BLOB    NOT NULL,
    nonce       BLOB    NOT NULL,
    token       INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    deaths      INTEGER NOT NULL,
    counts      INTEGER NOT NULL,
    first_seen  INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    retention   REAL    NOT NULL,
    tenant      BLOB    NOT NULL,
    trace       TEXT    NOT NULL,
    checkpoints TEXT,
    result      BLOB
)
"""

MARKERS_SCHEMA = """
CREATE TABLE IF NOT EXISTS retryproof_markers (
    id    BLOB    NOT NULL,
    token INTEGER NOT NULL,
    PRIMARY KEY (id, token)
) WITHOUT ROWID
"""

WORKLIST_SCHEMA = """
CREATE TABLE IF NOT EXISTS retryproof_phased (
    due_at      INTEGER NOT NULL,
    listed_at   INTEGER NOT NULL,
    tries       INTEGER NOT NULL DEFAULT 0,
    id          BLOB    NOT NULL PRIMARY KEY,
    birth       BLOB    NOT NULL,
    fingerprint BLOB    NOT NULL,
    tenant      BLOB    NOT NULL,
    function    TEXT    NOT NULL,
    input       BLOB    NOT NULL,
    reason      TEXT
)
"""

COLUMNS = (
    "id, state, fingerprint, birth, nonce, token, attempt, deaths, counts, first_seen, lease_until, expires_at, "
    "retention, tenant, trace, checkpoints, result"
)
_PLACES = f"({', '.join('?' * 17)})"
_COMMITTED = (
    "EXISTS (SELECT 1 FROM retryproof_markers AS m WHERE m.id = retryproof_operations.id "
    "AND m.token >= retryproof_operations.first_seen)"
)
"""A marker of this life of the record: looked for where no attempt has completed."""
_READ = f"{COLUMNS}, state < {State.COMPLETED:d} AND {_COMMITTED}"
_SELECT = f"SELECT {_READ} FROM retryproof_operations"
_INSERT_NEW = (
    "INSERT INTO retryproof_operations (id, state, fingerprint, birth, nonce, token, attempt, deaths, counts, "
    "first_seen, lease_until, expires_at, retention, tenant, trace) "
    f"VALUES (?, {State.IN_PROGRESS:d}, ?, ?, ?, ?, 1, 0, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
)
_COMPLETE = (
    "UPDATE retryproof_operations SET state = ?, result = ?, checkpoints = NULL, lease_until = ?, "
    "expires_at = ? + CAST(round(retention * 1000000) AS INTEGER) "
    f"WHERE id = ? AND nonce = ? AND token = ? AND state = {State.IN_PROGRESS:d}"
)
_REPLACE = f"REPLACE INTO retryproof_operations ({COLUMNS}) VALUES {_PLACES}"
_COMPLETED, _TOMBSTONE = State.COMPLETED.value, State.TOMBSTONE.value
_MARK = "retryproof_joined"
_UNSETTLED = (
    f"state = {State.IN_PROGRESS:d} OR state = {State.RELEASED:d} "
    f"AND (checkpoints IS NOT NULL OR attempt > 1 OR {_COMMITTED})"
)
_OVER = f"expires_at <= ? AND (state <> {State.IN_PROGRESS:d} OR lease_until <= ?)"


def peek(claims: Sequence[Claim], now: int) -> Plan[list[ClaimReply | None]]:
    """The reply to each claim that has nothing to write; None for the others."""
    rows = yield Statement(_select_by_ids(len(claims)), [claim.id for claim in claims])
    found = {row[0]: row for row in rows}
    return (
        [_reply_without_writing(found.get(claim.id), claim, now) for claim in claims] if found else [None] * len(claims)
    )


def _reply_without_writing(row: Row | None, claim: Claim, now: int) -> ClaimReply | None:
    if row is None:
        return None
    if row[1] >= State.COMPLETED and row[2] == claim.fingerprint and row[11] > now:  # a replay, without the Record
        return Finished(row[16], row[6], row[9], row[14])
    written, reply = table.decide(_to_record(row), claim, now)
    return reply if written is None else None


def insertion(claim: Claim, now: int) -> Statement:
    """The statement that claims an operation which is new: it changes one row, or none where there is a record."""
    return Statement(_INSERT_NEW, _new_row(claim, now))


def inserted(claim: Claim, now: int) -> Acquired:
    """The reply to a claim that was inserted."""
    return Acquired(now, 1, now, claim.nonce, NOTHING, claim.trace)


def claim(claims: Sequence[Claim], now: int) -> Plan[list[ClaimReply]]:
    """Decide and write each claim, under the write lock. Most are new: one statement inserts all that are."""
    if (yield from _change_all(_INSERT_NEW, [_new_row(command, now) for command in claims])):
        return [inserted(command, now) for command in claims]
    found = yield from _load([command.id for command in claims])
    replies: list[ClaimReply] = []
    for command in claims:
        # One that was just inserted is found with its own nonce: the same claim, repeated.
        written, reply = table.decide(found[command.id], command, now)
        if written is not None:
            yield Statement(_REPLACE, _to_row(written))
        replies.append(reply)
    return replies


def _new_row(claim: Claim, now: int) -> Row:
    """What `core.record.decide` makes of an operation that is new, without the Record: most are new.

    The driver binds a bytearray at once, and looks first how bytes would like to be adapted: a fifth of a claim's time.
    """
    nonce = bytearray(claim.nonce)
    return (
        bytearray(claim.id),
        bytearray(claim.fingerprint),
        nonce,
        nonce,
        now,
        int(claim.alone == 2),
        now,
        now + table.microseconds(claim.lease),
        now + table.microseconds(claim.unsettled_retention),
        claim.retention,
        bytearray(claim.tenant),
        claim.trace,
    )


def _change_all(sql: str, rows: Sequence[Row]) -> Plan[bool]:
    """Run a statement once for each of these rows; whether it changed one row of the table each time.

    What triggers of somebody else's change does not count.
    """
    if len(rows) == 1:
        return bool((yield Statement(f"{sql} RETURNING 1", rows[0])))
    [[changed]] = yield Statement(sql, rows, many=True)
    return bool(changed == len(rows))


def complete(commands: Sequence[Complete], now: int) -> Plan[list[FenceReply]]:
    """Settle each operation with its result, fenced in one statement; where one is left over, all are looked at.

    What this statement completed is found so, and is done (C3).
    """
    replies = yield from _complete(commands, now)
    gone = [(command.id,) for command, reply in zip(commands, replies, strict=True) if command.listed and reply == DONE]
    if gone:
        yield Statement(WORKLIST_SCHEMA)
        yield Statement("DELETE FROM retryproof_phased WHERE id = ?", gone, many=True)
    return replies


def completion(command: Complete, now: int) -> Statement | None:
    """The statement that settles an operation in progress: it changes one row, or none where the fence does not hold.

    None where completing takes more than this statement.
    """
    return None if command.listed else Statement(_COMPLETE, _completed_row(command, now))


def _completed_row(command: Complete, now: int) -> Row:
    state = _TOMBSTONE if command.result is None else _COMPLETED
    return (state, command.result, now, now, bytearray(command.id), bytearray(command.nonce), command.token)


def _complete(commands: Sequence[Complete], now: int) -> Plan[list[FenceReply]]:
    if (yield from _change_all(_COMPLETE, [_completed_row(command, now) for command in commands])):
        return [DONE] * len(commands)
    return (yield from _fenced(commands, lambda record, command: table.settle(record, command, now)))


def join(hold: Hold) -> Plan[Joining | None]:
    """Write the marker where the record says that this attempt is current, as the transaction that is open sees it.

    That transaction holds the record from now on, with all others: SQLite has one writer. A savepoint, which ends when
    it does, tells it from the next one; it is set after the marker, with which a transaction has begun whatever the
    driver's mode. None where the attempt is not current.
    """
    current = f"id = ? AND nonce = ? AND token = ? AND state = {State.IN_PROGRESS:d}"
    fence = (hold.id, hold.nonce, hold.token)
    if (
        yield Statement(
            "INSERT INTO retryproof_markers (id, token) SELECT id, token FROM retryproof_operations "
            f"WHERE {current} AND NOT {_COMMITTED} RETURNING 1",
            fence,
        )
    ):
        yield Statement(f"SAVEPOINT {_MARK}")
        return Joining(held=True)
    rows = yield Statement(f"SELECT 1 FROM retryproof_operations WHERE {current}", fence)
    return Joining(held=True, committed=True) if rows else None


def complete_joined(command: Complete, now: int) -> Plan[FenceReply | None]:
    """Settle the operation in the transaction that was joined; None in another one, which is left as it is."""
    if not (yield from _release_mark()):
        return None
    [reply] = yield from complete([command], now)
    return (yield from _unmarked(command, reply))


def checkpoint_joined(command: Checkpoint) -> Plan[FenceReply | None]:
    """Keep a value in the transaction that was joined; None in another one, which is left as it is."""
    if not (yield from _release_mark()):
        return None
    [reply] = yield from checkpoint([command])
    return (yield from _unmarked(command, reply))


def _release_mark() -> Plan[bool]:
    """Whether the savepoint that `join` made was there."""
    try:
        yield Statement(f"RELEASE {_MARK}")
    except Exception as error:
        if "no such savepoint" not in str(error):
            raise
        return False
    return True


def _unmarked(command: Complete | Checkpoint, reply: FenceReply) -> Plan[FenceReply]:
    rows = yield Statement(
        "DELETE FROM retryproof_markers WHERE id = ? AND token = ? RETURNING 1", (command.id, command.token)
    )
    return reply if rows else LOST


def release(commands: Sequence[Release], now: int) -> Plan[list[FenceReply]]:
    """Give each operation back."""
    return (yield from _fenced(commands, lambda record, command: table.settle(record, command, now)))


def renew(commands: Sequence[Renew], now: int) -> Plan[list[FenceReply]]:
    """Extend each lease."""
    return (yield from _fenced(commands, lambda record, command: table.renew(record, command, now)))


def checkpoint(commands: Sequence[Checkpoint]) -> Plan[list[FenceReply]]:
    """Keep each value under its name."""
    return (yield from _fenced(commands, table.checkpoint))


def _fenced(
    commands: Sequence[Fenced],
    decide: Callable[[Record | None, Fenced], tuple[Record | None, FenceReply]],
) -> Plan[list[FenceReply]]:
    found = yield from _load([command.id for command in commands])
    decided = [decide(found.get(command.id), command) for command in commands]
    yield Statement(_REPLACE, [_to_row(written) for written, _ in decided if written is not None], many=True)
    return [reply for _, reply in decided]


def get(ids: Sequence[bytes], now: int) -> Plan[list[Record | None]]:
    """Each record as it stands, expired ones as None."""
    found = yield from _load(ids)
    return [_unexpired(found.get(id), now) for id in ids]


def _unexpired(record: Record | None, now: int) -> Record | None:
    return None if record is None or record.expired(now) else replace(record, read_at=now)


def scan(
    prefix: bytes, state: State | None, tenant: bytes | None, after: bytes, limit: int, now: int
) -> Plan[list[Record]]:
    """A page of unexpired records in the order of their ids."""
    conditions = ["id > ?", "substr(id, 1, ?) = ?", f"({_UNSETTLED} OR expires_at > ?)"]
    parameters: list[Any] = [after, len(prefix), prefix, now]
    if prefix:
        conditions.append("id >= ?")  # where the index starts to read
        parameters.append(prefix)
    if state is not None:
        conditions.append("state = ?")
        parameters.append(int(state))
    if tenant is not None:
        conditions.append("tenant = ?")
        parameters.append(tenant)
    where = " AND ".join(conditions)
    rows = yield Statement(f"{_SELECT} WHERE {where} ORDER BY id LIMIT ?", (*parameters, limit))
    return [replace(_to_record(row), read_at=now) for row in rows]


def evict(ids: Sequence[bytes], now: int) -> Plan[list[bool]]:
    """Forget each record, unless its lease is live."""
    found = yield from _load(ids)
    gone = [not (id in found and found[id].live(now)) for id in ids]
    rows = [(id,) for id, is_gone in zip(ids, gone, strict=True) if is_gone]
    yield Statement("DELETE FROM retryproof_operations WHERE id = ?", rows, many=True)
    yield Statement(WORKLIST_SCHEMA)
    yield Statement("DELETE FROM retryproof_phased WHERE id = ?", rows, many=True)
    yield Statement("DELETE FROM retryproof_markers WHERE id = ?", rows, many=True)
    return gone


def unmark(ids: Sequence[bytes]) -> Plan[None]:
    """Remove the markers of operations that somebody settled."""
    yield Statement("DELETE FROM retryproof_markers WHERE id = ?", [(id,) for id in ids], many=True)


def find_over(limit: int, now: int) -> Plan[tuple[list[int], list[Record], bool]]:
    """Of records whose time is over the settled ones' rowids and the unsettled ones; whether there are more."""
    rows = yield Statement(
        f"SELECT rowid, {_UNSETTLED} FROM retryproof_operations WHERE {_OVER} LIMIT ?", (now, now, limit + 1)
    )
    settled = [row[0] for row in rows[:limit] if not row[1]]
    unsettled: list[Record] = []
    for rowid in (row[0] for row in rows[:limit] if row[1]):
        found = yield Statement(f"{_SELECT} WHERE rowid = ? AND {_OVER} AND ({_UNSETTLED})", (rowid, now, now))
        unsettled += (replace(_to_record(row), read_at=now) for row in found)
    return settled, unsettled, len(rows) > limit


def remove_over(rowids: Sequence[int], now: int) -> Plan[int]:
    """Remove those of the rows that are settled and whose time is over: how many."""
    where = f"rowid = ? AND {_OVER} AND NOT ({_UNSETTLED})"
    return len((yield from _remove(where, [(rowid, now, now) for rowid in rowids])))


def end(told: Sequence[Record], now: int) -> Plan[list[bytes]]:
    """Remove unsettled records whose end was told, as long as they are what they were; the ids of those."""
    where = f"id = ? AND nonce = ? AND token = ? AND {_OVER}"
    return (yield from _remove(where, [(record.id, record.nonce, record.token, now, now) for record in told]))


def _remove(where: str, parameters: Sequence[Row]) -> Plan[list[bytes]]:
    """Remove single records, and with each what the completer's worklist has of it: nobody's input outlives its
    operation."""
    yield Statement(WORKLIST_SCHEMA)
    gone: list[bytes] = []
    for values in parameters:
        rows = yield Statement(f"DELETE FROM retryproof_operations WHERE {where} RETURNING id", values)
        gone += (row[0] for row in rows)
    yield Statement("DELETE FROM retryproof_phased WHERE id = ?", [(id,) for id in gone], many=True)
    yield Statement("DELETE FROM retryproof_markers WHERE id = ?", [(id,) for id in gone], many=True)
    return gone


def _load(ids: Sequence[bytes]) -> Plan[Mapping[bytes, Record]]:
    rows = yield Statement(_select_by_ids(len(ids)), ids)
    return {row[0]: _to_record(row) for row in rows}


@lru_cache(maxsize=512)
def _select_by_ids(number: int) -> str:
    """The text as one and the same object, which the driver finds its compiled statement by at once."""
    return f"{_SELECT} WHERE id IN ({', '.join('?' * number)})"


def _to_row(record: Record) -> Row:
    kept = {name: value.hex() for name, value in record.checkpoints.items()}
    return (
        record.id,
        int(record.state),
        record.fingerprint,
        record.birth,
        record.nonce,
        record.token,
        record.attempt,
        record.deaths,
        int(record.counts),
        record.first_seen,
        record.lease_until,
        record.expires_at,
        record.retention,
        record.tenant,
        record.trace,
        json.dumps(kept) if kept else None,
        record.result,
    )


def _to_record(row: Row) -> Record:
    kept = row[15]
    return Record(
        id=row[0],
        state=State(row[1]),
        fingerprint=row[2],
        birth=row[3],
        nonce=row[4],
        token=row[5],
        attempt=row[6],
        deaths=row[7],
        counts=bool(row[8]),
        first_seen=row[9],
        lease_until=row[10],
        expires_at=row[11],
        retention=row[12],
        tenant=row[13],
        trace=row[14],
        checkpoints={name: bytes.fromhex(value) for name, value in json.loads(kept).items()} if kept else NOTHING,
        result=row[16],
        committed=bool(row[17]),
    )
