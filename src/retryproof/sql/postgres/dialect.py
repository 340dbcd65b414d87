"""PostgreSQL as a dialect."""

from __future__ import annotations

from retryproof.sql.dialect import Dialect, JoinedPlans
from retryproof.sql.inbox import InboxPlans
from retryproof.sql.outbox import OutboxPlans
from retryproof.sql.postgres.inbox import PostgresInbox
from retryproof.sql.postgres.joined import PostgresJoined
from retryproof.sql.postgres.outbox import PostgresOutbox
from retryproof.sql.postgres.worklist import PostgresWorklist
from retryproof.sql.worklist import WorklistPlans


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
