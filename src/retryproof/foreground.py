"""An opened store without a background, for a process that is frozen between two calls, as AWS Lambda's is.

    attempt = attempts.begin(Foreground(opened, policy.store_timeout), policy, id, fingerprint)

No lease is renewed, so the policy's lease has to cover the work. No work is left to a thread that may not run: the work
of the keeper is done once, before `begin` and `finish` return (on an event loop, before `settled` returns).

If the store does not answer in that time, this work is given up and logged. A caller gets a result that could not be
stored all the same (`Completed`, `stored` False, and the event UNSTORED). Its record stays in progress until its lease
ends, and then `on_abandoned` decides, as after a crash. So choose `refuse` for work that must not happen twice even
then. A claim without an answer may have been applied: then it holds its operation for one lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator, Sequence
from typing import Any, Protocol

from retryproof.attempt import LoopStore
from retryproof.batches import BatchStore
from retryproof.core.commands import Acquired, Claim, Complete, Done, Found, Look, Lost, Release, Reply
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.record import State
from retryproof.drive import apump, may_stand, pump

logger = logging.getLogger("retryproof")


class Able(Protocol):
    """A store that says what it can do."""

    @property
    def capabilities(self) -> Any: ...


class Opened(BatchStore, Able, Protocol):
    """An opened store for threads."""


class OpenedOnLoop(LoopStore, Able, Protocol):
    """An opened store for the tasks of an event loop."""


class Foreground:
    """An opened store without a background, for threads. timeout: seconds that one call at the end may take."""

    def __init__(self, opened: Opened, timeout: float) -> None:
        self.background = self
        self.capabilities = opened.capabilities
        self.enter = opened.background.enter
        self.leave = opened.background.leave
        self._opened = opened
        self._timeout = timeout

    def perform(self, command: Any, timeout: float) -> Reply:
        """One command's reply. Interrupted, a claim is taken back here, as far as it was applied by then."""
        try:
            return self._opened.perform(command, timeout)
        except BaseException:
            if type(command) is Claim:
                self.disown(command)
            raise

    def perform_many(self, commands: Sequence[Any], timeout: float) -> Sequence[Reply]:
        """Each command's reply, in order; interrupted, as `perform`."""
        try:
            return self._opened.perform_many(commands, timeout)
        except BaseException:
            for command in commands:
                if type(command) is Claim:
                    self.disown(command)
            raise

    def watch(self, hold: Hold) -> None:
        """Nobody renews it."""

    def unwatch(self, hold: Hold) -> None:
        """Nobody renewed it."""

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        """Release this claim now, if it was applied."""
        pump(_take_back(claim, reply), self._perform)

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Settle it once more, now."""
        pump(_settle(hold, last), self._perform)

    def _perform(self, command: Look | Complete | Release) -> Reply:
        return self._opened.perform(command, self._timeout)


class LoopForeground:
    """An opened store without a background, for an event loop; `settled` is awaited before the process may freeze.

    timeout: seconds that one call at the end may take.
    """

    def __init__(self, opened: OpenedOnLoop, timeout: float) -> None:
        self.background = self
        self.loop = opened.loop
        self.capabilities = opened.capabilities
        self.enter = opened.background.enter
        self.leave = opened.background.leave
        self._opened = opened
        self._timeout = timeout
        self._held: set[Hold] = set()
        self._left: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def perform(self, command: Any, timeout: float) -> Awaitable[Reply]:
        """One command's reply. `settled` waits for a claim that is on its way when its caller is cancelled."""
        asked = self._opened.perform(command, timeout)
        return self._claim(command, asyncio.ensure_future(asked)) if type(command) is Claim else asked

    async def _claim(self, claim: Claim, asked: asyncio.Future[Reply]) -> Reply:
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            self._keep(self.loop.create_task(self._take_back_later(claim, asked)))
            raise

    async def _take_back_later(self, claim: Claim, asked: asyncio.Future[Reply]) -> None:
        reply = await asked
        if may_stand(reply):
            await apump(_take_back(claim, reply), self._perform)

    def watch(self, hold: Hold) -> None:
        """Nobody renews it; `settled` waits for its end."""
        self._held.add(hold)

    def unwatch(self, hold: Hold) -> None:
        """It has ended."""
        self._held.discard(hold)
        self._news.set()

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        """Release this claim, if it was applied; `settled` waits for it."""
        self._begin(_take_back(claim, reply))

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Settle it once more; `settled` waits for it."""
        self._begin(_settle(hold, last))

    async def settled(self) -> None:
        """Wait until nothing runs or is left to do, what goes on after a cancellation included."""
        while self._held or self._left:
            self._news.clear()
            await self._news.wait()

    def _begin(self, steps: Generator[Look | Complete | Release, Any, None]) -> None:
        self._keep(self.loop.create_task(apump(steps, self._perform)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._left.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._left.discard(task)
        self._news.set()

    def _perform(self, command: Look | Complete | Release) -> Awaitable[Reply]:
        return self._opened.perform(command, self._timeout)


def _take_back(claim: Claim, reply: Reply) -> Generator[Look | Complete | Release, Any, None]:
    """Release a claim, if it was applied."""
    token = reply.token if isinstance(reply, Acquired) else None
    answer: Reply = Lost()
    if token is None:
        answer = yield Look(claim.id)
        record = answer.record if isinstance(answer, Found) else None
        if record is not None and record.nonce == claim.nonce and record.state is State.IN_PROGRESS:
            token = record.token
    if token is not None:
        answer = yield Release(claim.id, claim.nonce, token)
    if not isinstance(answer, Done | Lost):  # not found either: it may be on its way
        logger.error("A claim on operation %s may stand until its lease ends: %s", short_digest(claim.id), answer)


def _settle(hold: Hold, last: Complete | Release) -> Generator[Look | Complete | Release, Any, None]:
    """Settle an attempt once more; its listener hears whether that was stored."""
    answer = yield last
    if not isinstance(answer, Done | Lost):
        logger.error("Operation %s is not settled, and is given up: %s", short_digest(hold.id), answer)
    elif hold.on_settled is not None:
        hold.on_settled(hold, isinstance(answer, Done))
