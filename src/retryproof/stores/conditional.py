"""Records on an engine that has only conditional writes of single items, such as DynamoDB or MongoDB.

Theory. Every write gives an item a new stamp, which is never used again. It also names the stamp that it expects to
replace, or says that it expects no item. The engine performs or refuses the write, in one step for each item. So a
decision of the table in `core.record` is written only if the item has not changed since. After a refusal, the table
decides again on the current item. A stamp is not a counter: an item that was removed and created again has a different
one.

Round trips. The plans remember what this process wrote last. A claim of an operation that this process does not know is
tried as a new one. A command after a claim of this process is decided on the item that the claim wrote. So each takes
one round trip, as long as nobody else writes the item. A wrong guess costs another round trip, but never a wrong write.
And no answer rests on a guess alone: an answer that writes nothing is based on an item that was read.

If the answer to a write is lost, the write may have been done. The caller learns that, and sends the command again with
its nonce; the table then finds that it is done (C3).

`Plans` are generators of the steps below. An engine's driver performs them, blocking or async; the items of a step are
independent. Time is the clock that the plans are given: an engine that cannot compare with its own clock in a condition
has only its callers' clocks (C9), and its driver checks those against the engine's.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, TypeAlias, TypeVar

from retryproof.clock import wall_clock
from retryproof.core import record as table
from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.errors import StoreUnavailable
from retryproof.core.record import Record, State
from retryproof.core.value import value
from retryproof.drive import apump, pump
from retryproof.stores.base import Batch, Capabilities, Reaped
from retryproof.stores.forwarding import AsyncForwardingStore, ForwardingStore

T = TypeVar("T")

ROUNDS = 10
"""How often a command is decided again because others wrote its item; after that, its caller has to try again."""
REMEMBERED = 10_000
"""For how many items a process remembers what it wrote last."""


@value
class Item:
    """A record as it is stored, and the stamp of the write that made it so."""

    record: Record
    stamp: bytes


# The steps of an engine


@value
class Read:
    """The items with these ids, as of now (no cache, no replica that lags); answered with `Item | None` for each."""

    ids: Sequence[bytes]


@value
class PutItem:
    """Write this item, if the item that is there has the stamp `expected`; None: if nothing is there."""

    item: Item
    expected: bytes | None


@value
class RemoveItem:
    """Remove the item with this id, if it has this stamp."""

    id: bytes
    expected: bytes


@value
class Write:
    """Do each of these, or refuse it; answered with `Written | Kept | StoreUnavailable` for each, in order."""

    changes: Sequence[PutItem | RemoveItem]


@value
class Over:
    """Items whose `expires_at` is not after this time, up to so many; answered with a sequence of items."""

    now: int
    limit: int


@value
class Scan:
    """Items in the order of their ids, from behind `after`; answered with a page, which may be shorter than `limit`,
    and with whether there is more behind it.

    A filter that the engine does not know may be left out: the plan filters as well.
    """

    prefix: bytes
    state: State | None
    tenant: bytes | None
    after: bytes
    limit: int


EngineStep = Read | Write | Over | Scan
Plan: TypeAlias = Generator[EngineStep, Any, T]


@value
class Written:
    """It was done."""


@value
class Kept:
    """Another item was there, or none."""


WRITTEN, KEPT = Written(), Kept()

Rule = Callable[[Record | None, Any, int], tuple[Record | None, Any]]


class _Pending:
    """A command that is not answered yet, and the item that it is decided on. read: that was read, and is no guess."""

    __slots__ = ("command", "done", "item", "place", "read", "seen")

    def __init__(self, place: int, command: Any) -> None:
        self.place = place
        self.command = command
        self.item: Item | None = None
        self.seen = self.read = self.done = False

    def see(self, item: Item | None, *, read: bool) -> None:
        """Decide on this item, until the engine says that it is another."""
        self.item, self.read, self.seen = item, read, True


class Plans:
    """The calls of the store protocol, as plans. Safe for threads.

    clock: microseconds since the epoch.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._known: OrderedDict[bytes, Item] = OrderedDict()
        self._lock = Lock()

    def claim(self, claims: Sequence[Claim]) -> Plan[Batch[ClaimReply]]:
        """Take each operation or say why not."""
        return self._change(claims, table.decide)

    def complete(self, commands: Sequence[Complete]) -> Plan[Batch[FenceReply]]:
        """Settle each operation with its result."""
        return self._change(commands, table.settle)

    def release(self, commands: Sequence[Release]) -> Plan[Batch[FenceReply]]:
        """Release each operation."""
        return self._change(commands, table.settle)

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """Extend each lease."""
        return self._change(commands, table.renew)

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Plan[Batch[FenceReply]]:
        """Store each value under its name."""
        return self._change(commands, lambda record, command, now: table.checkpoint(record, command))

    def _change(self, commands: Sequence[Any], rule: Rule) -> Plan[list[Any]]:
        """Decide each command by the rule on what is there, and write what it says while that is still there.

        A claim of what is not known here is decided on nothing, as if it were new.
        """
        replies: list[Any] = [None] * len(commands)
        left = [self._first_look(place, command) for place, command in enumerate(commands)]
        for _ in range(ROUNDS):
            unseen = [one for one in left if not one.seen]
            if unseen:
                items = yield Read([one.command.id for one in unseen])
                for one, item in zip(unseen, items, strict=True):
                    one.see(item, read=True)
            now = self._clock()
            puts: list[tuple[_Pending, PutItem, Any]] = []
            for one in left:
                there = one.item
                written, reply = rule(None if there is None else there.record, one.command, now)
                if written is not None:
                    put = PutItem(Item(written, os.urandom(16)), None if there is None else there.stamp)
                    puts.append((one, put, reply))
                elif one.read:
                    replies[one.place], one.done = reply, True
                else:  # a guess is no answer
                    one.seen = False
            if puts:
                answers = yield Write([put for _, put, _ in puts])
                for (one, put, reply), answer in zip(puts, answers, strict=True):
                    one.seen = False
                    self._heard(put.item, answer)
                    if not isinstance(answer, Kept):
                        replies[one.place], one.done = reply if isinstance(answer, Written) else answer, True
            left = [one for one in left if not one.done]
            if not left:
                return replies
        for one in left:
            replies[one.place] = StoreUnavailable("Others wrote the record all the time; try again.")
        return replies

    def _first_look(self, place: int, command: Any) -> _Pending:
        pending, known = _Pending(place, command), self._known.get(command.id)
        if known is not None or isinstance(command, Claim):
            pending.see(known, read=False)
        return pending

    def get(self, ids: Sequence[bytes]) -> Plan[Sequence[Record | None]]:
        """Each record as it is now."""
        items = yield Read(ids)
        now = self._clock()
        return [None if item is None or item.record.expired(now) else _as_read(item.record, now) for item in items]

    def scan(
        self, *, prefix: bytes, state: State | None, tenant: bytes | None, after: bytes, limit: int
    ) -> Plan[Sequence[Record]]:
        """A page of records in the order of their ids."""
        found: list[Record] = []
        while len(found) < limit:
            items, more = yield Scan(prefix, state, tenant, after, limit - len(found))
            now = self._clock()
            found += [_as_read(item.record, now) for item in items if _fits(item.record, prefix, state, tenant, now)]
            if not more or not items:
                break
            after = items[-1].record.id
        return found

    def evict(self, ids: Sequence[bytes]) -> Plan[Sequence[bool]]:
        """Delete each record, unless its lease is live."""
        return (yield from self._remove(ids, lambda record, now: not record.live(now), absent=True))

    def reap(self, limit: int, told: Sequence[Record]) -> Plan[Reaped]:
        """Delete settled records past their time, find unsettled ones, and delete those in `told`."""
        marks = {record.id: (record.nonce, record.token) for record in told}
        gone = yield from self._remove(
            list(marks), lambda record, now: record.over(now) and (record.nonce, record.token) == marks[record.id]
        )
        ended = [id for id, removed in zip(marks, gone, strict=True) if removed]
        if limit == 0:
            return Reaped(ended=ended)
        now = self._clock()
        items = [item for item in (yield Over(now, limit + 1)) if item.record.over(now)]
        page = items[:limit]
        settled = [RemoveItem(item.record.id, item.stamp) for item in page if item.record.settled]
        answers = (yield Write(settled)) if settled else ()
        removed = sum(isinstance(answer, Written) for answer in answers)
        unsettled = [_as_read(item.record, now) for item in page if not item.record.settled]
        return Reaped(removed, unsettled, more=len(items) > limit, ended=ended)

    def _remove(
        self, ids: Sequence[bytes], may_go: Callable[[Record, int], bool], *, absent: bool = False
    ) -> Plan[list[bool]]:
        """Remove each record that may go; whether it is gone. absent: what an id that is not there is called."""
        gone = dict.fromkeys(ids, False)
        left = list(gone)
        for _ in range(ROUNDS):
            if not left:
                break
            items = yield Read(left)
            now = self._clock()
            removals = []
            for id, item in zip(left, items, strict=True):
                if item is None:
                    gone[id] = absent
                elif may_go(item.record, now):
                    removals.append(RemoveItem(id, item.stamp))
            answers = (yield Write(removals)) if removals else ()
            left = []
            for removal, answer in zip(removals, answers, strict=True):
                self._forget(removal.id)
                if isinstance(answer, Written):
                    gone[removal.id] = True
                elif isinstance(answer, Kept):
                    left.append(removal.id)
        return [gone[id] for id in ids]

    def _heard(self, item: Item, answer: Written | Kept | StoreUnavailable) -> None:
        """Remember what was written, as long as an attempt of this process is at it; forget what may be another."""
        with self._lock:
            self._known.pop(item.record.id, None)
            if isinstance(answer, Written) and item.record.state is State.IN_PROGRESS:
                self._known[item.record.id] = item
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)

    def _forget(self, id: bytes) -> None:
        with self._lock:
            self._known.pop(id, None)


def _as_read(record: Record, now: int) -> Record:
    return replace(record, read_at=now)


def _fits(record: Record, prefix: bytes, state: State | None, tenant: bytes | None, now: int) -> bool:
    return (
        record.id.startswith(prefix)
        and state in (None, record.state)
        and tenant in (None, record.tenant)
        and not record.expired(now)
    )


class ConditionalStore(ForwardingStore):
    """A blocking store over such an engine.

    perform: does one step, and raises StoreUnavailable where all of it failed; called from several threads at once
        where the capabilities say `concurrent`. clock: microseconds since the epoch.
    """

    def __init__(
        self, perform: Callable[[EngineStep], Any], capabilities: Capabilities, clock: Callable[[], int] = wall_clock
    ) -> None:
        self.capabilities = capabilities
        self._calls = Plans(clock)
        self._perform = perform

    def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return pump(call(*arguments, **options), self._perform)

    def close(self) -> None:
        """The engine's connections are its maker's."""


class AsyncConditionalStore(AsyncForwardingStore):
    """A store for one event loop over such an engine; the arguments are those of ConditionalStore."""

    def __init__(
        self,
        perform: Callable[[EngineStep], Awaitable[Any]],
        capabilities: Capabilities,
        clock: Callable[[], int] = wall_clock,
    ) -> None:
        self.capabilities = capabilities
        self._calls = Plans(clock)
        self._perform = perform

    async def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await apump(call(*arguments, **options), self._perform)

    async def aclose(self) -> None:
        """The engine's connections are its maker's."""
