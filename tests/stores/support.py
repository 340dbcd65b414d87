"""Claims, and a plan on a caller's own connection, for the tests of PostgreSQL's store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import RawCursor

from retryproof.core.commands import Claim
from retryproof.drive import pump as pumped
from retryproof.sql.plan import Plan, Row, Statement


def new_claim(**changes: Any) -> Claim:
    options: dict[str, Any] = {
        "id": os.urandom(32),
        "fingerprint": b"same",
        "nonce": os.urandom(16),
        "lease": 10.0,
        "retention": 3_600.0,
        "unsettled_retention": 7_200.0,
    }
    return Claim(**(options | changes))


def again(claim: Claim, **changes: Any) -> Claim:
    """Another claim for the same operation."""
    return new_claim(id=claim.id, fingerprint=claim.fingerprint, **changes)


def pump(connection: psycopg.Connection[Any], plan: Plan[Any]) -> Any:
    """Run a plan in the open transaction of a caller's connection."""

    def execute(statement: Statement) -> Sequence[Row]:
        with RawCursor(connection) as cursor:
            cursor.execute(statement.sql.encode(), statement.parameters)
            return cursor.fetchall()

    return pumped(plan, execute)


def until_blocked(connection: psycopg.Connection[Any], pid: int) -> None:
    """Until the backend waits for a lock of this connection's."""
    while not connection.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", (pid,)).fetchall()[0][0]:
        connection.execute("SELECT pg_sleep(0.001)")
