"""Claims, plans on a caller's own connection, and a check that tests of several stores share."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg import RawCursor

from retryproof.core.commands import Claim
from retryproof.core.errors import StoreUnavailable
from retryproof.drive import pump as pumped
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.stores.base import AsyncStore, Store
from servers import Instance


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


def check_a_hung_server_is_an_error_in_time(server: Instance, used: Store, new: Store) -> None:
    """Of two stores with a time-out of half a second: one that has connections by now, and one that has none."""
    claim = new_claim()
    acquired = used.claim([claim])
    server.pause()
    for store in (used, new):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"within 0\.5 s"):
            store.claim([claim])
        assert time.monotonic() - start < 1.5
    server.resume()
    assert used.claim([claim]) == acquired
    assert new.claim([claim]) == acquired


async def check_a_hung_server_does_not_hang_the_loop(server: Instance, used: AsyncStore, new: AsyncStore) -> None:
    """`check_a_hung_server_is_an_error_in_time`, awaited; both are closed."""
    claim = new_claim()
    acquired = await used.claim([claim])
    server.pause()
    for store in (used, new):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"within 0\.5 s"):
            await store.claim([claim])
        assert time.monotonic() - start < 1.5
    server.resume()
    assert await used.claim([claim]) == acquired
    assert await new.claim([claim]) == acquired
    await used.aclose()
    await new.aclose()
