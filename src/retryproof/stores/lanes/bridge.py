"""The bridge over which the tasks of any event loop use a blocking store, in one thread."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from retryproof.core.commands import Claim, Reply
from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.replies import MAX_WAITING, Orphaned, as_reply, clock, is_orphan, overdue, overfull
from retryproof.stores.lanes.threads import ThreadCoalescer

IDLE_SECONDS = 10.0
"""A thread with nothing to do for so long ends; the next command starts another."""


class _Crossing:
    """A task's command on its way."""

    __slots__ = ("command", "deadline", "end", "future", "given_up", "taken", "timeout")

    def __init__(
        self, command: Any, end: BridgeEnd, future: asyncio.Future[Reply], deadline: float, timeout: float
    ) -> None:
        self.command = command
        self.end = end
        self.future = future
        self.deadline = deadline
        self.timeout = timeout
        # Each side says first what it does, and then looks at what the other says: so it leaves only where both agree.
        self.taken = False
        self.given_up = False


class Bridge:
    """The thread that sends what the tasks of all event loops ask, in batches.

    It starts with the first command and ends when there has been none for a while.
    """

    def __init__(self, threads: ThreadCoalescer, orphaned: Orphaned, *, hang_limit: float = 30.0) -> None:
        self.name = threads.name
        self._threads = threads
        self._orphaned = orphaned
        self._hang_limit = hang_limit
        self._waiting: deque[_Crossing] = deque()
        self._ends: dict[BridgeEnd, None] = {}  # with replies underway, perhaps; the thread's, if there is one
        self._work = threading.Condition()
        self._asleep = True  # it looks at what waits once more after it has said so
        self._thread: threading.Thread | None = None
        self._closing = False

    def end(self) -> BridgeEnd:
        """The running event loop's end."""
        return BridgeEnd(self, asyncio.get_running_loop())

    @property
    def is_full(self) -> bool:
        """Whether too much waits already."""
        return len(self._waiting) >= MAX_WAITING

    def send(self, crossing: _Crossing) -> None:
        """Put a command on its way. Raises RuntimeError where there is no thread and none can be started."""
        self._waiting.append(crossing)
        if not self._asleep:
            return
        with self._work:
            if self._thread is None:
                self._start(crossing)
            self._work.notify()

    def _start(self, crossing: _Crossing) -> None:
        thread = threading.Thread(target=self._serve, name="retryproof-store", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._waiting.remove(crossing)
            raise
        self._thread = thread

    def close(self) -> None:
        """End the thread, after what is waiting."""
        with self._work:
            self._closing = True
            self._work.notify()
            thread = self._thread
            if thread is None:
                self._undo_undelivered()
        if thread is not None:
            thread.join(self._hang_limit)

    def _serve(self) -> None:
        try:
            while self._wait():
                # One batch at a time, so that nobody waits for the batches behind theirs.
                self._carry([self._waiting.popleft() for _ in range(min(len(self._waiting), self._threads.max_batch))])
        except BaseException:  # past every `except Exception`, as drivers in other languages may raise
            with self._work:
                self._asleep, self._thread = True, None  # the next command starts another
            raise

    def _carry(self, taken: Sequence[_Crossing]) -> None:
        for one in taken:
            one.taken = True
        wanted = [one for one in taken if not (one.given_up or (one.future.done() and isinstance(one.command, Claim)))]
        replies = self._threads.perform_many([one.command for one in wanted], self._hang_limit)
        by_end: dict[BridgeEnd, list[tuple[_Crossing, Reply]]] = {}
        for one, reply in zip(wanted, replies, strict=True):
            by_end.setdefault(one.end, []).append((one, reply))
        for end, answers in by_end.items():
            end.deliver(answers)
            self._ends[end] = None
        self._undo_undelivered()

    def _undo_undelivered(self) -> None:
        """Loops that are closed hand nothing out: their callers have gone."""
        for end in list(self._ends):
            while end.is_closed and end.underway:
                for one, reply in end.underway.popleft():
                    self.undo(one.command, reply)
            if not end.underway:
                del self._ends[end]

    def _wait(self) -> bool:
        """Wait for work; False when the thread is to end."""
        if self._waiting:
            return True
        with self._work:
            self._asleep = True
            while not self._waiting:
                if self._closing or (not self._work.wait(IDLE_SECONDS) and not self._waiting):
                    self._undo_undelivered()
                    self._thread = None
                    return False
            self._asleep = False
            return True

    def undo(self, command: Any, reply: Reply) -> None:
        """Nobody will read this reply."""
        if is_orphan(command, reply):
            self._orphaned(command, reply)


class BridgeEnd:
    """One event loop's end of the bridge. What the thread may use says so; the rest is the loop's."""

    def __init__(self, bridge: Bridge, loop: asyncio.AbstractEventLoop) -> None:
        self._bridge = bridge
        self._loop = loop
        self._crossings: dict[_Crossing, None] = {}
        self.underway: deque[Sequence[tuple[_Crossing, Reply]]] = deque()
        """Replies that the loop was given and has not handed out."""
        self._alarm = Alarm(loop, self._expire)

    def perform(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """One command's reply; Unreachable when there was none in time.

        A claim whose caller is cancelled does not leave, or is released when its reply arrives. Other commands travel.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self._bridge.is_full:
            future.set_result(overfull(self._bridge.name))
            return future
        deadline = clock() + timeout
        crossing = _Crossing(command, self, future, deadline, timeout)
        try:
            self._bridge.send(crossing)
        except RuntimeError as error:
            future.set_result(as_reply(self._bridge.name, error))
            return future
        self._crossings[crossing] = None
        if deadline < self._alarm.due:
            self._alarm.set(deadline)
        return future

    @property
    def is_closed(self) -> bool:
        """Whether the loop will never run again."""
        return self._loop.is_closed()

    def deliver(self, answers: Sequence[tuple[_Crossing, Reply]]) -> None:
        """Have replies handed out in the loop. Called in the thread, which sees to those that a closed loop leaves."""
        self.underway.append(answers)
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        answers = self.underway.popleft()
        for crossing, reply in answers:
            self._crossings.pop(crossing, None)
            if not crossing.future.done():
                crossing.future.set_result(reply)
            elif crossing.future.cancelled():
                self._bridge.undo(crossing.command, reply)

    def _expire(self) -> float:
        """Tell everybody who has waited for too long; when the next is due."""
        now = clock()
        earliest = NEVER
        for crossing in list(self._crossings):
            if crossing.future.done():
                del self._crossings[crossing]
            elif crossing.deadline <= now:
                crossing.given_up = True
                crossing.future.set_result(overdue(self._bridge.name, crossing.timeout, sent=crossing.taken))
                del self._crossings[crossing]
            else:
                earliest = min(earliest, crossing.deadline)
        return earliest
