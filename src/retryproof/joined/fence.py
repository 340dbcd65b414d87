"""The plans of the database that an operation's record is in, for a transaction that it has joined."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from retryproof.core.errors import ConfigurationError
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.sql.dialect import Dialect, JoinedPlans
from retryproof.sql.dialects import DIALECTS
from retryproof.sql.postgres.statements import TABLE
from retryproof.sql.worklist import WorklistPlans


@dataclass(frozen=True, slots=True)
class Fence:
    """One database's. table: of the operations, as it stands in SQL."""

    dialect: Dialect
    table: str
    plans: JoinedPlans
    worklist: WorklistPlans


def fence_of(opened: Any, hold: Hold) -> Fence:
    """Those of an opened store; ConfigurationError where no transaction of a caller's reaches its records."""
    opened = getattr(opened, "opened", opened)
    name = opened.capabilities.name
    if name not in DIALECTS:
        raise ConfigurationError(
            f"The store is {name}; work and result can only commit together where the records are in the database of "
            "the work: use a postgresql:// or sqlite:// store.",
            digest=short_digest(hold.id),
        )
    return _fence(name, getattr(opened.store, "table", TABLE))


@cache
def _fence(name: str, table: str) -> Fence:
    dialect = DIALECTS[name]
    return Fence(dialect, table, dialect.joined(table), dialect.worklist(table))
