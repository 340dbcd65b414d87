"""The completer's worklist on PostgreSQL (T3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from retryproof.core.commands import Checkpoint, FenceReply
from retryproof.core.record import microseconds
from retryproof.sql.named import dollars
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.postgres import joined, records
from retryproof.sql.postgres.statements import NOW, worklist
from retryproof.sql.worklist import ALL_COLUMNS, COLUMNS, Taken, WorklistEntry, columns_of, entry_of


class PostgresWorklist:
    """The plans of one database. table: of the operations, as it stands in SQL."""

    def __init__(self, table: str) -> None:
        self._table = table
        name = worklist(table)
        self._postpone = dollars(
            f"UPDATE {name} SET due_at = {NOW} + :later::bigint, reason = :reason::text "
            "WHERE id = :id::bytea AND birth = :birth::bytea"
        )
        self._revive = dollars(
            f"UPDATE {name} SET due_at = {NOW}, listed_at = {NOW} WHERE due_at > {NOW} + :later::bigint RETURNING 1"
        )
        self._drop = dollars(f"DELETE FROM {name} WHERE id = :id::bytea AND birth = :birth::bytea")
        self._entries = dollars(f"SELECT {ALL_COLUMNS} FROM {name} ORDER BY due_at LIMIT :limit::bigint")

    def checkpoint(self, command: Checkpoint, entry: WorklistEntry | None, lease: float) -> Plan[FenceReply | None]:
        """See WorklistPlans; one statement."""
        if entry is None:
            return (yield from joined.checkpoint_joined_plan(command, self._table))
        given = (entry.birth, entry.fingerprint, entry.tenant, entry.function, entry.input)
        values = (*records.checkpoint_values(command), microseconds(lease), *given)
        return joined.joined_reply((yield Statement(_checkpoint_and_list(self._table), values)))

    def take(self, limit: int, hold: float, functions: Sequence[str], unwanted: float) -> Plan[list[Taken]]:
        """See WorklistPlans; one statement."""
        values = (limit, microseconds(hold), list(functions), microseconds(unwanted))
        rows = yield Statement(_take(self._table), values)
        return [Taken(entry_of(row), bool(row[11]), row[10]) for row in rows]

    def postpone(self, entry: WorklistEntry, seconds: float, reason: str | None) -> Plan[None]:
        """See WorklistPlans."""
        yield self._postpone(later=microseconds(seconds), reason=reason, id=entry.id, birth=entry.birth)

    def revive(self, beyond: float) -> Plan[int]:
        """See WorklistPlans."""
        return len((yield self._revive(later=microseconds(beyond))))

    def drop(self, entry: WorklistEntry) -> Plan[None]:
        """See WorklistPlans."""
        yield self._drop(id=entry.id, birth=entry.birth)

    def entries(self, limit: int) -> Plan[list[WorklistEntry]]:
        """See WorklistPlans."""
        return [entry_of(row) for row in (yield self._entries(limit=limit))]


@cache
def _checkpoint_and_list(table: str) -> str:
    listing = f"""listed AS (
    INSERT INTO {worklist(table)} AS w (due_at, listed_at, {COLUMNS})
    SELECT {NOW} + $6::bigint, {NOW}, done.id, $7::bytea, $8::bytea, $9::bytea, $10::text, $11::bytea FROM done
    ON CONFLICT (id) DO UPDATE SET due_at = excluded.due_at, listed_at = excluded.listed_at, birth = excluded.birth,
        function = excluded.function, fingerprint = excluded.fingerprint, tenant = excluded.tenant,
        input = excluded.input, tries = 0, reason = NULL
    WHERE w.birth <> excluded.birth
)"""
    return joined.checkpoint_joined(table, listing=listing)


@cache
def _take(table: str) -> str:
    return f"""
WITH clock AS MATERIALIZED (SELECT {NOW} AS now),
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
    RETURNING {columns_of("w").replace("w.reason", "due.reason")}, due.suspect
)
SELECT w.*, o.open FROM taken AS w
LEFT JOIN LATERAL (
    SELECT o.state IN (1, 2) AND o.birth = w.birth AS open FROM {table} AS o WHERE o.id = w.id LIMIT 1
) AS o ON true
"""
