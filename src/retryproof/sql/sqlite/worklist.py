"""The completer's worklist on SQLite, whose table is made at the first use (T3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retryproof.clock import wall_clock
from retryproof.core.commands import DONE, Checkpoint, FenceReply
from retryproof.core.record import State, microseconds
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.sqlite import records
from retryproof.sql.sqlite.records import WORKLIST_SCHEMA
from retryproof.sql.worklist import ALL_COLUMNS, COLUMNS, Taken, WorklistEntry, columns_of, entry_of

WORKLIST = "retryproof_phased"


class SqliteWorklist:
    """The plans. Each but `checkpoint` and `drop` is several statements: one transaction."""

    def checkpoint(self, command: Checkpoint, entry: WorklistEntry | None, lease: float) -> Plan[FenceReply | None]:
        """See WorklistPlans."""
        reply = yield from records.checkpoint_joined(command)
        if entry is not None and reply == DONE:
            yield from _list(entry, wall_clock(), microseconds(lease))
        return reply

    def take(self, limit: int, hold: float, functions: Sequence[str], unwanted: float) -> Plan[list[Taken]]:
        """See WorklistPlans."""
        now, later = wall_clock(), microseconds(hold)
        yield Statement(WORKLIST_SCHEMA)
        rows = yield Statement(
            f"SELECT {columns_of('w')}, w.tries > 0 AND w.reason IS NULL, "
            f"o.state IN ({State.IN_PROGRESS:d}, {State.RELEASED:d}) AND o.birth = w.birth "
            f"FROM {WORKLIST} AS w LEFT JOIN retryproof_operations AS o ON o.id = w.id "
            f"WHERE w.due_at <= ? AND (w.function IN ({', '.join('?' * len(functions))}) OR w.due_at <= ?) "
            "ORDER BY w.due_at LIMIT ?",
            (now, *functions, now - microseconds(unwanted), limit),
        )
        moved = [(now + later, row[0]) for row in rows]
        yield Statement(
            f"UPDATE {WORKLIST} SET due_at = ?, tries = tries + 1, reason = NULL WHERE id = ?", moved, many=True
        )
        entries = [replace(entry_of(row), tries=row[6] + 1, due_at=now + later) for row in rows]
        return [Taken(entry, bool(row[11]), bool(row[10])) for entry, row in zip(entries, rows, strict=True)]

    def postpone(self, entry: WorklistEntry, seconds: float, reason: str | None) -> Plan[None]:
        """See WorklistPlans."""
        yield Statement(
            f"UPDATE {WORKLIST} SET due_at = ?, reason = ? WHERE id = ? AND birth = ?",
            (wall_clock() + microseconds(seconds), reason, entry.id, entry.birth),
        )

    def revive(self, beyond: float) -> Plan[int]:
        """See WorklistPlans."""
        now = wall_clock()
        yield Statement(WORKLIST_SCHEMA)
        sql = f"UPDATE {WORKLIST} SET due_at = ?, listed_at = ? WHERE due_at > ? RETURNING 1"
        return len((yield Statement(sql, (now, now, now + microseconds(beyond)))))

    def drop(self, entry: WorklistEntry) -> Plan[None]:
        """See WorklistPlans."""
        yield Statement(f"DELETE FROM {WORKLIST} WHERE id = ? AND birth = ?", (entry.id, entry.birth))

    def entries(self, limit: int) -> Plan[list[WorklistEntry]]:
        """See WorklistPlans."""
        yield Statement(WORKLIST_SCHEMA)
        rows = yield Statement(f"SELECT {ALL_COLUMNS} FROM {WORKLIST} ORDER BY due_at LIMIT ?", (limit,))
        return [entry_of(row) for row in rows]


def _list(entry: WorklistEntry, now: int, lease: int) -> Plan[None]:
    yield Statement(WORKLIST_SCHEMA)
    yield Statement(f"DELETE FROM {WORKLIST} WHERE id = ? AND birth <> ?", (entry.id, entry.birth))
    yield Statement(
        f"INSERT INTO {WORKLIST} ({COLUMNS}, due_at, listed_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
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
