"""Batches for threads over a blocking store."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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

    __slots__ = ("caller", "command", "done", "gone", "left", "reply", "sent", "twins")

    def __init__(self, command: Any, caller: _Caller) -> None:
        self.command = command
        self.caller = caller
        self.reply: Reply = None
        self.done = False
        self.gone = False
        self.left = False
        self.sent = False
        self.twins: list[_Entry] | None = None


class ThreadCoalescer:
    """Batches for threads over a blocking store.

    The thread that finds nobody sending becomes the leader: it sends one batch of what is pending, hands out the
    replies, and passes the lead to the next in line. So there is no thread of its own, and no hand-over while one
    thread is alone. Different kinds of command go in one commit where the store can do that.
    """

    def __init__(self, store: Store, orphaned: Orphaned, heard: Heard = not_heard) -> None:
        self._heard = heard
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
                return overdue(self.name, timeout, sent=entry.sent)
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
                    self._orphaned(entry.command, entry.reply)
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
                    entry.sent = True
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
                for kind, entries in self._by_kind(batch):
                    answers = self._calls[kind]([entry.command for entry in entries])
                    for entry, answer in zip(entries, answers, strict=True):
                        replies.append((entry, as_reply(self.name, answer)))
        except Exception as error:  # noqa: BLE001 - whatever a store raises, each caller gets a definite answer
            replies = [(entry, as_reply(self.name, error)) for entry in batch]
        else:
            self._heard()
        for entry, reply in replies:
            entry.reply = reply

    def _by_kind(self, batch: list[_Entry]) -> Iterator[tuple[type, list[_Entry]]]:
        """In the order in which the calls stand."""
        found: dict[type, list[_Entry]] = {}
        for entry in batch:
            found.setdefault(type(entry.command), []).append(entry)
        return ((kind, found[kind]) for kind in self._calls if kind in found)

    def _hand_out(self, batch: list[_Entry]) -> None:
        for entry in batch:
            if entry.reply is None:  # the leader was interrupted
                entry.reply = interrupted(self.name)
            if entry.left and is_orphan(entry.command, entry.reply):
                self._orphaned(entry.command, entry.reply)
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
