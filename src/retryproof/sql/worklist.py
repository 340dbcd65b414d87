"""The completer's worklist, as plans: phased operations that are under way (T3).

The first committed phase writes a row in its transaction, after the fence, and completing the record deletes it. A
completer takes a row by moving its due time, in a short statement that skips locked rows. Only the claim prevents an
operation from running twice, so a row that is taken twice costs one claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retryproof.core.commands import Checkpoint, FenceReply
from retryproof.sql.plan import Plan, Row

COLUMNS = "id, birth, fingerprint, tenant, function, input"
ALL_COLUMNS = f"{COLUMNS}, tries, due_at, listed_at, reason"


@dataclass(frozen=True, slots=True)
class WorklistEntry:
    """One row.

    function: the name that it is registered by. input: its argument and principal, encrypted if there is a sealer.
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

    entry: WorklistEntry
    open: bool
    suspect: bool = False


class WorklistPlans(Protocol):
    """The plans of one database."""

    def checkpoint(self, command: Checkpoint, entry: WorklistEntry | None, lease: float) -> Plan[FenceReply | None]:
        """Keep a recovery point in the caller's transaction, fenced, and list the operation where there is an entry.

        None where another transaction is open than the one that was joined.

        lease: seconds before which nobody needs to look after it.
        """

    def take(self, limit: int, hold: float, functions: Sequence[str], unwanted: float) -> Plan[list[Taken]]:
        """Take what is due and postpone it by `hold` seconds, passing over what others are taking.

        functions: whose operations are meant. unwanted: seconds past its due time after which any other is taken too.
        """

    def postpone(self, entry: WorklistEntry, seconds: float, reason: str | None) -> Plan[None]:
        """Look at it again in so many seconds."""

    def revive(self, beyond: float) -> Plan[int]:
        """Make due, as if it had just been listed, what is put off by more than so many seconds; how many."""

    def drop(self, entry: WorklistEntry) -> Plan[None]:
        """Take it off the list."""

    def entries(self, limit: int) -> Plan[list[WorklistEntry]]:
        """What is on the list, the longest due first."""


def entry_of(row: Row) -> WorklistEntry:
    """The entry of a row that begins with `ALL_COLUMNS`."""
    return WorklistEntry(*row[:10])


def columns_of(prefix: str) -> str:
    """`ALL_COLUMNS` of a table by its alias."""
    return ", ".join(f"{prefix}.{column}" for column in ALL_COLUMNS.split(", "))
