"""Batches for the tasks of one event loop over an async store."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from retryproof.core.commands import Checkpoint, Claim, Complete, Found, Look, Release, Renew, Reply
from retryproof.core.errors import StoreUnavailable
from retryproof.stores.base import AsyncStore
from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.replies import (
    MAX_WAITING,
    Heard,
    Orphaned,
    are_twins,
    as_reply,
    clock,
    interrupted,
    is_orphan,
    not_heard,
    overdue,
    overfull,
    twin_reply,
)

WORTH_SPLITTING = 16
"""Replies from which on they are handed out in portions, so that client and server work at the same time."""
PORTION = 32
"""Replies that are handed out at once, at most; larger portions leave the one or the other idle."""


def _portion(replies: int) -> int:
    return replies if replies < WORTH_SPLITTING else min(PORTION, (replies + 1) // 2)


class _Waiter:
    """A task's command on its way."""

    __slots__ = ("command", "deadline", "future", "overdue", "timeout", "twins")

    def __init__(self, command: Any, future: asyncio.Future[Reply], deadline: float, timeout: float) -> None:
        self.command = command
        self.future = future
        self.deadline = deadline
        self.timeout = timeout
        self.overdue = False
        self.twins: list[_Waiter] | None = None


class _Lane:
    """All commands of one kind for one async store: at most one batch on its way."""

    __slots__ = (
        "_alarm",
        "_answered",
        "_call",
        "_coalescer",
        "_flying",
        "_later",
        "_loop",
        "_pending",
        "_requeued",
        "_size",
        "_task",
        "_twins",
    )

    def __init__(self, coalescer: TaskCoalescer, call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._coalescer = coalescer
        self._call = call
        self._size = coalescer.max_batch
        self._loop = coalescer.loop
        self._pending: dict[bytes, _Waiter] = {}
        self._later: deque[_Waiter] = deque()
        self._twins = 0  # of those in line and on their way
        self._flying: Sequence[_Waiter] = ()
        self._answered: Sequence[_Waiter] = ()  # whose replies are here, and are handed out next: not overdue any more
        self._requeued = False
        self._task: asyncio.Task[None] | None = None
        self._alarm = Alarm(coalescer.loop, self._expire)

    def submit(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """Put a command on its way."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if len(self._pending) + len(self._later) + self._twins >= MAX_WAITING:
            future.set_result(overfull(self._coalescer.name))
            return future
        deadline = clock() + timeout
        waiter = _Waiter(command, future, deadline, timeout)
        self._queue(waiter)
        if self._task is None:
            self._task = self._loop.create_task(self._run())
            self._task.add_done_callback(self._ended)
        if deadline < self._alarm.due:
            self._alarm.set(deadline)
        return future

    def _queue(self, waiter: _Waiter) -> None:
        standing = self._pending.setdefault(waiter.command.id, waiter)
        if standing is waiter:
            return
        if are_twins(standing.command, waiter.command):
            self._twins += 1
            if standing.twins is None:
                standing.twins = []
            standing.twins.append(waiter)
        else:
            self._later.append(waiter)

    async def _run(self) -> None:
        """Send batches until nothing waits."""
        try:
            while self._pending:
                self._flying = self._next_batch()
                if not self._flying:
                    continue
                answers = await self._send([waiter.command for waiter in self._flying])
                await self._hand_out(answers)
        finally:
            self._task = None
            if self._flying or self._answered or self._pending:  # only when this task was cancelled, as its loop ends
                self._abandon()

    async def _hand_out(self, answers: Sequence[Any]) -> None:
        """Answer the batch, in portions.

        What the callers of a portion ask next is under way while the others still work. Who waits for this lane goes
        first: a pause would merge all callers into one crowd that works or waits in step.
        """
        waiters = self._answered = self._flying
        self._flying = ()
        size = _portion(len(waiters))
        for start in range(0, len(waiters), size):
            if start and not self._pending:
                await asyncio.sleep(0)
            self._deliver_all(waiters[start : start + size], answers[start : start + size])
            self._answered = waiters[start + size :]
        if self._requeued:  # by a store that may answer without ever giving way to the loop
            self._requeued = False
            await asyncio.sleep(0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before it has begun runs nothing, not even its end."""
        if self._task is task:
            self._task = None
            self._abandon()

    def _next_batch(self) -> Sequence[_Waiter]:
        if len(self._pending) <= self._size:
            batch, self._pending = list(self._pending.values()), {}
        else:
            batch = [self._pending.pop(id) for id in list(self._pending)[: self._size]]
        for _ in range(len(self._later)):
            self._queue(self._later.popleft())
        return [waiter for waiter in batch if not (waiter.future.done() and self._taken_back(waiter))]

    def _taken_back(self, waiter: _Waiter) -> bool:
        """Whether this, which is answered, does not leave any more: a claim whose caller has left, or what its caller
        was told has not left in time. A twin takes its place."""
        if not isinstance(waiter.command, Claim):
            return waiter.overdue
        for twin in self._twins_of(waiter):
            self._queue(twin)
        return True

    def _twins_of(self, waiter: _Waiter) -> Sequence[_Waiter]:
        """Its twins, which from now on are on their own."""
        if waiter.twins is None:
            return ()
        twins, waiter.twins = waiter.twins, None
        self._twins -= len(twins)
        return twins

    async def _send(self, commands: Sequence[Any]) -> Sequence[Any]:
        try:
            async with asyncio.timeout(self._coalescer.hang_limit):
                answers = list(await self._call(commands))
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            return [error] * len(commands)
        if len(answers) != len(commands):
            broken = StoreUnavailable(f"The store answered {len(answers)} of {len(commands)} commands; it is broken.")
            return [broken] * len(commands)
        self._coalescer.heard()
        return answers

    def _deliver_all(self, waiters: Sequence[_Waiter], answers: Sequence[Any]) -> None:
        for waiter, answer in zip(waiters, answers, strict=True):
            if waiter.twins is None and not isinstance(answer, Exception) and not waiter.future.done():
                waiter.future.set_result(answer)  # nearly always, and then `_deliver` has nothing to add
            else:
                self._deliver(waiter, as_reply(self._coalescer.name, answer))

    def _deliver(self, waiter: _Waiter, reply: Reply) -> None:
        gone = waiter.future.done()
        if not gone:
            waiter.future.set_result(reply)
        elif waiter.future.cancelled() and is_orphan(waiter.command, reply):
            self._coalescer.orphaned(waiter.command, reply)
        for twin in self._twins_of(waiter):
            told = None if gone else twin_reply(reply, waiter.command.lease)
            if twin.future.done():
                continue
            if told is None:
                self._queue(twin)
                self._requeued = True
                if twin.deadline < self._alarm.due:
                    self._alarm.set(twin.deadline)
            else:
                twin.future.set_result(told)

    def _expire(self) -> float:
        """Tell everybody who has waited for too long; when the next is due."""
        now = clock()  # not the loop's time, which on uvloop is that of the round's beginning
        earliest = NEVER
        in_line = [*self._pending.values(), *self._later]
        for waiters, sent in (self._flying, True), (in_line, False):
            for leader in waiters:
                earliest = min(earliest, self._expire_one(leader, now, sent=sent))
                for twin in leader.twins or ():
                    earliest = min(earliest, self._expire_one(twin, now, sent=False))
        return earliest

    def _expire_one(self, waiter: _Waiter, now: float, *, sent: bool) -> float:
        if waiter.future.done():
            return NEVER
        if waiter.deadline > now:
            return waiter.deadline
        waiter.overdue = True
        waiter.future.set_result(overdue(self._coalescer.name, waiter.timeout, sent=sent))
        return NEVER

    def _abandon(self) -> None:
        """The loop shuts down: who still waits gets a definite answer, and may ask again."""
        waiters = [*self._flying, *self._answered, *self._pending.values(), *self._later]
        self._flying, self._answered, self._pending, self._later = (), (), {}, deque()
        self._requeued = False
        orphans: list[Claim] = []
        for waiter in waiters:
            for one in (waiter, *self._twins_of(waiter)):
                if not one.future.done():
                    one.future.set_result(interrupted(self._coalescer.name))
                elif one.future.cancelled() and isinstance(one.command, Claim):
                    orphans.append(one.command)
        for orphan in orphans:  # once everybody is answered, whatever becomes of this
            self._coalescer.orphaned(orphan, None)


class TaskCoalescer:
    """Batches for the tasks of one event loop over an async store."""

    def __init__(
        self, store: AsyncStore, orphaned: Orphaned, heard: Heard = not_heard, *, hang_limit: float = 30.0
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = store.capabilities.name
        self.max_batch = store.capabilities.max_batch
        self.orphaned = orphaned
        self.heard = heard
        self.hang_limit = hang_limit
        self._store = store
        self._lanes = {
            Claim: _Lane(self, store.claim),
            Complete: _Lane(self, store.complete),
            Release: _Lane(self, store.release),
            Renew: _Lane(self, store.renew),
            Checkpoint: _Lane(self, store.checkpoint),
            Look: _Lane(self, self._look),
        }

    def perform(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """One command's reply; Unreachable when there was none in time.

        A claim whose caller is cancelled does not leave, or is released when its reply arrives. Other commands travel.
        """
        return self._lanes[type(command)].submit(command, timeout)

    async def _look(self, looks: Sequence[Look]) -> Sequence[Found]:
        return [Found(record) for record in await self._store.get([look.id for look in looks])]
