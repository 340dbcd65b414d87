"""Batches for the tasks of one event loop over an async store."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

from retryproof.core.commands import Checkpoint, Claim, Complete, Found, Look, Release, Renew, Reply
from retryproof.core.errors import StoreUnavailable
from retryproof.stores.base import AsyncStore
from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.replies import (
    MAX_WAITING,
    Heard,
    Orphaned,
    are_twins,
    as_replies,
    clock,
    interrupted,
    is_orphan,
    not_heard,
    overdue,
    overfull,
    twin_reply,
)

PORTION = 32
"""How many replies are delivered at a time if there are many; larger portions leave client or server idle."""
WORTH_SPLITTING = 2 * PORTION
"""From this number on, replies are delivered in portions, so that client and server work at the same time. Each portion
makes the next call smaller, and a call costs the client as much as the commands of some ten operations."""

_Waiter: TypeAlias = tuple[asyncio.Future[Reply], Any, float, float]
"""A task's command: the future of its reply, the command, its deadline, and the time-out that set it.

Before the answer comes, the future is done only if the caller was cancelled, or got the answer that it is too late.
This is a tuple, since there is one for every command; its twins are in a table of the lane."""


class _Lane:
    """The queue of one kind of command for one async store, and the senders that send it in batches."""

    __slots__ = (
        "_aside",
        "_create_future",
        "_flying",
        "_idle",
        "_later",
        "_ready",
        "_senders",
        "_size",
        "_twins",
        "alarm",
        "call",
        "coalescer",
        "pending",
        "requeued",
    )

    def __init__(self, coalescer: TaskCoalescer, call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]) -> None:
        self.coalescer = coalescer
        self.call = call
        self.pending: dict[bytes, _Waiter] = {}
        self.requeued = False
        self.alarm = Alarm(coalescer.loop, self._expire)
        self._size = coalescer.max_batch
        self._create_future = coalescer.loop.create_future
        self._later: deque[_Waiter] = deque()
        self._twins: dict[asyncio.Future[Reply], list[_Waiter]] = {}  # of those in line and on their way
        self._aside = 0  # how many stand in these two
        self._senders = [_Sender(self) for _ in range(coalescer.batches_in_flight)]
        self._idle = list(self._senders)
        self._ready = True  # a sender is idle, and none is about to fetch what waits
        # Ids under way: they are not sent again before their answers. A single sender does not need this.
        self._flying: set[bytes] | None = set() if len(self._senders) > 1 else None

    def submit(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """Put a command into the queue."""
        future: asyncio.Future[Reply] = self._create_future()
        pending = self.pending
        if len(pending) + self._aside >= MAX_WAITING:
            future.set_result(overfull(self.coalescer.name))
            return future
        deadline = clock() + timeout
        waiter = (future, command, deadline, timeout)
        standing = pending.setdefault(command.id, waiter)
        if standing is not waiter:
            self._set_aside(standing, waiter)
        if deadline < self.alarm.due:  # as in `wake_by`, whose call would cost as much as all of this
            self.alarm.set(deadline)
        if self._ready:
            self._start()
        return future

    def _queue(self, waiter: _Waiter) -> None:
        standing = self.pending.setdefault(waiter[1].id, waiter)
        if standing is not waiter:
            self._set_aside(standing, waiter)

    def _set_aside(self, standing: _Waiter, waiter: _Waiter) -> None:
        """Its id is in the queue already: it gets that command's answer, or is sent later."""
        self._aside += 1
        if are_twins(standing[1], waiter[1]):
            self._twins.setdefault(standing[0], []).append(waiter)
        else:
            self._later.append(waiter)

    def _start(self) -> None:
        self._ready = False
        self._idle.pop().start()

    # For senders

    def next_batch(self) -> Sequence[_Waiter]:
        """The next batch, with each id once; empty if nothing waits, or if the ids that wait are under way already."""
        while taken := self._take():
            if self._later:
                self._queue_later()
            batch = [waiter for waiter in taken if not (waiter[0].done() and self._taken_back(waiter))]
            if batch:
                self._ready = bool(self._idle)
                if self._flying is not None:
                    self._flying.update(waiter[1].id for waiter in batch)
                    if self._ready and self.pending:
                        self._start()
                return batch
        return ()

    def _queue_later(self) -> None:
        """Give commands that waited for their id one more turn."""
        for _ in range(len(self._later)):
            self._aside -= 1
            self._queue(self._later.popleft())

    def _take(self) -> Collection[_Waiter]:
        pending = self.pending
        if self._flying is None and len(pending) <= self._size:
            self.pending = {}
            return pending.values()
        flying = self._flying or ()
        return [pending.pop(id) for id in list(islice((id for id in pending if id not in flying), self._size))]

    def _taken_back(self, waiter: _Waiter) -> bool:
        """Whether this answered command must not be sent any more: a claim whose caller has left, or a command whose
        caller got a time-out before it was sent. A twin takes its place."""
        if not isinstance(waiter[1], Claim):
            return not waiter[0].cancelled()
        for twin in self._twins_of(waiter):
            self._queue(twin)
        return True

    def landed(self, batch: Sequence[_Waiter]) -> None:
        """These are not under way any more."""
        if self._flying is not None:
            self._flying.difference_update(waiter[1].id for waiter in batch)

    def deliver(self, waiters: Sequence[_Waiter], replies: Sequence[Reply]) -> None:
        """Deliver replies."""
        if self._twins:
            for waiter, reply in zip(waiters, replies, strict=True):
                self._deliver(waiter, reply)
            return
        for waiter, reply in zip(waiters, replies, strict=True):
            try:
                waiter[0].set_result(reply)
            except asyncio.InvalidStateError:  # its caller has left, or was told that it is too late
                self._deliver(waiter, reply)

    def _deliver(self, waiter: _Waiter, reply: Reply) -> None:
        future, command, _, _ = waiter
        gone = future.done()
        if not gone:
            future.set_result(reply)
        elif future.cancelled() and is_orphan(command, reply):
            self.coalescer.orphaned(command, reply)
        for twin in self._twins_of(waiter):
            told = None if gone else twin_reply(reply, command.lease)
            if twin[0].done():
                continue
            if told is None:
                self._queue(twin)
                self.requeued = True
                self.alarm.wake_by(twin[2])
            else:
                twin[0].set_result(told)

    def _twins_of(self, waiter: _Waiter) -> Sequence[_Waiter]:
        """Return its twins, which from now on are independent."""
        twins = self._twins.pop(waiter[0], ())
        self._aside -= len(twins)
        return twins

    def rest(self, sender: _Sender) -> None:
        """A sender has nothing to send."""
        self._idle.append(sender)
        self._ready = True

    def abandon(self, sender: _Sender) -> None:
        """The loop shuts down: waiting callers get a definite answer, and may ask again."""
        self.landed(sender.flying)
        waiters = [*sender.flying, *sender.answered, *self.pending.values(), *self._later]
        self._aside -= len(self._later)
        sender.flying, sender.answered, self.pending, self._later = (), (), {}, deque()
        self.requeued = False
        orphans: list[Claim] = []
        for waiter in waiters:
            for future, command, _, _ in (waiter, *self._twins_of(waiter)):
                if not future.done():
                    future.set_result(interrupted(self.coalescer.name))
                elif future.cancelled() and isinstance(command, Claim):
                    orphans.append(command)
        for orphan in orphans:  # once everybody is answered, whatever becomes of this
            self.coalescer.orphaned(orphan, None)

    # In time

    def _expire(self) -> float:
        """Answer all callers that have waited too long, and abort calls that hang; return the next deadline."""
        now = clock()  # not the loop's time, which on uvloop is that of the round's beginning
        earliest = self._expire_all([*self.pending.values(), *self._later], now, sent=False)
        for sender in self._senders:
            if sender.flying:
                earliest = min(earliest, self._expire_all(sender.flying, now, sent=True), sender.expire(now))
        return earliest

    def _expire_all(self, waiters: Iterable[_Waiter], now: float, *, sent: bool) -> float:
        earliest = NEVER
        for waiter in waiters:
            earliest = min(earliest, self._expire_one(waiter, now, sent=sent))
            for twin in self._twins.get(waiter[0], ()):
                earliest = min(earliest, self._expire_one(twin, now, sent=False))
        return earliest

    def _expire_one(self, waiter: _Waiter, now: float, *, sent: bool) -> float:
        future, _, deadline, timeout = waiter
        if future.done():
            return NEVER
        if deadline > now:
            return deadline
        future.set_result(overdue(self.coalescer.name, timeout, sent=sent))
        return NEVER


class _Sender:
    """Sends a lane's batches, one after the other, in a task that ends when nothing waits.

    flying: commands under way. answered: commands whose replies have come and are delivered next: not overdue any more.
    """

    __slots__ = ("_broken_off", "_hangs_at", "_lane", "_task", "answered", "flying")

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane
        self.flying: Sequence[_Waiter] = ()
        self.answered: Sequence[_Waiter] = ()
        self._task: asyncio.Task[None] | None = None
        self._hangs_at = NEVER
        self._broken_off = False

    def start(self) -> None:
        """Take the waiting commands in the loop's next round, when more may have come."""
        self._broken_off = False
        self._task = self._lane.coalescer.loop.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before it has begun runs nothing, not even its end."""
        if self._task is task:
            self._task = None
            self._lane.rest(self)
            self._lane.abandon(self)

    async def _run(self) -> None:
        lane = self._lane
        try:
            while batch := lane.next_batch():
                self.flying = batch
                answers = await self._ask([waiter[1] for waiter in batch])
                replies = as_replies(lane.coalescer.name, answers)
                lane.landed(batch)
                self.flying, self.answered = (), batch
                if len(batch) < WORTH_SPLITTING:
                    lane.deliver(batch, replies)
                else:
                    await self._deliver_in_portions(batch, replies)
                self.answered = ()
                if lane.requeued:  # by a store that may answer without ever yielding to the loop
                    lane.requeued = False
                    await asyncio.sleep(0)
        except BaseException:  # it is cancelled as its loop ends
            lane.abandon(self)
            raise
        finally:
            self._task = None
            lane.rest(self)

    async def _ask(self, commands: Sequence[Any]) -> Sequence[Any]:
        lane = self._lane
        self._hangs_at = clock() + lane.coalescer.hang_limit
        lane.alarm.wake_by(self._hangs_at)
        try:
            answers: Sequence[Any] = list(await lane.call(commands))
        except asyncio.CancelledError:
            if not self._stopped_by_alarm():
                raise
            return [TimeoutError()] * len(commands)
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            self._stopped_by_alarm()
            return [error] * len(commands)
        self._stopped_by_alarm()
        if len(answers) != len(commands):
            broken = StoreUnavailable(f"The store answered {len(answers)} of {len(commands)} commands; it is broken.")
            return [broken] * len(commands)
        lane.coalescer.heard()
        return answers

    def expire(self, now: float) -> float:
        """Abort the call if it hangs; return when that is due."""
        if self._hangs_at > now or self._task is None:
            return self._hangs_at
        self._hangs_at, self._broken_off = NEVER, True
        self._task.cancel()
        return NEVER

    def _stopped_by_alarm(self) -> bool:
        """Whether the alarm has cancelled the task, and nobody else; that cancellation is over."""
        if not self._broken_off or self._task is None:
            return False
        self._broken_off = False
        return self._task.uncancel() == 0

    async def _deliver_in_portions(self, batch: Sequence[_Waiter], replies: Sequence[Reply]) -> None:
        """Let the callers of a portion send their next commands while the others still work.

        Waiting commands are sent before that: a pause would make all callers work or wait at the same time.
        """
        lane = self._lane
        for start in range(0, len(batch), PORTION):
            if start and not lane.pending:
                await asyncio.sleep(0)
            lane.deliver(batch[start : start + PORTION], replies[start : start + PORTION])
            self.answered = batch[start + PORTION :]


class TaskCoalescer:
    """Batches for the tasks of one event loop over an async store."""

    def __init__(
        self, store: AsyncStore, orphaned: Orphaned, heard: Heard = not_heard, *, hang_limit: float = 30.0
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = store.capabilities.name
        self.max_batch = store.capabilities.max_batch
        self.batches_in_flight = store.capabilities.batches_in_flight
        self.orphaned = orphaned
        self.heard = heard
        self.hang_limit = hang_limit
        self._store = store
        calls: dict[type, Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]] = {
            Claim: store.claim,
            Complete: store.complete,
            Release: store.release,
            Renew: store.renew,
            Checkpoint: store.checkpoint,
            Look: self._look,
        }
        self.submit = {kind: _Lane(self, call).submit for kind, call in calls.items()}
        """`perform` by kind of command."""

    def perform(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """One command's reply; Unreachable when there was none in time.

        A claim whose caller is cancelled is not sent, or is released when its reply arrives. Other commands are sent.
        """
        return self.submit[type(command)](command, timeout)

    async def _look(self, looks: Sequence[Look]) -> Sequence[Found]:
        return [Found(record) for record in await self._store.get([look.id for look in looks])]
