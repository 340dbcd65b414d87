"""Connections that run plans, blocking or awaited, and the contract of the drivers' pools.

A call has a deadline, which includes connecting and waiting for a free connection. At the deadline the client closes
the connection, since a stopped server answers neither a statement nor a request to cancel it. The error then says that
the command may have been done. If an idle connection turns out to be dead, the plan runs a second time on a new one. It
is never retried otherwise: the drivers' own retries are off. A connection is kept only after a clean end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from retryproof.sql.plan import Plan

T = TypeVar("T")


class Pool(Protocol):
    """Blocking connections."""

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan before the deadline. It may run twice, which must be safe.

        Raises StoreUnavailable, and ConfigurationError for a server without the tables.
        """

    def close(self) -> None:
        """Close idle connections; a connection in use is closed when its call ends."""


class LoopPool(Protocol):
    """Connections of one event loop; the contract is Pool's, awaited."""

    async def perform(self, plan: Callable[[], Plan[T]]) -> T: ...

    async def aclose(self) -> None: ...
