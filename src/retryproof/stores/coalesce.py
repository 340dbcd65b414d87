"""Coalescing: what arrives while a batch is on its way travels in the next one.

No timers and no waiting for company: an idle system sends a batch of one at once, a busy one pays one round trip, one
script, one commit for many operations. An operation's id stands once in a batch. A twin of a claim that has not
left yet is decided by that claim's answer; any other command for the same id travels in the next batch.

`TaskCoalescer` serves the tasks of one event loop over an async store, one lane a kind of command. `ThreadCoalescer`
serves threads over a blocking store: the first to arrive sends the batch for all that have come meanwhile, and the
next in line takes over. `BridgeCoalescer` lets tasks of any loop use the latter through one thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from retryproof.core.commands import (
    Acquired,
    Checkpoint,
    Claim,
    Complete,
    Finished,
    Found,
    Look,
    Mismatch,
    Release,
    Renew,
    Reply,
    Running,
    Unreachable,
)
from retryproof.core.errors import IdempotencyError, StoreUnavailable
from retryproof.stores.base import AsyncStore, HasCommitGroup, Store

IDLE_SECONDS = 10.0
"""A thread with nothing to do for so long ends; the next command starts another."""
MAX_WAITING = 10_000
"""Commands of a kind that may wait for a slow store; more are refused at once."""

Orphaned = Callable[[Claim], None]
clock = time.monotonic


def overdue(name: str, timeout: float) -> Unreachable:
    """The store did not answer in time."""
    return Unreachable(StoreUnavailable(f"The {name} store did not answer within {timeout:g} s; try again."))


def overfull(name: str) -> Unreachable:
    """Too much is waiting for the store."""
    return Unreachable(StoreUnavailable(f"Too many operations wait for the {name} store; try again later."))


def as_reply(name: str, answer: Any) -> Reply:
    """A store's answer as a reply: an exception means that it gave none."""
    if not isinstance(answer, Exception):
        reply: Reply = answer
        return reply
    if isinstance(answer, IdempotencyError):
        return Unreachable(answer)
    error = StoreUnavailable(f"The {name} store failed ({type(answer).__name__}); try again.")
    error.__cause__ = answer
    return Unreachable(error)


def twin_reply(reply: Reply, lease: float) -> Reply | None:
    """What a twin of a claim is told when that claim was answered so; None: it must ask for itself."""
    match reply:
        case Acquired():
            return Running(lease)
        case Running() | Finished() | Mismatch():
            return reply
        case _:
            return None


def are_twins(one: object, other: object) -> bool:
    """Whether two commands for one id are claims for the same input, so that one answer decides both."""
    return isinstance(one, Claim) and isinstance(other, Claim) and one.fingerprint == other.fingerprint


class _Waiter:
    """A task's command on its way."""

    __slots__ = ("command", "deadline", "future", "timeout", "twins")

    def __init__(self, command: Any, future: asyncio.Future[Reply], deadline: float, timeout: float) -> None:
        self.command = command
        self.future = future
        self.deadline = deadline
        self.timeout = timeout
        self.twins: list[_Waiter] | None = None


class _Lane:
    """All commands of one kind for one async store: at most one batch on its way."""

    __slots__ = ("_call", "_coalescer", "_flying", "_later", "_loop", "_pending", "_size", "_task", "_timer")

    def __init__(self, coalescer: TaskCoalescer, call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._coalescer = coalescer
        self._call = call
        self._size = coalescer.max_batch
        self._loop = coalescer.loop
        self._pending: dict[bytes, _Waiter] = {}
        self._later: deque[_Waiter] = deque()
        self._flying: Sequence[_Waiter] = ()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """Put a command on its way."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        deadline = self._loop.time() + timeout
        waiter = _Waiter(command, future, deadline, timeout)
        if len(self._pending) + len(self._later) >= MAX_WAITING:
            future.set_result(overfull(self._coalescer.name))
            return future
        self._queue(waiter)
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._expire)
        return future

    def _queue(self, waiter: _Waiter) -> None:
        standing = self._pending.setdefault(waiter.command.id, waiter)
        if standing is waiter:
            return
        if are_twins(standing.command, waiter.command):
            standing.twins = [*(standing.twins or ()), waiter]
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
                for waiter, answer in zip(self._flying, answers, strict=True):
                    self._deliver(waiter, as_reply(self._coalescer.name, answer))
                self._flying = ()
        finally:
            self._task = None
            if self._pending:  # only when this task was cancelled, as its loop shuts down
                self._abandon(self._pending.values())

    def _next_batch(self) -> Sequence[_Waiter]:
        if len(self._pending) <= self._size:
            batch, self._pending = list(self._pending.values()), {}
        else:
            batch = [self._pending.pop(id) for id in list(self._pending)[: self._size]]
        for _ in range(len(self._later)):
            self._queue(self._later.popleft())
        return [waiter for waiter in batch if not self._taken_back(waiter)]

    def _taken_back(self, waiter: _Waiter) -> bool:
        """Whether this is a claim whose caller left before it was sent; a twin of it takes its place."""
        if not waiter.future.done() or not isinstance(waiter.command, Claim):
            return False
        for twin in waiter.twins or ():
            self._queue(twin)
        return True

    async def _send(self, commands: Sequence[Any]) -> Sequence[Any]:
        try:
            async with asyncio.timeout(self._coalescer.hang_limit):
                answers = await self._call(commands)
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            return [error] * len(commands)
        if len(answers) != len(commands):
            broken = StoreUnavailable(f"The store answered {len(answers)} of {len(commands)} commands; it is broken.")
            return [broken] * len(commands)
        return answers

    def _deliver(self, waiter: _Waiter, reply: Reply) -> None:
        gone = waiter.future.done()
        if not gone:
            waiter.future.set_result(reply)
        elif isinstance(waiter.command, Claim) and isinstance(reply, Acquired | Unreachable):
            self._coalescer.orphaned(waiter.command)
        for twin in waiter.twins or ():
            told = None if gone else twin_reply(reply, waiter.command.lease)
            if twin.future.done():
                continue
            if told is None:
                self._queue(twin)
            else:
                twin.future.set_result(told)

    def _expire(self) -> None:
        """Tell everybody who has waited for too long; come again when the next is due."""
        self._timer = None
        now = self._loop.time()
        earliest = float("inf")
        leaders = [*self._flying, *self._pending.values(), *self._later]
        for waiter in [*leaders, *(twin for leader in leaders for twin in leader.twins or ())]:
            if waiter.future.done():
                continue
            if waiter.deadline <= now:
                waiter.future.set_result(overdue(self._coalescer.name, waiter.timeout))
            else:
                earliest = min(earliest, waiter.deadline)
        if earliest < float("inf"):
            self._timer = self._loop.call_at(earliest, self._expire)

    def _abandon(self, waiters: Iterable[_Waiter]) -> None:
        for waiter in waiters:
            if not waiter.future.done():
                waiter.future.set_result(overdue(self._coalescer.name, 0.0))


class TaskCoalescer:
    """Batches for the tasks of one event loop over an async store."""

    def __init__(self, store: AsyncStore, orphaned: Orphaned, *, hang_limit: float = 30.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = store.capabilities.name
        self.max_batch = store.capabilities.max_batch
        self.orphaned = orphaned
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


class _Entry:
    """A thread's command on its way; `ready` is released when its reply is there or when it is to lead."""

    __slots__ = ("command", "done", "gone", "leads", "ready", "reply", "twins")

    def __init__(self, command: Any) -> None:
        self.command = command
        self.reply: Reply = None
        self.done = False
        self.leads = False
        self.gone = False
        self.twins: list[_Entry] = []
        self.ready = threading.Lock()
        self.ready.acquire()

    def wake(self) -> None:
        """Let the thread that waits look again. Called under the coalescer's mutex."""
        if self.ready.locked():
            self.ready.release()


class ThreadCoalescer:
    """Batches for threads over a blocking store.

    The thread that finds nobody sending becomes the leader: it sends one batch of what is pending, hands out the
    replies, and passes the lead to the next in line. So there is no thread of its own, and no hand-over while one
    thread is alone. Different kinds of command go in one commit where the store can do that.
    """

    def __init__(self, store: Store, orphaned: Orphaned) -> None:
        self.name = store.capabilities.name
        self._orphaned = orphaned
        self._store = store
        self._size = store.capabilities.max_batch
        self._group: Callable[[], AbstractContextManager[None]] = (
            store.commit_group if isinstance(store, HasCommitGroup) else nullcontext
        )
        self._calls: dict[type, Callable[[Any], Sequence[Any]]] = {
            Complete: store.complete,
            Release: store.release,
            Renew: store.renew,
            Checkpoint: store.checkpoint,
            Claim: store.claim,
            Look: self._look,
        }
        self._pending: deque[_Entry] = deque()
        self._mutex = threading.Lock()
        self._leading = False

    def perform(self, command: Any, timeout: float) -> Reply:
        """One command's reply; Unreachable when there was none in time."""
        return self.perform_many((command,), timeout)[0]

    def directly(self, command: Any) -> Reply:
        """One command's reply from a store that never blocks and takes calls from anywhere: nothing to coalesce."""
        try:
            return as_reply(self.name, self._calls[type(command)]((command,))[0])
        except Exception as error:  # noqa: BLE001 - whatever a store raises, the caller gets a definite answer
            return as_reply(self.name, error)

    def perform_many(self, commands: Sequence[Any], timeout: float) -> list[Reply]:
        """Each command's reply, in order."""
        entries = [_Entry(command) for command in commands]
        with self._mutex:
            if len(self._pending) >= MAX_WAITING:
                return [overfull(self.name)] * len(entries)
            self._pending.extend(entries)
            if entries:
                entries[0].leads, self._leading = not self._leading, True
        deadline = clock() + timeout
        try:
            return [self._await(entry, deadline, timeout) for entry in entries]
        except BaseException:  # interrupted: claims of nobody
            for entry in entries:
                self._quit(entry)
            raise

    def _await(self, entry: _Entry, deadline: float, timeout: float) -> Reply:
        while not entry.done:
            if entry.leads:
                self._lead(entry)
            elif not entry.ready.acquire(timeout=max(0.0, deadline - clock())) and self._give_up(entry):
                return overdue(self.name, timeout)
        if entry.leads:  # promoted while its reply was on the way
            with self._mutex:
                entry.leads = False
                self._pass_on()
        return entry.reply

    def _give_up(self, entry: _Entry) -> bool:
        """After a time-out: whether neither the reply nor the lead came in the last moment."""
        with self._mutex:
            if entry.done or entry.leads:
                return False
            entry.gone = True
            if entry in self._pending:
                self._pending.remove(entry)
            return True

    def _quit(self, entry: _Entry) -> None:
        """The caller was interrupted: its command goes on without it."""
        self._give_up(entry)
        with self._mutex:
            if entry.leads:
                entry.leads = False
                self._pass_on()
            if not entry.gone and isinstance(entry.command, Claim):
                self._orphaned(entry.command)

    def _lead(self, leader: _Entry) -> None:
        """Send one batch, then pass the lead on."""
        batch: list[_Entry] = []
        try:
            batch = self._next_batch()
            self._send(batch)
        finally:
            with self._mutex:
                self._hand_out(batch)
                leader.leads = False
                self._pass_on()

    def _pass_on(self) -> None:
        """Hand the lead to the first in line; without one it lies where the next to come finds it."""
        self._leading = bool(self._pending)
        if self._leading:
            self._pending[0].leads = True
            self._pending[0].wake()

    def _next_batch(self) -> list[_Entry]:
        """What is pending, bounded, each id once a kind; twins go with their claim, the rest stays in line."""
        batch: dict[tuple[type, bytes], _Entry] = {}
        left: list[_Entry] = []
        with self._mutex:
            while self._pending and len(batch) < self._size:
                entry = self._pending.popleft()
                standing = batch.setdefault((type(entry.command), entry.command.id), entry)
                if standing is entry:
                    continue
                (standing.twins if are_twins(standing.command, entry.command) else left).append(entry)
            self._pending.extendleft(reversed(left))
        return list(batch.values())

    def _send(self, batch: list[_Entry]) -> None:
        try:
            with self._group() if len(batch) > 1 else nullcontext():
                for kind, call in self._calls.items():
                    entries = [entry for entry in batch if type(entry.command) is kind]
                    answers = call([entry.command for entry in entries]) if entries else ()
                    for entry, answer in zip(entries, answers, strict=True):
                        entry.reply = as_reply(self.name, answer)
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            for entry in batch:
                entry.reply = as_reply(self.name, error)

    def _hand_out(self, batch: list[_Entry]) -> None:
        for entry in batch:
            if entry.reply is None:  # the leader was interrupted
                entry.reply = as_reply(self.name, StoreUnavailable("The call was interrupted; try again."))
            if entry.gone and isinstance(entry.command, Claim) and isinstance(entry.reply, Acquired | Unreachable):
                self._orphaned(entry.command)
            entry.done = True
            entry.wake()
            for twin in entry.twins:
                told = None if entry.gone else twin_reply(entry.reply, entry.command.lease)
                if told is None:
                    self._pending.append(twin)
                else:
                    twin.reply, twin.done = told, True
                    twin.wake()
            entry.twins = []

    def _look(self, looks: Sequence[Look]) -> Sequence[Found]:
        return [Found(record) for record in self._store.get([look.id for look in looks])]


class BridgeCoalescer:
    """Lets the tasks of any event loop use a blocking store through one thread.

    It starts with the first command and ends when there has been none for a while.
    """

    def __init__(self, threads: ThreadCoalescer, orphaned: Orphaned, *, hang_limit: float = 30.0) -> None:
        self.name = threads.name
        self._threads = threads
        self._orphaned = orphaned
        self._hang_limit = hang_limit
        self._waiting: deque[tuple[Any, asyncio.AbstractEventLoop, asyncio.Future[Reply]]] = deque()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    async def perform(self, command: Any, timeout: float) -> Reply:
        """One command's reply; Unreachable when there was none in time."""
        if len(self._waiting) >= MAX_WAITING:
            return overfull(self.name)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        with self._work:
            self._waiting.append((command, loop, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="retryproof-store", daemon=True)
                self._thread.start()
            self._work.notify()
        timer = loop.call_later(timeout, _expire, future, self.name, timeout)
        try:
            return await future
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the thread, after what is waiting."""
        with self._work:
            self._closing = True
            self._work.notify()
            thread = self._thread
        if thread is not None:
            thread.join(self._hang_limit)

    def _serve(self) -> None:
        while True:
            with self._work:
                while not self._waiting:
                    if self._closing or (not self._work.wait(IDLE_SECONDS) and not self._waiting):
                        self._thread = None
                        return
                taken, self._waiting = self._waiting, deque()
            wanted = [
                (command, loop, future)
                for command, loop, future in taken
                if not (future.cancelled() and isinstance(command, Claim))
            ]
            replies = self._threads.perform_many([command for command, _, _ in wanted], self._hang_limit)
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, asyncio.Future[Reply], Reply]]] = {}
            for (command, loop, future), reply in zip(wanted, replies, strict=True):
                by_loop.setdefault(loop, []).append((command, future, reply))
            for loop, answers in by_loop.items():
                self._deliver(loop, answers)

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, answers: list[tuple[Any, asyncio.Future[Reply], Reply]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(self._set_results, answers)
        except RuntimeError:  # the loop is closed: its callers have gone
            for command, _, reply in answers:
                self._undo(command, reply)

    def _set_results(self, answers: list[tuple[Any, asyncio.Future[Reply], Reply]]) -> None:
        for command, future, reply in answers:
            if future.done():
                self._undo(command, reply)
            else:
                future.set_result(reply)

    def _undo(self, command: Any, reply: Reply) -> None:
        if isinstance(command, Claim) and isinstance(reply, Acquired | Unreachable):
            self._orphaned(command)


def _expire(future: asyncio.Future[Reply], name: str, timeout: float) -> None:
    if not future.done():
        future.set_result(overdue(name, timeout))
