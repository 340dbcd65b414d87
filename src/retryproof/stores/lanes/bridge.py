"""The hand-off by which tasks of any event loop use a blocking store: their commands join the threads' queue."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from retryproof.core.commands import Claim, Reply
from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.replies import Orphaned, as_reply, clock, is_orphan, overdue, overfull
from retryproof.stores.lanes.threads import Entry, ThreadCoalescer

IDLE_SECONDS = 10.0
"""A thread without work for this many seconds ends; the next command starts another one."""
MOST_BOARDING = 0.01
"""The most seconds that a batch waits for tasks that just got an answer; a commit takes one to ten milliseconds."""
LAST_LOOK = 0.05
"""Seconds until a thread that has to end checks again, while another one sends the tasks' commands."""


class _TaskEntry(Entry):
    """A task's command."""

    __slots__ = ("deadline", "end", "future", "timeout")

    def __init__(
        self, command: Any, end: BridgeEnd, future: asyncio.Future[Reply], deadline: float, timeout: float
    ) -> None:
        self.command = command
        self.leader = end.bridge
        self.end = end
        self.future = future
        self.deadline = deadline
        self.timeout = timeout
        self.sent = self.gone = False
        self.reply = None
        self.twins = None

    def is_gone(self) -> bool:
        """See Entry. Only a claim is not sent after its caller was cancelled."""
        return self.gone or (self.future.done() and type(self.command) is Claim)

    def answered(self) -> None:
        """See Entry."""
        end = self.end
        end.waiting.pop(self, None)
        if not end.collected:
            end.bridge.ask(end)
        end.collected.append(self)


class Bridge:
    """The thread that sends batches for the tasks of all event loops.

    It starts with the first command and ends when there has been none for a while.
    """

    def __init__(self, threads: ThreadCoalescer, orphaned: Orphaned, *, hang_limit: float = 30.0) -> None:
        self.name = threads.name
        self.line = threads
        self._orphaned = orphaned
        self._hang_limit = hang_limit
        self._ends: dict[BridgeEnd, None] = {}  # with replies that are to be handed out
        self._ready = threading.Lock()
        self._ready.acquire()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._took = 0.0  # seconds of the last batch
        self._lets_board = False
        self._boarding: dict[BridgeEnd, None] = {}  # whose tasks have replies, and have not had their turn
        threads.after_batch = self._deliver

    def end(self) -> BridgeEnd:
        """The part for the running event loop."""
        return BridgeEnd(self, asyncio.get_running_loop())

    def send(self, entry: _TaskEntry) -> None:
        """Put a command into the queue. Raises RuntimeError if there is no thread and none can be started."""
        self.line.put(entry)
        if self._thread is None:  # looked at behind the line, as the thread does when it ends
            self._start_for(entry)

    def _start_for(self, entry: _TaskEntry) -> None:
        with self.line.mutex:
            try:
                if self._thread is None:
                    self._start()
            except RuntimeError:
                self.line.withdraw(entry)
                raise

    def _start(self) -> None:
        """Start a thread. Under the mutex."""
        thread = self._thread = threading.Thread(target=self._serve, name="retryproof-store", daemon=True)
        try:
            thread.start()
        except BaseException:  # an interruption may come once it runs: then it stays, and another one ends by itself
            if thread.ident is None:
                self._thread = None
            raise

    def wake(self) -> None:
        """See Leader."""
        if self._ready.locked():
            self._ready.release()

    def close(self) -> None:
        """End the thread after the waiting commands."""
        with self.line.mutex:
            self._closing = True
            self.wake()
            thread = self._thread
            self._deliver()
        if thread is not None:
            thread.join(self._hang_limit)

    def _serve(self) -> None:
        try:
            while self._thread is threading.current_thread() and self._wait():
                self._let_board()
                began = clock()
                self.line.lead()
                self._took = clock() - began
        except BaseException:  # past every `except Exception`, as drivers in other languages may raise
            with self.line.mutex:
                if self._thread is threading.current_thread():
                    self._thread = None
                if self._thread is None and self.line.waits_for(self):
                    with suppress(RuntimeError):  # then the next command starts one
                        self._start()
            raise

    def _wait(self) -> bool:
        """Wait until this thread is the leader; False if it has to end."""
        while self.line.leader is not self:
            if self._ready.acquire(timeout=LAST_LOOK if self._closing else IDLE_SECONDS) and not self._closing:
                continue
            with self.line.mutex:
                self._deliver()
                thread, self._thread = self._thread, None
                if not self.line.waits_for(self):  # looked at without a thread: who comes later sees that
                    return False
                self._thread = thread
        return True

    def _let_board(self) -> None:
        """Let tasks that just got an answer send their next command, so that one commit serves them and the waiting
        ones.

        It takes one round of their loop, and no longer than the last batch took: a loop may be busy, or blocked.
        """
        if not self._boarding:
            return
        until = clock() + min(self._took, MOST_BOARDING)
        self._lets_board = True  # before it looks; the loop looks at it afterwards
        while self._boarding and not self.line.fills_a_batch and (left := until - clock()) > 0:
            self._ready.acquire(timeout=left)
        self._lets_board = False
        self._boarding.clear()

    def round_over(self, end: BridgeEnd) -> None:
        """Every task of this loop that got an answer has had its turn. Called in that loop."""
        self._boarding.pop(end, None)
        if self._lets_board and not self._boarding:
            with self.line.mutex:
                self.wake()

    def ask(self, end: BridgeEnd) -> None:
        """Schedule the delivery of this loop's replies. Under the mutex."""
        self._ends[end] = self._boarding[end] = None

    def _deliver(self) -> None:
        """Let loops deliver replies. Closed loops do not: their callers have gone. Under the mutex."""
        for end in list(self._ends):
            end.deliver()
            while end.is_closed and end.underway:
                for entry in end.underway.popleft():
                    self.undo(entry)
            if not end.underway:
                del self._ends[end]

    def undo(self, entry: _TaskEntry) -> None:
        """Nobody will read this reply."""
        if is_orphan(entry.command, entry.reply):
            self._orphaned(entry.command, entry.reply)


class BridgeEnd:
    """The part for one event loop. The sending thread may use only what says so; the loop uses the rest."""

    def __init__(self, bridge: Bridge, loop: asyncio.AbstractEventLoop) -> None:
        self.bridge = bridge
        self._line = bridge.line
        self._loop = loop
        self.waiting: dict[_TaskEntry, None] = {}
        """Commands without a reply yet, whether in the queue or sent. The sending thread removes them."""
        self.collected: list[_TaskEntry] = []
        """Commands that have replies, for `deliver`. Under the mutex."""
        self.underway: deque[Sequence[_TaskEntry]] = deque()
        """Commands whose replies the loop has received and not delivered yet."""
        self._alarm = Alarm(loop, self._expire)

    def perform(self, command: Any, timeout: float) -> asyncio.Future[Reply]:
        """One command's reply; Unreachable when there was none in time.

        A claim whose caller is cancelled is not sent, or is released when its reply arrives. Other commands are sent.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self._line.is_full:
            future.set_result(overfull(self.bridge.name))
            return future
        deadline = clock() + timeout
        entry = _TaskEntry(command, self, future, deadline, timeout)
        self.waiting[entry] = None
        try:
            self.bridge.send(entry)
        except RuntimeError as error:
            self.waiting.pop(entry, None)
            future.set_result(as_reply(self.bridge.name, error))
            return future
        except BaseException:  # an interruption; what was sent is undone when its reply comes
            future.cancel()
            raise
        if deadline < self._alarm.due:
            self._alarm.set(deadline)
        return future

    @property
    def is_closed(self) -> bool:
        """Whether the loop will never run again."""
        return self._loop.is_closed()

    def deliver(self) -> None:
        """Schedule the delivery of replies in the loop. Under the mutex; the bridge handles those of a closed loop."""
        if self.collected:
            self.underway.append(self.collected)
            self.collected = []
        if self.underway:  # also what an interruption kept from being scheduled
            try:
                self._loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:  # it is closed; this takes a tenth of `suppress`
                pass

    def _hand_out(self) -> None:
        if not self.underway:
            return
        while self.underway:
            for entry in self.underway[0]:  # they stay until they are delivered: an interruption loses nobody
                future = entry.future
                if not future.done():
                    future.set_result(entry.reply)
                elif future.cancelled():
                    self.bridge.undo(entry)
            self.underway.popleft()
        self._loop.call_soon(self.bridge.round_over, self)

    def _expire(self) -> float:
        """Answer all callers that have waited too long; return the next deadline."""
        now = clock()
        earliest = NEVER
        with self._line.mutex:
            for entry in list(self.waiting):
                if entry.future.done():
                    del self.waiting[entry]
                elif entry.deadline <= now:
                    del self.waiting[entry]
                    entry.gone = True
                    entry.future.set_result(overdue(self.bridge.name, entry.timeout, sent=entry.sent))
                else:
                    earliest = min(earliest, entry.deadline)
        return earliest
