"""SQLite as a dialect."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.clock import wall_clock
from retryproof.core.batch import Batch
from retryproof.core.commands import Complete, FenceReply, Renew
from retryproof.core.hold import Hold
from retryproof.sql.dialect import Dialect, JoinedPlans
from retryproof.sql.inbox import InboxPlans
from retryproof.sql.outbox import OutboxPlans
from retryproof.sql.plan import Joining, Plan
from retryproof.sql.sqlite import records
from retryproof.sql.sqlite.inbox import SqliteInbox
from retryproof.sql.sqlite.outbox import SqliteOutbox
from retryproof.sql.sqlite.worklist import SqliteWorklist
from retryproof.sql.worklist import WorklistPlans


class SqliteJoined(JoinedPlans):
    """The record in a caller's transaction."""

    def join(self, hold: Hold) -> Plan[Joining | None]:
        """See JoinedPlans."""
        return records.join(hold)

    def is_joined(self, hold: Hold) -> Plan[bool]:
        """Never asked: only releasing the savepoint would tell, and a transaction that lacks it may fail by that."""
        raise NotImplementedError

    def complete(self, command: Complete) -> Plan[FenceReply | None]:
        """See JoinedPlans."""
        return records.complete_joined(command, wall_clock())

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """See JoinedPlans."""
        return records.renew(commands, wall_clock())

    def unmark(self, ids: Sequence[bytes]) -> Plan[None]:
        """See JoinedPlans."""
        return records.unmark(ids)


class Sqlite(Dialect):
    """SQLite 3.35 and later, in a file that has the tables under their own names."""

    name = "sqlite"
    one_writer = True
    tells_joined = False

    def joined(self, table: str) -> JoinedPlans:
        """See Dialect."""
        return SqliteJoined()

    def worklist(self, table: str) -> WorklistPlans:
        """See Dialect."""
        return SqliteWorklist()

    def inbox(self, prefix: str) -> InboxPlans:
        """See Dialect."""
        return SqliteInbox()

    def outbox(self, prefix: str) -> OutboxPlans:
        """See Dialect."""
        return SqliteOutbox()


SQLITE = Sqlite()
