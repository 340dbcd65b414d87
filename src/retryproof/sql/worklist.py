"""The completer's worklist, as plans for both dialects: phased operations that are under way (T3).

A row is written in the transaction of the first phase that is committed, behind the fence, and goes with the completion
of its record. Who takes a row does so by moving its due time, in a short statement that passes over locked rows; what
keeps an operation from being run twice is the claim alone, so a row that is taken twice costs a claim and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from retryproof.clock import wall_clock
from retryproof.core.commands import DONE, Checkpoint, FenceReply
from retryproof.core.record import State, microseconds
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.postgres import records as postgres
from retryproof.sql.postgres import statements
from retryproof.sql.postgres.statements import WORKLIST, worklist
from retryproof.sql.sqlite import records as sqlite_plans
from retryproof.sql.sqlite.records import WORKLIST_SCHEMA

_COLUMNS = "id, birth, fingerprint, tenant, function, input"
_ALL = f"{_COLUMNS}, tries, due_at, listed_at, reason"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row.

    function: the name that it is registered by. input: what it is given and for whom, sealed where that is wished.
    tries: how often a completer took it. reason: why it failed last; None while it runs.
    due_at, listed_at: microseconds of the database's clock since the epoch.
    """

    id: bytes
    birth: bytes
    fingerprint: bytes
    tenant: bytes
    function: str
    input: bytes
    tries: int = 0
    due_at: int = 0
    listed_at: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """A row that was taken.

    open: its record is there and not settled. suspect: who took it before did not live to say what came of it.
    """

    entry: Entry
    open: bool
    suspect: bool = False


class Worklist:
    """The plans of one database. table: of the operations, as it stands in SQL."""

    def __init__(self, dialect: str, table: str) -> None:
        self._sqlite = dialect == "sqlite"
        self._table = table
        self._name = WORKLIST if self._sqlite else worklist(table)

    def checkpoint(self, command: Checkpoint, entry: Entry | None, lease: float) -> Plan[FenceReply | None]:
        """Keep a recovery point in the caller's transaction, fenced, and list the operation where there is an entry.

        None where another transaction is open than the one that was joined.

        lease: seconds before which nobody needs to look after it.
        """
        if self._sqlite:
            reply = yield from sqlite_plans.checkpoint_joined(command)
            if entry is not None and reply == DONE:
                yield from _list_sqlite(entry, wall_clock(), microseconds(lease))
            return reply
        if entry is None:
            return (yield from postgres.checkpoint_joined_plan(command, self._table))
        given = (entry.birth, entry.fingerprint, entry.tenant, entry.function, entry.input)
        values = (*postgres.checkpoint_values(command), microseconds(lease), *given)
        return postgres.joined_reply((yield Statement(_checkpoint_and_list(self._table), values)))

    def take(self, limit: int, hold: float, functions: Sequence[str], unwanted: float) -> Plan[list[Taken]]:
        """Take what is due and postpone it by `hold` seconds, passing over what others are taking.

        functions: whose operations are meant. unwanted: seconds past its due time after which any other is taken too.
        """
        if self._sqlite:
            now = wall_clock()
            return (yield from _take_sqlite(limit, now, microseconds(hold), functions, now - microseconds(unwanted)))
        values = (limit, microseconds(hold), list(functions), microseconds(unwanted))
        rows = yield Statement(_take(self._table), values)
        return [Taken(_entry(row), bool(row[11]), row[10]) for row in rows]

    def postpone(self, entry: Entry, seconds: float, reason: str | None) -> Plan[None]:
        """Look at it again in so many seconds."""
        later, which = microseconds(seconds), (reason, entry.id, entry.birth)
        if self._sqlite:
            parameters = (wall_clock() + later, *which)
            yield Statement(f"UPDATE {WORKLIST} SET due_at = ?, reason = ? WHERE id = ? AND birth = ?", parameters)
            return
        yield Statement(
            f"UPDATE {self._name} SET due_at = {_NOW} + $1::bigint, reason = $2::text "
            "WHERE id = $3::bytea AND birth = $4::bytea",
            (later, *which),
        )

    def revive(self, beyond: float) -> Plan[int]:
        """Make due, as if it had just been listed, what is put off by more than so many seconds; how many."""
        later, now = microseconds(beyond), wall_clock()
        if self._sqlite:
            yield Statement(WORKLIST_SCHEMA)
            sql = f"UPDATE {WORKLIST} SET due_at = ?, listed_at = ? WHERE due_at > ? RETURNING 1"
            return len((yield Statement(sql, (now, now, now + later))))
        sql = (
            f"UPDATE {self._name} SET due_at = {_NOW}, listed_at = {_NOW} WHERE due_at > {_NOW} + $1::bigint "
            "RETURNING 1"
        )
        return len((yield Statement(sql, (later,))))

    def drop(self, entry: Entry) -> Plan[None]:
        """Take it off the list."""
        where = "id = ? AND birth = ?" if self._sqlite else "id = $1::bytea AND birth = $2::bytea"
        yield Statement(f"DELETE FROM {self._name} WHERE {where}", (entry.id, entry.birth))

    def entries(self, limit: int) -> Plan[list[Entry]]:
        """What is on the list, the longest due first."""
        if self._sqlite:
            yield Statement(WORKLIST_SCHEMA)
        place = "?" if self._sqlite else "$1::bigint"
        rows = yield Statement(f"SELECT {_ALL} FROM {self._name} ORDER BY due_at LIMIT {place}", (limit,))
        return [_entry(row) for row in rows]


def _entry(row: Row) -> Entry:
    return Entry(*row[:10])


def _columns(prefix: str) -> str:
    return ", ".join(f"{prefix}.{column}" for column in _ALL.split(", "))


# PostgreSQL

_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


@cache
def _checkpoint_and_list(table: str) -> str:
    listing = f"""listed AS (
    INSERT INTO {worklist(table)} AS w (due_at, listed_at, {_COLUMNS})
    SELECT {_NOW} + $6::bigint, {_NOW}, done.id, $7::bytea, $8::bytea, $9::bytea, $10::text, $11::bytea FROM done
    ON CONFLICT (id) DO UPDATE SET due_at = excluded.due_at, listed_at = excluded.listed_at, birth = excluded.birth,
        function = excluded.function, fingerprint = excluded.fingerprint, tenant = excluded.tenant,
        input = excluded.input, tries = 0, reason = NULL
    WHERE w.birth <> excluded.birth
)"""
    return statements.checkpoint_joined(table, listing=listing)


@cache
def _take(table: str) -> str:
    return f"""
WITH clock AS MATERIALIZED (SELECT {_NOW} AS now),
due AS (
    SELECT w.id, w.reason, w.tries > 0 AND w.reason IS NULL AS suspect FROM {worklist(table)} AS w
    WHERE w.due_at <= (SELECT now FROM clock)
        AND (w.function = ANY ($3::text[]) OR w.due_at <= (SELECT now FROM clock) - $4::bigint)
    ORDER BY w.due_at LIMIT $1::bigint
    FOR UPDATE SKIP LOCKED
),
taken AS (
    UPDATE {worklist(table)} AS w SET due_at = clock.now + $2::bigint, tries = w.tries + 1, reason = NULL
    FROM due, clock WHERE w.id = due.id
    RETURNING {_columns("w").replace("w.reason", "due.reason")}, due.suspect
)
SELECT w.*, o.open FROM taken AS w
LEFT JOIN LATERAL (
    SELECT o.state IN (1, 2) AND o.birth = w.birth AS open FROM {table} AS o WHERE o.id = w.id LIMIT 1
) AS o ON true
"""


# SQLite


def _list_sqlite(entry: Entry, now: int, lease: int) -> Plan[None]:
    yield Statement(WORKLIST_SCHEMA)
    yield Statement(f"DELETE FROM {WORKLIST} WHERE id = ? AND birth <> ?", (entry.id, entry.birth))
    yield Statement(
        f"INSERT INTO {WORKLIST} ({_COLUMNS}, due_at, listed_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO NOTHING",
        (
            entry.id,
            entry.birth,
            entry.fingerprint,
            entry.tenant,
            entry.function,
            entry.input,
            now + lease,
            now,
        ),
    )


def _take_sqlite(limit: int, now: int, hold: int, functions: Sequence[str], unwanted: int) -> Plan[list[Taken]]:
    yield Statement(WORKLIST_SCHEMA)
    rows = yield Statement(
        f"SELECT {_columns('w')}, w.tries > 0 AND w.reason IS NULL, "
        f"o.state IN ({State.IN_PROGRESS:d}, {State.RELEASED:d}) AND o.birth = w.birth "
        f"FROM {WORKLIST} AS w LEFT JOIN retryproof_operations AS o ON o.id = w.id "
        f"WHERE w.due_at <= ? AND (w.function IN ({', '.join('?' * len(functions))}) OR w.due_at <= ?) "
        "ORDER BY w.due_at LIMIT ?",
        (now, *functions, unwanted, limit),
    )
    moved = [(now + hold, row[0]) for row in rows]
    yield Statement(
        f"UPDATE {WORKLIST} SET due_at = ?, tries = tries + 1, reason = NULL WHERE id = ?", moved, many=True
    )
    entries = [replace(_entry(row), tries=row[6] + 1, due_at=now + hold) for row in rows]
    return [Taken(entry, bool(row[11]), bool(row[10])) for entry, row in zip(entries, rows, strict=True)]
