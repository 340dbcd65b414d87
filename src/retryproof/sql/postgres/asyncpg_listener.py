"""LISTEN over asyncpg: a connection of its own that hears notifications until it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retryproof.sql.postgres.asyncpg import DRIVER_ERRORS, connect_to_primary
from retryproof.sql.postgres.url import explain, parse

if TYPE_CHECKING:
    from retryproof.sql.postgres.asyncpg import Connection

PULSE = 30.0
"""Seconds between two questions whether the server is there still: a cut line says nothing by itself."""


class AsyncpgListener:
    """Listens to one channel. heard: called with each payload, on the event loop."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._lost = asyncio.Event()

    @classmethod
    async def open(cls, url: str, channel: str, heard: Callable[[str], None], timeout: float) -> AsyncpgListener:
        """Connect to the primary and listen; raises StoreUnavailable, also where the server does not let it."""

        def notified(connection: object, pid: int, channel: str, payload: object) -> None:
            heard(str(payload))

        try:
            async with asyncio.timeout(timeout):
                listener = cls(await connect_to_primary(parse(url)), timeout)
                try:
                    listener._connection.add_termination_listener(listener._terminated)
                    await listener._connection.add_listener(channel, notified)
                except BaseException:
                    listener.close()
                    raise
                return listener
        except DRIVER_ERRORS as error:
            raise explain(error, getattr(error, "sqlstate", None)) from error

    async def lost(self) -> None:
        """Wait until the connection is gone."""
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(PULSE):
                    await self._lost.wait()
            except TimeoutError:
                await self._ask()

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._connection.execute("SELECT 1")
        except DRIVER_ERRORS:
            self._lost.set()

    def _terminated(self, connection: Any) -> None:
        self._lost.set()

    def close(self) -> None:
        """Cut the connection."""
        self._connection.terminate()
