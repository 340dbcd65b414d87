"""PostgreSQL as a dialect."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.core.batch import Batch
from retryproof.core.commands import Complete, FenceReply, Renew
from retryproof.core.hold import Hold
from retryproof.sql.dialect import Dialect, JoinedPlans
from retryproof.sql.inbox import InboxPlans
from retryproof.sql.outbox import OutboxPlans
from retryproof.sql.plan import Joining, Plan
from retryproof.sql.postgres import records
from retryproof.sql.postgres.inbox import PostgresInbox
from retryproof.sql.postgres.outbox import PostgresOutbox
from retryproof.sql.postgres.worklist import PostgresWorklist
from retryproof.sql.worklist import WorklistPlans


class PostgresJoined(JoinedPlans):
    """The record in a caller's transaction, each a statement."""

    def __init__(self, table: str) -> None:
        self._table = table

    def join(self, hold: Hold) -> Plan[Joining | None]:
        """See JoinedPlans."""
        return records.join_plan(hold, self._table)

    def is_joined(self, hold: Hold) -> Plan[bool]:
        """See JoinedPlans."""
        return records.is_joined_plan(hold, self._table)

    def complete(self, command: Complete) -> Plan[FenceReply | None]:
        """See JoinedPlans."""
        return records.complete_joined_plan(command, self._table)

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """See JoinedPlans."""
        return records.renew_plan(commands, self._table)

    def unmark(self, ids: Sequence[bytes]) -> Plan[None]:
        """See JoinedPlans."""
        return records.unmark_plan(ids, self._table)


class Postgres(Dialect):
    """PostgreSQL 13 and later."""

    name = "postgresql"
    one_writer = False
    tells_joined = True

    def joined(self, table: str) -> JoinedPlans:
        """See Dialect."""
        return PostgresJoined(table)

    def worklist(self, table: str) -> WorklistPlans:
        """See Dialect."""
        return PostgresWorklist(table)

    def inbox(self, prefix: str) -> InboxPlans:
        """See Dialect."""
        return PostgresInbox(prefix)

    def outbox(self, prefix: str) -> OutboxPlans:
        """See Dialect."""
        return PostgresOutbox(prefix)


POSTGRES = Postgres()
