"""One object for each engine, found by the name that stores and callers' connections give it.

A third engine is a folder beside `postgres` and `sqlite` that holds such an object, and a line in `dialects`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from retryproof.core.batch import Batch
from retryproof.core.commands import Complete, FenceReply, Renew
from retryproof.core.hold import Hold
from retryproof.sql.inbox import InboxPlans
from retryproof.sql.outbox import OutboxPlans
from retryproof.sql.plan import Joining, Plan
from retryproof.sql.worklist import WorklistPlans


class JoinedPlans(ABC):
    """Plans for an operation's record in a caller's transaction (T1)."""

    @abstractmethod
    def join(self, hold: Hold) -> Plan[Joining | None]:
        """Make the transaction that is open the one of this attempt; None where the attempt is not current."""

    @abstractmethod
    def is_joined(self, hold: Hold) -> Plan[bool]:
        """Whether the transaction that is open is the one that was joined; asked where `Dialect.tells_joined`."""

    @abstractmethod
    def complete(self, command: Complete) -> Plan[FenceReply | None]:
        """Settle the operation; None where another transaction is open, which is left as it is."""

    @abstractmethod
    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """Extend each lease, in a transaction that holds the records."""

    @abstractmethod
    def unmark(self, ids: Sequence[bytes]) -> Plan[None]:
        """Remove the markers of operations."""


class Dialect(ABC):
    """One engine.

    name: of its stores, and of callers' connections to it.
    one_writer: a transaction that has written shuts all other writers out. So one that is not ours is rolled back, and
        a caller's transaction always holds the record.
    tells_joined: a transaction can be asked whether it is the one that was joined, and goes on afterwards.
    """

    name: str
    one_writer: bool
    tells_joined: bool

    @abstractmethod
    def joined(self, table: str) -> JoinedPlans:
        """The record in a caller's transaction. table: of the operations, as it stands in SQL."""

    @abstractmethod
    def worklist(self, table: str) -> WorklistPlans:
        """The completer's worklist. table: of the operations, as it stands in SQL."""

    @abstractmethod
    def inbox(self, prefix: str) -> InboxPlans:
        """The inbox. prefix: of the tables, a quoted schema and a dot, or nothing."""

    @abstractmethod
    def outbox(self, prefix: str) -> OutboxPlans:
        """The outbox. prefix: as the inbox's."""
