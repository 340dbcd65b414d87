"""Notifications by `Outbox.notify`: they wake an idle relay early, and nothing depends on them (T7).

    connect and LISTEN → is it heard what the database is told over another connection? → wait until it is lost → …

The relay tests whether notifications arrive, since a pooler that changes sessions between transactions accepts LISTEN
and delivers nothing. Without notifications, the relay polls as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

from retryproof.sql.database import OwnDatabase

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 60.0
"""The longest pause in seconds before it tries to listen again; the pause is doubled each time."""
HEARING = 5.0
"""Seconds in which what the database was told has to be heard."""

log = logging.getLogger("retryproof.relay")


class Wakeups:
    """Calls `wake` when messages were announced; listens between entering and leaving `heard`."""

    def __init__(self, database: OwnDatabase, wake: Callable[[], None]) -> None:
        self._database = database
        self._wake = wake
        self._probe = ""
        self._probed = asyncio.Event()
        self._said: set[str] = set()
        self._pause = FIRST_PAUSE

    @asynccontextmanager
    async def heard(self) -> AsyncIterator[None]:
        """Listen meanwhile; log problems."""
        listening = asyncio.create_task(self._keep_listening())
        try:
            yield
        finally:
            while not listening.done():  # again, where connecting took the first one for its own
                listening.cancel()
                await asyncio.wait({listening}, timeout=0.1)

    async def _keep_listening(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever keeps it from listening, the relay works without
                self._say("cannot listen for notifications; looking from time to time instead", str(error))
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    async def _listen(self) -> None:
        """Listen until the connection is lost."""
        listener = await self._database.listen(self._notified)
        try:
            if not await self._hears():
                self._say(
                    "LISTEN is taken, but notifications do not arrive: is this a pooler in transaction mode? Looking "
                    "from time to time instead; listen=False (--no-listen) keeps it from trying"
                )
                return
            log.info("listening for notifications")
            self._said, self._pause = set(), FIRST_PAUSE
            self._wake()  # for what was announced before
            await listener.lost()
            self._say("lost the connection that listens for notifications; looking from time to time until it is back")
        finally:
            listener.close()

    async def _hears(self) -> bool:
        """Whether what the database is told over another connection arrives."""
        self._probe = f"probe {uuid4()}"
        self._probed.clear()
        await self._database.perform(lambda: self._database.plans.notify(self._probe))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARING):
                await self._probed.wait()
        return self._probed.is_set()

    def _notified(self, payload: str) -> None:
        if not payload:
            self._wake()
        elif payload == self._probe:
            self._probed.set()

    def _say(self, words: str, why: str = "") -> None:
        """Log each problem once, until it works again."""
        if words not in self._said:
            log.warning("%s%s", words, f": {why}" if why else "")
        self._said.add(words)
