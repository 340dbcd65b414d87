"""The keeper: the background work for the attempts of one opened store, in a thread of its own.

- It renews the leases of running operations, in one batch, after a third of each lease. So a handler that blocks its
  event loop loses no lease, and a short operation costs nothing (C6).
- It continues to settle operations whose results could not be stored. Before a twin's claim is sent, it asks the store
  about the operations that this process holds (C10; `core.twin`).
- It releases claims whose callers have gone without an answer (C3; `stores.disowned`).

While the store is out of reach, one call from time to time checks whether it answers again, and then everything
continues at once. The thread starts with the first operation, and ends after some time without work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from retryproof.core import twin
from retryproof.core.commands import (
    LOST,
    Claim,
    Complete,
    Done,
    FenceReply,
    Lost,
    Release,
    Reply,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.core.hold import NEVER, Hold
from retryproof.core.keys import short_digest
from retryproof.drive import clock
from retryproof.stores.base import Store
from retryproof.stores.disowned import Disowned
from retryproof.stores.lingering import Last, Lingering, chunks, no_answer, replies_of

logger = logging.getLogger("retryproof")

COMPANY = 1 / 6
"""A renewal may come early by this part of a lease, to share the batch of one that is due."""
RETRY_AT = 1 / 10
"""A failed renewal is tried again after this part of a lease."""
IDLE_SECONDS = 10.0
"""A thread without work for this many seconds ends; the next operation starts another one."""
FIRST_DELAY, LAST_DELAY = 0.25, 5.0
"""Seconds between two checks whether the store answers again; doubled each time."""
FRESH = 0.5
"""For this many seconds, a failed call also answers twins that wait."""
MAX_UNSTORED = 64 * 2**20
"""The default limit of results that wait while the store is out of reach, in bytes."""
NO_ANSWER = Unreachable(StoreUnavailable("The store does not answer; try again."), sent=False)


class Keeper:
    """One thread that keeps the holds of one opened store.

    open_store: makes the store that the thread uses; called in the thread, at its start.
    owns: whether that store is closed at the end.
    max_unstored: bytes of results that may wait while the store is out of reach; above that, claims are refused.
    holds: the holds of this process, by the operation's id.
    full: whether claims are refused, since too much waits to be stored.
    leave: the attempt with this nonce has ended, which began with `enter`; called once more where it was interrupted.
    """

    def __init__(
        self, open_store: Callable[[], Store], *, owns: bool, max_batch: int, max_unstored: int = MAX_UNSTORED
    ) -> None:
        self._open_store = open_store
        self._owns = owns
        self._max_batch = max_batch
        self.holds: dict[bytes, Hold] = {}
        self.full = False
        self._lingering = Lingering(max_batch, max_unstored)
        self._disowned = Disowned(max_batch)
        self._asked: dict[Hold, Future[Reply]] = {}
        self._troubled = False
        self._failed_at = self._probe_at = self._delay = 0.0
        self._active: set[bytes] = set()  # by nonce: it needs no lock, and can be taken from twice
        self.leave: Callable[[bytes], None] = self._active.discard
        self._suspects: dict[Hold, None] = {}  # those that were taken over
        self._lock = threading.RLock()  # entered by itself: the condition's own way in may be interrupted
        self._mutex = threading.Condition(self._lock)
        self._wake_at = 0.0  # when the thread looks next; 0 while it is looking
        self._called = NEVER  # when it was asked to look, even if the attempt that asked has ended
        self._thread: threading.Thread | None = None
        self._closing = False
        self._drain_until = 0.0

    # How many are at work (C15)

    def enter(self, nonce: bytes) -> int:
        """An attempt begins; says how alone it is: 2 nobody else, 1 nobody else that was taken over, 0 neither."""
        active = self._active
        active.add(nonce)
        if len(active) == 1:
            return 2
        return 0 if self._suspects else 1

    # Holds

    def watch(self, hold: Hold) -> None:
        """Renew this hold until `unwatch`, for its `max_run` seconds at most."""
        before = self.holds.get(hold.id)
        self.holds[hold.id] = hold
        if before is not None:  # one of this process that this one overtook
            self._suspects.pop(before, None)
        if hold.attempt > 1:
            self._meet(hold)
        if hold.due < self._wake_at or self._thread is None:
            self._wake(hold.due)

    def unwatch(self, hold: Hold) -> None:
        """Stop renewing it, unless it lingers."""
        if not hold.lingers:
            self._forget(hold)

    def _forget(self, hold: Hold) -> None:
        self._suspects.pop(hold, None)
        watched = self.holds.pop(hold.id, None)
        if watched is not hold and watched is not None:  # the one that overtook it
            self.holds.setdefault(hold.id, watched)
        if self._asked:
            self._say(hold, LOST)
        if self._closing:
            self._wake()

    def _meet(self, newcomer: Hold) -> None:
        """Operations that were taken over and now run side by side: no death of theirs counts until they part."""
        self._suspects[newcomer] = None
        if len(self._suspects) < 2:
            return
        for hold in list(self.holds.values()):
            if hold.attempt > 1 and not hold.demoted:
                hold.demoted = True
                if hold.due < NEVER:  # one that overran is not renewed again
                    hold.due = 0.0
        newcomer.due = 0.0

    # What is left to do

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        """Release this claim if it was, or later proves to be, applied. reply: the answer that nobody read."""
        self._disowned.add(claim, reply, clock())
        if self._thread is None or self._next_due() < self._wake_at:
            self._wake()

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Renew and settle until the store answers; call the hold's `on_settled` with whether it was stored."""
        with self._lock:
            self._lingering.add(hold, last, clock() + FIRST_DELAY)
            self.full = self._lingering.full
        hold.lingers = True
        if hold.end < NEVER and hold.due < NEVER:
            hold.end = NEVER  # it has ended, and is renewed until it is stored
        self._wake()

    @property
    def idle(self) -> bool:
        """Whether there is no hold and nothing to settle."""
        return not self.holds and not self._lingering and not self._disowned

    # Twins (C10)

    def instead(self, claims: Sequence[Claim], timeout: float) -> list[Reply]:
        """The answers to claims that this process can give, in at most `timeout` seconds; None: send the claim."""
        deadline = clock() + timeout
        asked = [self.ask(claim) for claim in claims]  # before any is waited for
        replies: list[Reply] = []
        for claim, answer in zip(claims, asked, strict=True):
            try:
                heard = None if answer is None else answer.result(max(0.0, deadline - clock()))
            except TimeoutError:
                heard = NO_ANSWER
            replies.append(None if answer is None else self.told(claim, heard))
        return replies

    def ask(self, claim: Claim) -> Future[Reply] | None:
        """The store's answer about a hold that conflicts with a claim, for `told`; None: there is no such hold."""
        hold = self.holds.get(claim.id)
        if hold is None:
            return _known(None) if self.full else None
        if twin.first(hold, self._lingering.last_of(hold), clock()) is None:
            return _known(None)
        with self._lock:
            if self._troubled and clock() - self._failed_at < FRESH:
                return _known(NO_ANSWER)
            asked = self._asked.get(hold)
            if asked is None:
                asked = self._asked[hold] = Future()
        self._wake()
        if self.holds.get(claim.id) is not hold:  # it has just ended
            self._say(hold, LOST)
        return asked

    def told(self, claim: Claim, heard: Reply) -> Reply:
        """The answer to a claim after the store's answer about the conflicting hold; None: send the claim."""
        hold = self.holds.get(claim.id)
        if hold is not None:
            reply = twin.told(hold, self._lingering.last_of(hold), claim, heard, clock())
            if reply is not None:
                return reply
        if self.full:
            error = StoreUnavailable("Results wait for a store that is out of reach, and there are too many of them.")
            return Unreachable(error, sent=False)
        return None

    def _say(self, hold: Hold, heard: Reply) -> None:
        with self._lock:
            asked = self._asked.pop(hold, None)
        if asked is not None:
            asked.set_result(heard)

    # The thread

    def _wake(self, by: float = 0.0) -> None:
        """Make the thread check its work by this time. A caller with a later time need not wake it again."""
        with self._lock:
            if self._thread is None and not self._closing:
                self._start()
            self._wake_at, self._called = min(self._wake_at, by), min(self._called, by)
            self._mutex.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="retryproof-keeper", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # without a thread nothing unsafe happens: a lease that is not renewed ends
            logger.error("The keeper's thread does not start; the next operation tries again: %s", error)
        else:
            self._thread = thread

    def close(self, drain: float = 0.0) -> None:
        """Wait for what runs and settle what lingers, for up to `drain` seconds, then end the thread; what is left is
        said in the log.
        """
        with self._lock:
            self._closing = True
            self._drain_until = clock() + drain
            self._disowned.hurry()
            self._probe_at = self._delay = 0.0
            self._mutex.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(drain + 5.0)
        self.say_what_is_left()

    def say_what_is_left(self) -> None:
        """Log the operations that run, or are not stored, at a shutdown."""
        held = {hold.id: hold for hold in [*self.holds.values(), *self._lingering.holds]}
        if held:
            named = [
                f"{short_digest(hold.id)}{' (done, not stored)' if hold.lingers else ''}" for hold in held.values()
            ]
            logger.error(
                "%d operations are not settled at the shutdown; if the process ends now, their outcome is unknown: %s",
                len(held),
                ", ".join(named[:100]),
            )

    def _run(self) -> None:
        store: Store | None = None
        try:
            while self._sleep():
                try:
                    store = store or self._open_store()
                    self._work(store)
                except Exception:
                    # The thread must survive every exception of a store or a listener; it tries again.
                    logger.exception("The keeper failed; it tries again.")
                    self._postpone()
        except BaseException:  # past every `except Exception`, as drivers in other languages may raise
            with self._lock:
                self._thread = None  # the next operation starts another one
            raise
        finally:
            if store is not None and self._owns:
                store.close()

    def _sleep(self) -> bool:
        """Wait until something is due; False if the thread has to end."""
        idle_since: float | None = None
        with self._lock:
            while True:
                # Infinity first: a caller that adds work from here on sees it, and wakes this thread.
                self._wake_at = NEVER
                now = clock()
                due = self._next_due()
                if due <= now and not self._over(now):
                    self._wake_at = 0.0
                    return True
                if self._called <= now:
                    self._called, idle_since = NEVER, None
                if due < NEVER:
                    idle_since = None
                else:
                    idle_since = now if idle_since is None else idle_since
                    due = idle_since + IDLE_SECONDS
                if self._over(now) or due <= now:
                    self._thread = None
                    return False
                # Not later than short operations asked for: else each of them would wake it, for nothing.
                due = self._wake_at = min(due, self._called)
                self._mutex.wait((min(due, self._drain_until) if self._closing else due) - now)

    def _over(self, now: float) -> bool:
        return self._closing and (self.idle or now >= self._drain_until)

    def _next_due(self) -> float:
        if self._asked:
            return 0.0
        holds = [min(hold.due, hold.end) for hold in list(self.holds.values())]
        chores = min(self._lingering.due, self._disowned.due)
        return min(min(holds, default=NEVER), max(chores, self._probe_at))

    def _postpone(self) -> None:
        """After an error that no store should raise: try again after a while."""
        later = clock() + 0.5
        for hold in list(self.holds.values()):
            hold.due, hold.end = max(hold.due, later), max(hold.end, later)
        self._fail()

    # One round

    def _work(self, store: Store) -> None:
        """Do the due work: waiting results, leases, claims to release; stop at the first call without an answer."""
        now, asked = clock(), list(self._asked)
        self._end_overruns(now)
        reached = self._settle(store, now) and self._renew(store, now)
        if reached and self._probe_at <= now and self._disowned.due <= now:
            reached = self._disowned.work(store, now, last=self._closing)
            if reached:
                self._reach()
        if not reached:
            self._fail()
        for hold in asked:  # of which there is nothing to say any more
            self._say(hold, LOST)

    def _fail(self) -> None:
        """The store is out of reach: one call checks again after a while, and nobody waits for it."""
        with self._lock:
            self._troubled, self._failed_at = True, clock()
            if self._failed_at >= self._probe_at:  # a renewal that fails meanwhile puts nothing off
                self._delay = min(max(FIRST_DELAY, 2 * self._delay), FIRST_DELAY if self._closing else LAST_DELAY)
                self._probe_at = self._failed_at + self._delay
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_result(NO_ANSWER)
        self._disowned.give_up(self._failed_at)

    def _reach(self) -> None:
        """The store has answered a call: everything continues."""
        if self._troubled:
            self._troubled, self._delay = False, 0.0
            self._try_all()

    def heard(self) -> None:
        """The store has answered another caller: try everything that waits for it at once."""
        if threading.current_thread() is self._thread:  # which sees to that itself, at the end of what it does
            return
        if self._troubled and clock() - self._failed_at >= FIRST_DELAY / 2:
            with self._lock:
                self._try_all()
                self._mutex.notify()

    def _try_all(self) -> None:
        self._probe_at = 0.0
        self._lingering.hurry()
        self._disowned.hurry()

    def _end_overruns(self, now: float) -> None:
        for hold in list(self.holds.values()):
            if now >= hold.end:
                hold.due = hold.end = NEVER
                if hold.on_overrun is not None:
                    hold.on_overrun(hold)

    def _settle(self, store: Store, now: float) -> bool:
        """Settle waiting results, only one while the store is out of reach; return whether the store answered."""
        asked = set(self._asked)
        due = self._lingering.due_by(now, asked)
        if self._troubled and self._probe_at > now and not any(last.hold in asked for last in due):
            return True
        first, rest = (due[:1], due[1:]) if self._troubled else ([], due)
        return self._settle_all(store, first) and self._settle_all(store, rest)

    def _settle_all(self, store: Store, due: Sequence[Last]) -> bool:
        for answers in self._lingering.send(store, due):
            nothing = no_answer(reply for _, reply in answers)
            # After the others, so that each gets its turn; or much later, if only this one gets no answer.
            later = clock() + (0.0 if nothing else LAST_DELAY)
            for last, reply in answers:
                self._answer(last, reply, later)
            if nothing:
                return False
            self._reach()
        return True

    def _answer(self, last: Last, reply: Any, later: float) -> None:
        hold = last.hold
        if isinstance(reply, Exception):
            last.due = later
            self._say(hold, NO_ANSWER)
            return
        with self._lock:
            self._lingering.remove(hold)
            self.full = self._lingering.full
        self._forget(hold)
        if hold.on_settled is not None:
            hold.on_settled(hold, isinstance(reply, Done))

    def _renew(self, store: Store, now: float) -> bool:
        """Renew the due leases; return whether the store answered."""
        asked = set(self._asked)
        holds = list(self.holds.values())
        due: list[Hold] = []
        if any(now >= hold.due or hold in asked for hold in holds):
            due = [
                hold for hold in holds if now >= hold.due - hold.lease * COMPANY or (hold in asked and hold.due < NEVER)
            ]
        for place, batch in enumerate(chunks(due, self._max_batch)):
            sent = clock()
            commands = [hold.renew(alone=self._is_alone(hold)) for hold in batch]
            replies = replies_of(store.renew, commands)
            for hold, reply in zip(batch, replies, strict=True):
                self._renewed(hold, reply, sent)
            if no_answer(replies):
                for hold in due[(place + 1) * self._max_batch :]:
                    self._retry(hold)
                return False
            self._reach()
        return True

    def _is_alone(self, hold: Hold) -> bool:
        """Whether the death of this attempt would count (C15): as `enter` says, for as long as it has been so."""
        return not hold.demoted and (hold.attempt > 1 or len(self._active) <= 1)

    def _renewed(self, hold: Hold, reply: FenceReply | Exception, sent: float) -> None:
        if isinstance(reply, Done):
            hold.renewed(sent)
            self._say(hold, reply)
        elif isinstance(reply, Lost):
            hold.due = hold.end = NEVER
            if self.holds.get(hold.id) is hold:
                hold.lose()
            self._say(hold, reply)
        else:
            self._retry(hold)

    def _retry(self, hold: Hold) -> None:
        hold.due = clock() + max(0.01, hold.lease * RETRY_AT)
        self._say(hold, NO_ANSWER)


def _known(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future
