"""Connections that run plans, in both colours, and the one contract that the drivers' pools keep.

A call has a deadline, which connecting and waiting for a free connection are part of. At the deadline the client cuts
the connection: a server that has stopped answers neither a statement nor a request to cancel it. The error says then
that what was asked may have been done. A plan is run once more where an idle connection turns out to be dead, on a new
one, and never otherwise: drivers' own retries are off. A connection is kept only after a clean end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from retryproof.sql.plan import Plan

T = TypeVar("T")


class Pool(Protocol):
    """Connections that block."""

    def perform(self, plan: Callable[[], Plan[T]]) -> T:
        """Run a plan before the deadline. As it may be run twice, it has to bear that.

        Raises StoreUnavailable, and ConfigurationError for a server without the tables.
        """

    def close(self) -> None:
        """Close what is idle; what is in use is closed when its call ends."""


class LoopPool(Protocol):
    """Connections of one event loop; the contract is Pool's, awaited."""

    async def perform(self, plan: Callable[[], Plan[T]]) -> T: ...

    async def aclose(self) -> None: ...
