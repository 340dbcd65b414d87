"""A record in a caller's transaction on PostgreSQL: how an attempt joins it, and settles in it (T1).

Each plan is one statement: a plain UPDATE of the one row, which waits for its lock and looks at the newest version. The
completion is the last statement before the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from retryproof.core.batch import Batch
from retryproof.core.commands import DONE, LOST, Checkpoint, Complete, FenceReply, Renew
from retryproof.core.hold import Hold
from retryproof.sql.dialect import JoinedPlans
from retryproof.sql.plan import Joining, Plan, Row, Statement
from retryproof.sql.postgres import records
from retryproof.sql.postgres.records import checkpoint_values
from retryproof.sql.postgres.statements import NOW, TABLE, checkpointed, committed, completed, gone, markers

_MARK = "retryproof.joined"
"""A setting that lasts as long as its transaction."""

_JOINED = """
UPDATE {table} AS o SET {changes}
WHERE o.id = $1::bytea AND o.nonce = $2::bytea AND o.token = $3::bigint AND o.state = 1
    AND current_setting('{mark}', true) = ($3::bigint)::text
    AND NOT EXISTS (SELECT FROM {markers} AS m WHERE m.id = o.id AND m.token <> o.token AND m.token >= o.first_seen)
RETURNING o.id
"""

_JOIN = """
WITH held AS (
    SELECT o.id, o.token, {committed} AS committed FROM {table} AS o
    WHERE o.id = $1::bytea AND o.nonce = $2::bytea AND o.token = $3::bigint AND o.state = 1
),
marked AS (
    INSERT INTO {markers} (id, token) SELECT id, token FROM held WHERE NOT committed RETURNING xmin
)
SELECT set_config('{mark}', CASE WHEN NOT held.committed THEN held.token::text ELSE '' END, true),
    EXISTS (
        SELECT FROM {table} AS l WHERE l.id = held.id
        AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable') FOR NO KEY UPDATE
    ),
    held.committed,
    (SELECT xmin <> pg_current_xact_id()::xid FROM marked)
FROM held
"""


@cache
def join(table: str) -> str:
    """Mark the transaction as the one of a current attempt, until it ends; a row where the attempt is current.

    The marker is a row, and a setting that ends with the transaction. It says whether the record is locked from now on,
    as it is where all statements share this one's snapshot; whether another marker was committed; and whether this is a
    savepoint, whose rows have a transaction id of their own.
    """
    return _JOIN.format(table=table, markers=markers(table), mark=_MARK, committed=committed("o", table))


def joined(table: str) -> str:
    """Whether the transaction that is open is the one of this token."""
    return f"SELECT coalesce(current_setting('{_MARK}', true) = ($1::bigint)::text, false)"


@cache
def complete_joined(table: str, *, listed: bool = False) -> str:
    """Settle one operation in the transaction that `join` marked, waiting for the row.

    listed: take it off the completer's worklist as well.
    """
    settling = _JOINED.format(table=table, changes=completed("$4::bytea", NOW), mark=_MARK, markers=markers(table))
    return _unmarking(table, settling, f", {gone(table)}" if listed else "")


def _unmarking(table: str, settling: str, more: str = "") -> str:
    """Settle and remove the marker that `join` left; the id, and whether this is the transaction that was joined."""
    return f"""
WITH done AS ({settling}),
unmarked AS (
    DELETE FROM {markers(table)} WHERE id = $1::bytea AND token = $3::bigint AND EXISTS (SELECT FROM done) RETURNING id
){more}
SELECT (SELECT id FROM unmarked), coalesce(current_setting('{_MARK}', true) = ($3::bigint)::text, false)
"""


@cache
def checkpoint_joined(table: str, *, listing: str = "") -> str:
    """Keep one value in the transaction that `join` marked, waiting for the row; listing: a CTE that reads `done`."""
    changes = checkpointed("$4::text", "$5::text")
    settling = _JOINED.format(table=table, changes=changes, mark=_MARK, markers=markers(table))
    return _unmarking(table, settling, f", {listing}" if listing else "")


def join_plan(hold: Hold, table: str = TABLE) -> Plan[Joining | None]:
    """Make the transaction that is open the one of this attempt; whether it holds the record's row from now on.

    None where no record says that the attempt is current. Where statements share one snapshot (REPEATABLE READ,
    SERIALIZABLE) a renewal after it would make the completion fail, so the row is locked at once: then it cannot be
    renewed, which it need not be, as nobody takes over what is locked.
    """
    rows = yield Statement(join(table), (hold.id, hold.nonce, hold.token))
    if not rows:
        return None
    _, held, marked, nested = rows[0]
    return Joining(bool(held), committed=bool(marked), nested=bool(nested))


def is_joined_plan(hold: Hold, table: str = TABLE) -> Plan[bool]:
    """Whether the transaction that is open is the one that was joined."""
    return bool((yield Statement(joined(table), (hold.token,)))[0][0])


def complete_joined_plan(command: Complete, table: str = TABLE) -> Plan[FenceReply | None]:
    """Settle the operation in the transaction that was joined; None in another one, which is left as it is."""
    sql = complete_joined(table, listed=command.listed)
    rows = yield Statement(sql, (command.id, command.nonce, command.token, command.result))
    return joined_reply(rows)


def checkpoint_joined_plan(command: Checkpoint, table: str = TABLE) -> Plan[FenceReply | None]:
    """Keep a value in the transaction that was joined; None in another one, which is left as it is."""
    return joined_reply((yield Statement(checkpoint_joined(table), checkpoint_values(command))))


def joined_reply(rows: Sequence[Row]) -> FenceReply | None:
    """What a statement in a transaction that was joined came to."""
    id, ours = rows[0]
    if id is not None:
        return DONE
    return LOST if ours else None


class PostgresJoined(JoinedPlans):
    """The record in a caller's transaction, each a statement."""

    def __init__(self, table: str) -> None:
        self._table = table

    def join(self, hold: Hold) -> Plan[Joining | None]:
        """See JoinedPlans."""
        return join_plan(hold, self._table)

    def is_joined(self, hold: Hold) -> Plan[bool]:
        """See JoinedPlans."""
        return is_joined_plan(hold, self._table)

    def complete(self, command: Complete) -> Plan[FenceReply | None]:
        """See JoinedPlans."""
        return complete_joined_plan(command, self._table)

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """See JoinedPlans."""
        return records.renew_plan(commands, self._table)

    def unmark(self, ids: Sequence[bytes]) -> Plan[None]:
        """See JoinedPlans."""
        return records.unmark_plan(ids, self._table)
