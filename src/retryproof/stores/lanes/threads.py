"""Batches over a blocking store: the queue of commands, the leader that sends them, and threads that wait."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from retryproof.core.commands import Checkpoint, Claim, Complete, Found, Look, Release, Renew, Reply
from retryproof.stores.base import HasCommitGroup, Store
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


class Leader(Protocol):
    """A thread that may send the queue's batches: one that waits in the queue, or the thread that sends for tasks."""

    def wake(self) -> None:
        """Let it check whether it is the leader. Called under the mutex."""


class Entry(ABC):
    """A command in the queue or under way.

    leader: who becomes the leader if this is the first in the queue. sent: it was sent. gone: its caller does not wait
    any more; if it was not sent, it never will be.
    """

    __slots__ = ("command", "gone", "leader", "reply", "sent", "twins")

    command: Any
    leader: Leader
    reply: Reply
    sent: bool
    gone: bool
    twins: list[Entry] | None

    @abstractmethod
    def is_gone(self) -> bool:
        """Whether nobody waits for it, so that it need not be sent. Under the mutex."""

    @abstractmethod
    def answered(self) -> None:
        """Its reply has come. Called once, under the mutex."""


class _Caller:
    """A thread that waits for its commands; `ready` is released when a reply has come, or it becomes the leader."""

    __slots__ = ("ready",)

    def __init__(self) -> None:
        self.ready = threading.Lock()
        self.ready.acquire()

    def wake(self) -> None:
        """See Leader."""
        if self.ready.locked():
            self.ready.release()


class _ThreadEntry(Entry):
    """A thread's command.

    done: it has its reply. left: its caller was interrupted, and got no answer.
    """

    __slots__ = ("_orphaned", "caller", "done", "left")

    def __init__(self, command: Any, caller: _Caller, orphaned: Orphaned) -> None:
        self.command = command
        self.leader = self.caller = caller
        self.reply = None
        self.twins = None
        self.done = self.sent = self.gone = self.left = False
        self._orphaned = orphaned

    def is_gone(self) -> bool:
        """See Entry."""
        return self.gone

    def answered(self) -> None:
        """See Entry."""
        if self.left and is_orphan(self.command, self.reply):
            self._orphaned(self.command, self.reply)
        self.done = True
        self.caller.wake()


_ByKind = dict[type, dict[bytes, Entry]]
"""A batch by kind of command and id."""


class ThreadCoalescer:
    """Batches over a blocking store, for threads and for other leaders.

    A thread that finds nobody sending becomes the leader. It sends one batch of the queue, delivers the replies, and
    makes the first in the queue the next leader. So there is no extra thread, and no hand-off while a thread is alone.
    Different kinds of commands share one commit, if the store can do that.

    after_batch: called under the mutex when a batch has its replies.
    """

    def __init__(self, store: Store, orphaned: Orphaned, heard: Heard = not_heard) -> None:
        self._heard = heard
        self.name = store.capabilities.name
        self._orphaned = orphaned
        self._store = store
        self._size = store.capabilities.max_batch
        self._commit_group = store.commit_group if isinstance(store, HasCommitGroup) else None
        self._calls: dict[type, Callable[[Any], Sequence[Any]]] = {
            Complete: store.complete,
            Release: store.release,
            Renew: store.renew,
            Checkpoint: store.checkpoint,
            Claim: store.claim,
            Look: self._look,
        }
        self._pending: deque[Entry] = deque()  # a caller that appends without the mutex checks the leader afterwards
        self._flying: Sequence[Entry] = ()
        self.mutex = threading.Lock()
        self.leader: Leader | None = None
        """The current leader. It is one reference, so that after an interruption at any point somebody still has it."""
        self.after_batch: Callable[[], None] | None = None

    def perform(self, command: Any, timeout: float) -> Reply:
        """One command's reply; Unreachable when there was none in time."""
        return self.perform_many((command,), timeout)[0]

    def directly(self, command: Any) -> Reply:
        """One command's reply from a store that never blocks and takes calls from anywhere: nothing to coalesce."""
        try:
            answer = self._calls[type(command)]((command,))[0]
            return as_reply(self.name, answer) if isinstance(answer, Exception) else answer
        except Exception as error:  # noqa: BLE001 - whatever a store raises, the caller gets a definite answer
            return as_reply(self.name, error)
        except BaseException:  # interrupted
            if isinstance(command, Claim):
                self._orphaned(command, None)
            raise

    # Threads

    def perform_many(self, commands: Sequence[Any], timeout: float) -> list[Reply]:
        """Each command's reply, in order."""
        caller = _Caller()
        entries = [_ThreadEntry(command, caller, self._orphaned) for command in commands]
        deadline = clock() + timeout
        try:
            with self.mutex:
                if len(self._pending) >= MAX_WAITING:
                    return [overfull(self.name)] * len(entries)
                self._pending.extend(entries)
                if self.leader is None:
                    self.leader = caller
            replies = [self._await(entry, caller, deadline, timeout) for entry in entries]
            if self.leader is caller:  # promoted while its last reply was on the way
                with self.mutex:
                    self._pass_on()
        except BaseException:  # interrupted
            self._quit(entries, caller)
            raise
        return replies

    def _await(self, entry: _ThreadEntry, caller: _Caller, deadline: float, timeout: float) -> Reply:
        while not entry.done:
            if self.leader is caller:
                self.lead()
            elif not caller.ready.acquire(timeout=max(0.0, deadline - clock())) and self._give_up(entry):
                return overdue(self.name, timeout, sent=entry.sent)
        return entry.reply

    def _give_up(self, entry: _ThreadEntry) -> bool:
        """After a time-out: whether neither the reply nor the leadership came at the last moment."""
        with self.mutex:
            if entry.done or self.leader is entry.caller:
                return False
            self._drop(entry)
            return True

    def _drop(self, entry: Entry) -> None:
        entry.gone = True
        if entry in self._pending:
            self._pending.remove(entry)

    def _quit(self, entries: Sequence[_ThreadEntry], caller: _Caller) -> None:
        """The caller was interrupted: sent commands continue without it, the others are not sent."""
        with self.mutex:
            for entry in entries:
                self._drop(entry)
                if not entry.done:
                    entry.left = True
                elif is_orphan(entry.command, entry.reply):
                    self._orphaned(entry.command, entry.reply)
            if self.leader is None or self.leader is caller:  # what the lead left undone
                self._hand_out()
                self._pass_on()
            else:
                self.leader.wake()  # the interruption may have come just before we did that

    # Other callers in the queue

    @property
    def is_full(self) -> bool:
        """Whether too much waits already."""
        return len(self._pending) >= MAX_WAITING

    @property
    def fills_a_batch(self) -> bool:
        """Whether what waits is enough for a whole batch."""
        return len(self._pending) >= self._size

    def put(self, entry: Entry) -> None:
        """Put a command into the queue, from any thread; the leader sends it."""
        self._pending.append(entry)
        if self.leader is None:
            with self.mutex:
                if self.leader is None:
                    self._pass_on()

    def withdraw(self, entry: Entry) -> None:
        """Remove a command whose leader cannot lead from the queue. Under the mutex."""
        self._drop(entry)
        if self.leader is entry.leader:
            self._pass_on()

    def waits_for(self, leader: Leader) -> bool:
        """Whether this one is the leader, or may become it by a command in the queue. Under the mutex."""
        return self.leader is leader or any(entry.leader is leader for entry in self.unanswered())

    def unanswered(self) -> Iterator[Entry]:
        """All commands under way or in the queue. Under the mutex."""
        for entry in [*self._flying, *self._pending]:
            yield entry
            yield from entry.twins or ()

    # The leader

    def lead(self) -> None:
        """Send one batch, then make the next one the leader."""
        try:
            self._send(self._next_batch())
        finally:
            with self.mutex:
                self._hand_out()
                self._pass_on()

    def _pass_on(self) -> None:
        """Make the first in the queue the leader; if there is none, the next caller finds that nobody leads."""
        self.leader = None
        while self._pending:  # looked at once nobody leads: who comes later sees that
            first = self._pending[0]
            if first.reply is None:
                self.leader = first.leader
                first.leader.wake()
                return
            self._pending.popleft()  # it has been sent, by a leader who was interrupted

    def _next_batch(self) -> _ByKind:
        """The next batch, bounded, with each id once a kind; twins go with their claim, the rest stays in the queue."""
        batch: _ByKind = {}
        left: list[Entry] = []
        flying: list[Entry] = []
        pending, size = self._pending, self._size
        kind: type | None = None
        of_kind: dict[bytes, Entry] = {}
        with self.mutex:
            self._flying = flying
            try:
                while pending and len(flying) < size:
                    entry = pending[0]  # it leaves the line once it is elsewhere: an interruption loses nobody
                    if entry.reply is None and not entry.is_gone():
                        command = entry.command
                        if type(command) is not kind:  # most are of one kind
                            kind = type(command)
                            of_kind = batch.setdefault(kind, {})
                        standing = of_kind.setdefault(command.id, entry)
                        if standing is entry:
                            entry.sent = True
                            flying.append(entry)
                        elif not are_twins(standing.command, command):
                            left.append(entry)
                        elif standing.twins is None:
                            standing.twins = [entry]
                        else:
                            standing.twins.append(entry)
                    pending.popleft()
            finally:
                pending.extendleft(reversed(left))
        return batch

    def _send(self, batch: _ByKind) -> None:
        try:
            if self._commit_group is None or len(self._flying) < 2:
                replies = self._call(batch)
            else:
                replies = self._commit_group(partial(self._call, batch))
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            replies = [(entry, error) for entry in self._flying]
        else:
            if replies:
                self._heard()
        for entry, answer in replies:
            entry.reply = as_reply(self.name, answer) if isinstance(answer, Exception) else answer

    def _call(self, batch: _ByKind) -> list[tuple[Entry, Any]]:
        """What the store answers to each; nobody's reply before the group is committed."""
        replies: list[tuple[Entry, Any]] = []
        for kind in batch if len(batch) == 1 else [kind for kind in self._calls if kind in batch]:
            entries = batch[kind].values()
            replies += zip(entries, self._calls[kind]([entry.command for entry in entries]), strict=True)
        return replies

    def _hand_out(self) -> None:
        """Tell everybody what has come of the batch; called again where it was interrupted."""
        for entry in self._flying:
            if entry.reply is None:  # the leader was interrupted
                entry.reply = interrupted(self.name)
            if entry.twins is not None:
                self._tell_twins(entry, entry.twins)
            entry.answered()
        self._flying = ()
        if self.after_batch is not None:
            self.after_batch()

    def _tell_twins(self, entry: Entry, twins: Sequence[Entry]) -> None:
        """A twin of a claim that nobody waits for is sent for itself, since that claim is released."""
        gone = entry.is_gone()
        for twin in twins:
            if twin.is_gone():
                continue
            twin.reply = None if gone else twin_reply(entry.reply, entry.command.lease)
            if twin.reply is None:
                self._pending.append(twin)
            else:
                twin.answered()
        entry.twins = None

    def _look(self, looks: Sequence[Look]) -> Sequence[Found]:
        return [Found(record) for record in self._store.get([look.id for look in looks])]
