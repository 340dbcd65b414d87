"""The keeper: what goes on beside the attempts of one opened store, in one thread of its own.

It renews the leases of running operations, in one batch, at a third of each lease; so a handler that blocks its event
loop loses no lease, and a short operation costs nothing (C6). It goes on settling what could not be stored (C10),
and takes back claims whose callers have gone without an answer (C3). The thread starts with the first operation and
ends when there has been nothing to keep for a while.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from retryproof.core.commands import Acquired, Claim, Complete, Done, FenceReply, Lost, Release, Running
from retryproof.core.hold import Hold
from retryproof.drive import clock
from retryproof.stores.base import Store

T = TypeVar("T")
logger = logging.getLogger("retryproof")

NEVER = float("inf")
COMPANY = 1 / 6
"""The part of a lease by which a renewal may come early, to travel with one that is due; then they stay together."""
RETRY_AT = 1 / 10
"""The part of a lease after which a renewal that failed is tried again."""
IDLE_SECONDS = 10.0
"""A thread with nothing to keep for so long ends; the next operation starts another."""
ORPHAN_SECONDS = 60.0
"""How long a claim whose answer was lost is looked for, at the least; after its lease it can be taken over anyway."""


@dataclass(slots=True, eq=False)
class _Chore:
    """A command that is repeated until the store answers it."""

    command: Claim | Complete | Release
    due: float
    until: float = NEVER
    delay: float = 0.25
    hold: Hold | None = None


class Keeper:
    """One thread that keeps the holds of one opened store.

    open_store: makes the store that the thread uses; called in the thread, at its start.
    owns: whether that store is closed at the end.
    """

    def __init__(self, open_store: Callable[[], Store], *, owns: bool, max_batch: int) -> None:
        self._open_store = open_store
        self._owns = owns
        self._max_batch = max_batch
        self._holds: dict[Hold, None] = {}
        self._chores: dict[int, _Chore] = {}
        self._active = 0
        self._suspects = 0
        self._counting = threading.Lock()
        self._mutex = threading.Condition()
        self._wake_at = 0.0  # when the thread looks next; 0 while it is looking
        self._thread: threading.Thread | None = None
        self._closing = False
        self._drain_until = 0.0

    # How many are at work (C15)

    def enter(self) -> int:
        """An attempt begins; says how alone it is: 2 nobody else, 1 nobody else that was taken over, 0 neither."""
        with self._counting:
            self._active += 1
            if self._active == 1:
                return 2
            return 0 if self._suspects else 1

    def leave(self) -> None:
        """An attempt has ended."""
        with self._counting:
            self._active -= 1

    # Holds

    def watch(self, hold: Hold) -> None:
        """Renew this hold until `unwatch`, for its `max_run` seconds at most."""
        self._holds[hold] = None
        if hold.attempt > 1:
            self._meet(hold)
        if hold.due < self._wake_at or self._thread is None:
            self._wake()

    def unwatch(self, hold: Hold) -> None:
        """Stop renewing it, unless it lingers."""
        if not hold.lingers:
            self._forget(hold)

    def _forget(self, hold: Hold) -> None:
        if self._holds.pop(hold, self) is None and hold.attempt > 1:
            with self._counting:
                self._suspects -= 1

    def _meet(self, newcomer: Hold) -> None:
        """Operations that were taken over and now run side by side: no death of theirs counts until they part."""
        with self._counting:
            self._suspects += 1
            if self._suspects < 2:
                return
        for hold in list(self._holds):
            if hold.attempt > 1 and not hold.demoted:
                hold.demoted = True
                if hold.due < NEVER:  # one that overran is not renewed again
                    hold.due = 0.0
        newcomer.due = 0.0

    # Chores

    def disown(self, claim: Claim) -> None:
        """Release this claim if it turns out to have been applied."""
        now = clock()
        self._add(_Chore(claim, due=now + 0.05, until=now + max(claim.lease, ORPHAN_SECONDS)))

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Renew and settle until the store answers; the hold's `on_settled` hears whether it was stored."""
        hold.lingers = True
        self._add(_Chore(last, due=clock() + 0.5, hold=hold))

    def _add(self, chore: _Chore) -> None:
        with self._mutex:
            self._chores[id(chore)] = chore
        if chore.due < self._wake_at or self._thread is None:
            self._wake()

    @property
    def idle(self) -> bool:
        """Whether nothing is held or left to settle."""
        return not self._holds and not self._chores

    # The thread

    def _wake(self) -> None:
        with self._mutex:
            if self._thread is None and not self._closing:
                self._start()
            self._mutex.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="retryproof-keeper", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # what is kept is safe without it: a lease that is not renewed ends
            logger.error("The keeper's thread does not start; whoever comes next tries again: %s", error)
        else:
            self._thread = thread

    def close(self, drain: float = 0.0) -> None:
        """Settle what lingers for up to `drain` seconds, then end the thread."""
        with self._mutex:
            self._closing = True
            self._drain_until = clock() + drain
            self._mutex.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(drain + 5.0)

    def _run(self) -> None:
        store: Store | None = None
        try:
            while self._sleep():
                try:
                    store = store or self._open_store()
                    self._renew(store)
                    self._do_chores(store)
                except Exception:
                    # The thread must outlive whatever a store or a listener raises; it tries again.
                    logger.exception("The keeper failed; it tries again.")
                    self._postpone()
        except BaseException:  # past every `except Exception`, as drivers in other languages may raise
            with self._mutex:
                self._thread = None  # whoever comes next starts another
            raise
        finally:
            if store is not None and self._owns:
                store.close()

    def _sleep(self) -> bool:
        """Wait until something is due; False when it is time to end."""
        idle_since: float | None = None
        with self._mutex:
            while True:
                # Infinity first: whoever adds something from here on sees it and wakes us.
                self._wake_at = NEVER
                now = clock()
                due = self._next_due()
                if due <= now and not self._over(now):
                    self._wake_at = 0.0
                    return True
                if due < NEVER:
                    idle_since = None
                else:
                    idle_since = now if idle_since is None else idle_since
                    due = idle_since + IDLE_SECONDS
                if self._over(now) or due <= now:
                    self._thread = None
                    return False
                self._wake_at = due
                self._mutex.wait((min(due, self._drain_until) if self._closing else due) - now)

    def _over(self, now: float) -> bool:
        return self._closing and (not self._chores or now >= self._drain_until)

    def _next_due(self) -> float:
        holds = [min(hold.due, hold.end) for hold in list(self._holds)]
        chores = [chore.due for chore in self._chores.values()]
        return min(holds + chores, default=NEVER)

    def _postpone(self) -> None:
        """After an error that no store should raise: look again in a while."""
        later = clock() + 0.5
        for hold in list(self._holds):
            hold.due, hold.end = max(hold.due, later), max(hold.end, later)
        for chore in list(self._chores.values()):
            chore.due = max(chore.due, later)

    def _renew(self, store: Store) -> None:
        now = clock()
        holds = list(self._holds)
        for hold in holds:
            if now >= hold.end:
                hold.due = hold.end = NEVER
                if hold.on_overrun is not None:
                    hold.on_overrun(hold)
        due: list[Hold] = []
        if any(now >= hold.due for hold in holds):
            due = [hold for hold in holds if now >= hold.due - hold.lease * COMPANY]
        for batch in _chunks(due, self._max_batch):
            sent = clock()
            commands = [hold.renew(alone=self._is_alone(hold)) for hold in batch]
            for hold, reply in zip(batch, _replies(store.renew, commands), strict=True):
                self._renewed(hold, reply, sent)

    def _is_alone(self, hold: Hold) -> bool:
        """Whether the death of this attempt would count (C15): as `enter` says, for as long as it has been so."""
        return not hold.demoted and (hold.attempt > 1 or self._active <= 1)

    def _renewed(self, hold: Hold, reply: FenceReply | Exception, sent: float) -> None:
        if isinstance(reply, Done):
            hold.renewed(sent)
        elif isinstance(reply, Lost):
            hold.due = hold.end = NEVER
            if hold in self._holds:
                hold.lose()
        else:
            hold.due = clock() + max(0.01, hold.lease * RETRY_AT)

    def _do_chores(self, store: Store) -> None:
        now = clock()
        due = [chore for chore in list(self._chores.values()) if chore.due <= now]
        calls: tuple[tuple[type, Callable[[Any], Sequence[Any]]], ...] = (
            (Complete, store.complete),
            (Release, store.release),
            (Claim, store.claim),
        )
        for kind, call in calls:
            of_kind = _apart([chore for chore in due if type(chore.command) is kind])
            for batch in _chunks(of_kind, self._max_batch):
                replies = _replies(call, [chore.command for chore in batch])
                for chore, reply in zip(batch, replies, strict=True):
                    self._answer(chore, reply)

    def _answer(self, chore: _Chore, reply: Any) -> None:
        if isinstance(reply, Acquired) and isinstance(chore.command, Claim):
            # It was applied after all, and nobody wants it: give it back.
            chore.command = Release(chore.command.id, chore.command.nonce, reply.token)
            chore.due = 0.0
        elif isinstance(reply, Exception | Running) and clock() < chore.until:
            chore.delay = min(2 * chore.delay, 5.0)
            chore.due = clock() + chore.delay
        else:
            self._end(chore, stored=isinstance(reply, Done))

    def _end(self, chore: _Chore, *, stored: bool) -> None:
        with self._mutex:
            self._chores.pop(id(chore), None)
        if chore.hold is not None:
            self._forget(chore.hold)
            if chore.hold.on_settled is not None:
                chore.hold.on_settled(chore.hold, stored)


def _apart(chores: Sequence[_Chore]) -> list[_Chore]:
    """At most one chore an operation; the others come with the next round."""
    return list({chore.command.id: chore for chore in reversed(chores)}.values())


def _chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _replies(call: Callable[[Any], Sequence[Any]], commands: Sequence[Any]) -> Sequence[Any]:
    try:
        return call(commands)
    except Exception as error:  # noqa: BLE001  # what a store raises is tried again, whatever it is
        return [error] * len(commands)
