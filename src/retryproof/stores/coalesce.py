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
from collections.abc import Awaitable, Callable, Sequence
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
WORTH_SPLITTING = 16
"""Replies from which on they are handed out in two portions, so that client and server work at the same time."""
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


def interrupted(name: str) -> Unreachable:
    """The call was broken off; what was asked may have been done."""
    return Unreachable(StoreUnavailable(f"A call of the {name} store was interrupted; try again."))


def is_orphan(command: object, reply: Reply) -> bool:
    """Whether this is a claim that stands or may stand, for a caller who has gone without a word.

    Not one who was told that the time was over: that one asks again under the same nonce, or disowns the claim itself.
    """
    return isinstance(command, Claim) and isinstance(reply, Acquired | Unreachable)


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

    __slots__ = ("_call", "_coalescer", "_flying", "_later", "_loop", "_pending", "_size", "_task", "_timer", "_twins")

    def __init__(self, coalescer: TaskCoalescer, call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._coalescer = coalescer
        self._call = call
        self._size = coalescer.max_batch
        self._loop = coalescer.loop
        self._pending: dict[bytes, _Waiter] = {}
        self._later: deque[_Waiter] = deque()
        self._twins = 0  # of those in line and on their way
        self._flying: Sequence[_Waiter] = ()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """Put a command on its way."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        waiter = _Waiter(command, future, clock() + timeout, timeout)
        if len(self._pending) + len(self._later) + self._twins >= MAX_WAITING:
            future.set_result(overfull(self._coalescer.name))
            return future
        self._queue(waiter)
        if self._task is None:
            self._task = self._loop.create_task(self._run())
        if self._timer is None:
            self._timer = self._loop.call_later(timeout, self._expire)
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
                turn = len(answers) // 2 if len(answers) >= WORTH_SPLITTING else len(answers)
                for number, (waiter, answer) in enumerate(zip(self._flying, answers, strict=True), start=1):
                    self._deliver(waiter, as_reply(self._coalescer.name, answer))
                    if number == turn:  # what these callers ask next is under way while the others still work
                        await asyncio.sleep(0)
                self._flying = ()
        finally:
            self._task = None
            if self._flying or self._pending:  # only when this task was cancelled, as its loop shuts down
                self._abandon()

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
        elif waiter.future.cancelled() and is_orphan(waiter.command, reply):
            self._coalescer.orphaned(waiter.command)
        for twin in self._twins_of(waiter):
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
        now = clock()  # not the loop's time, which on uvloop is that of the round's beginning
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
            self._timer = self._loop.call_later(earliest - now + 0.001, self._expire)

    def _abandon(self) -> None:
        """The loop shuts down: who still waits gets a definite answer, and may ask again."""
        waiters = [*self._flying, *self._pending.values(), *self._later]
        self._flying, self._pending, self._later = (), {}, deque()
        for waiter in waiters:
            for one in (waiter, *self._twins_of(waiter)):
                if not one.future.done():
                    one.future.set_result(interrupted(self._coalescer.name))
                elif one.future.cancelled() and isinstance(one.command, Claim):
                    self._coalescer.orphaned(one.command)


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


class _Caller:
    """A thread that waits for its commands; `ready` is released when a reply is there or when it is to lead."""

    __slots__ = ("ready",)

    def __init__(self) -> None:
        self.ready = threading.Lock()
        self.ready.acquire()

    def wake(self) -> None:
        """Let the thread look again. Called under the coalescer's mutex."""
        if self.ready.locked():
            self.ready.release()


class _Entry:
    """A thread's command on its way.

    gone: its caller does not wait any more. left: and has not been told anything, since it was interrupted.
    """

    __slots__ = ("caller", "command", "done", "gone", "left", "reply", "twins")

    def __init__(self, command: Any, caller: _Caller) -> None:
        self.command = command
        self.caller = caller
        self.reply: Reply = None
        self.done = False
        self.gone = False
        self.left = False
        self.twins: list[_Entry] | None = None


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
        self.max_batch = self._size = store.capabilities.max_batch
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
        self._leader: _Caller | None = None
        """Whose turn it is to send. One reference, so that an interruption at any point leaves it with somebody."""

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
        caller = _Caller()
        entries = [_Entry(command, caller) for command in commands]
        deadline = clock() + timeout
        try:
            with self._mutex:
                if len(self._pending) >= MAX_WAITING:
                    return [overfull(self.name)] * len(entries)
                self._pending.extend(entries)
                if self._leader is None:
                    self._leader = caller
            replies = [self._await(entry, caller, deadline, timeout) for entry in entries]
            if self._leader is caller:  # promoted while its last reply was on the way
                with self._mutex:
                    self._pass_on()
        except BaseException:  # interrupted
            self._quit(entries, caller)
            raise
        return replies

    def _await(self, entry: _Entry, caller: _Caller, deadline: float, timeout: float) -> Reply:
        while not entry.done:
            if self._leader is caller:
                self._lead()
            elif not caller.ready.acquire(timeout=max(0.0, deadline - clock())) and self._give_up(entry):
                return overdue(self.name, timeout)
        return entry.reply

    def _give_up(self, entry: _Entry) -> bool:
        """After a time-out: whether neither the reply nor the lead came in the last moment."""
        with self._mutex:
            if entry.done or self._leader is entry.caller:
                return False
            self._drop(entry)
            return True

    def _drop(self, entry: _Entry) -> None:
        entry.gone = True
        if entry in self._pending:
            self._pending.remove(entry)

    def _quit(self, entries: Sequence[_Entry], caller: _Caller) -> None:
        """The caller was interrupted: what is on its way goes on without it, the rest does not leave."""
        with self._mutex:
            for entry in entries:
                if not entry.done:
                    entry.left = True
                    self._drop(entry)
                elif is_orphan(entry.command, entry.reply):
                    self._orphaned(entry.command)
            if self._leader is caller:
                self._pass_on()
            elif self._leader is not None:
                self._leader.wake()  # the interruption may have come just before we did that

    def _lead(self) -> None:
        """Send one batch, then pass the lead on."""
        batch: list[_Entry] = []
        try:
            batch = self._next_batch()
            self._send(batch)
        finally:
            with self._mutex:
                self._hand_out(batch)
                self._pass_on()

    def _pass_on(self) -> None:
        """Hand the lead to the first in line; without one it lies where the next to come finds it."""
        self._leader = leader = self._pending[0].caller if self._pending else None
        if leader is not None:
            leader.wake()

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
                if not are_twins(standing.command, entry.command):
                    left.append(entry)
                elif standing.twins is None:
                    standing.twins = [entry]
                else:
                    standing.twins.append(entry)
            self._pending.extendleft(reversed(left))
        return list(batch.values())

    def _send(self, batch: list[_Entry]) -> None:
        replies: list[tuple[_Entry, Reply]] = []  # nobody's before the group is committed
        try:
            with self._group() if len(batch) > 1 else nullcontext():
                for kind, call in self._calls.items():
                    entries = [entry for entry in batch if type(entry.command) is kind]
                    answers = call([entry.command for entry in entries]) if entries else ()
                    for entry, answer in zip(entries, answers, strict=True):
                        replies.append((entry, as_reply(self.name, answer)))
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            replies = [(entry, as_reply(self.name, error)) for entry in batch]
        for entry, reply in replies:
            entry.reply = reply

    def _hand_out(self, batch: list[_Entry]) -> None:
        for entry in batch:
            if entry.reply is None:  # the leader was interrupted
                entry.reply = interrupted(self.name)
            if entry.left and is_orphan(entry.command, entry.reply):
                self._orphaned(entry.command)
            entry.done = True
            entry.caller.wake()
            twins, entry.twins = entry.twins, None
            for twin in twins or ():
                told = None if entry.gone else twin_reply(entry.reply, entry.command.lease)
                if twin.gone:
                    continue
                if told is None:
                    self._pending.append(twin)
                else:
                    twin.reply, twin.done = told, True
                    twin.caller.wake()

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
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # the reply had come, and nobody will read it
                self._undo(command, future.result())
            raise
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
                # One batch at a time, so that nobody waits for the batches behind theirs.
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._threads.max_batch))]
            wanted = [
                (command, loop, future)
                for command, loop, future in taken
                if not (future.done() and isinstance(command, Claim))
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
            if not future.done():
                future.set_result(reply)
            elif future.cancelled():
                self._undo(command, reply)

    def _undo(self, command: Any, reply: Reply) -> None:
        if is_orphan(command, reply):
            self._orphaned(command)


def _expire(future: asyncio.Future[Reply], name: str, timeout: float) -> None:
    if not future.done():
        future.set_result(overdue(name, timeout))
