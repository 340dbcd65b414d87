"""One attempt at an operation: claim, renew, settle, tell the listeners; for threads and for event loops.

    attempt = attempts.begin(opened, policy, id, fingerprint, where)      # or `await attempts.abegin(…)`
    if not isinstance(attempt, BlockingAttempt):                          # LoopAttempt
        …                                                                 # a conclusion: replayed, busy, down, …
    try:
        conclusion = None if attempt.hold.may_begin(clock()) else attempt.renew()
        if conclusion is None:
            conclusion = attempt.finish(work(attempt.operation))
    finally:
        attempt.leave()

Most attempts are one claim that is acquired, and one result that is stored. They need no state machine: the functions
`after_claim`, `to_settle` and `after_settling` of `core.flow` decide. If they do not, the machine is started at that
point with the reply that has come, and `drive` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from retryproof.core.commands import NOT_BEGUN, Acquired, Claim, Complete, Release, Reply, Run, WorkOutcome
from retryproof.core.flow import Conclusion, after_claim, after_settling, ended, settle, to_settle
from retryproof.core.flow import attempt as machine
from retryproof.core.hold import Hold
from retryproof.core.policy import Policy
from retryproof.drive import (
    AsyncPerformer,
    Background,
    Performer,
    abegin,
    afinish,
    arenew,
    begin,
    clock,
    finish,
    go_on,
    leave_settling_to,
    renew,
    see_to,
)
from retryproof.listening import Listening
from retryproof.observe.events import Listener
from retryproof.operation import ENDED, BlockingOperation, LoopOperation, enter, leave
from retryproof.waiters import Stays, Waiters

T = TypeVar("T")
Refingerprint = Callable[[bytes], bytes | None]


class CountingBackground(Background, Protocol):
    """A background that counts the attempts of its process (C15)."""

    def enter(self, nonce: bytes) -> int:
        """The attempt with this nonce begins; says how alone it is, as a claim does."""

    def leave(self, nonce: bytes) -> None:
        """It has ended; called once more where an interruption came."""


class BlockingStore(Performer, Protocol):
    """An opened store, for threads."""

    @property
    def background(self) -> CountingBackground: ...


class LoopStore(AsyncPerformer, Protocol):
    """An opened store, for the tasks of its event loop."""

    @property
    def background(self) -> CountingBackground: ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...


S = TypeVar("S", BlockingStore, LoopStore)
Op = TypeVar("Op", BlockingOperation, LoopOperation)


def unknown_algorithm(stored: bytes) -> bytes | None:
    """The input's fingerprint by another algorithm: not known."""
    return None


class Attempts(Listening):
    """The attempts of one engine, and what they have in common: who hears of them, and how many of them wait."""

    __slots__ = ("waiters",)

    def __init__(self, listeners: Sequence[Listener]) -> None:
        super().__init__(listeners)
        self.waiters = Waiters()

    def begin(
        self,
        opened: BlockingStore,
        policy: Policy,
        id: bytes,
        fingerprint: bytes,
        where: str = "",
        tenant: bytes = b"",
        trace: str = "",
        refingerprint: Refingerprint = unknown_algorithm,
        *,
        beside: bool = False,
        fails_open: bool = False,
    ) -> BlockingAttempt | Conclusion:
        """Claim an operation; return an attempt that may run, whose lease is renewed, or a conclusion.

        id, fingerprint, tenant, trace: as in Claim. where: the endpoint or function, for events.
        beside: other taken-over operations run at the same time, so that its death would not count (C15).
        fails_open: who asks runs the work without protection where the store is out of reach; the listeners are told
            so.
        """
        began = clock()
        claim = self.claim(opened.background, policy, id, fingerprint, tenant, trace, beside)
        reply: Reply = None
        try:
            reply = opened.perform(claim, policy.store_timeout)
            return self.begun(opened, policy, claim, began, reply, where, refingerprint, fails_open=fails_open)
        except BaseException:  # an interruption: nothing has begun, and nobody may hold it
            opened.background.leave(claim.nonce)
            if type(reply) is Acquired:  # any other is seen to where the store, or the machine, was interrupted
                opened.background.disown(claim, reply)
            raise

    def begun(
        self,
        opened: BlockingStore,
        policy: Policy,
        claim: Claim,
        began: float,
        reply: Reply,
        where: str,
        refingerprint: Refingerprint,
        *,
        fails_open: bool = False,
    ) -> BlockingAttempt | Conclusion:
        """The rest of `begin`, after the first reply to the claim, which was sent at this time.

        If it is interrupted, the caller leaves the background, and disowns an acquired claim.
        """
        step: Hold | Conclusion | None = None
        try:
            step = after_claim(claim, reply, began, began, policy)
            if step is None:
                flow = machine(claim, policy, began, refingerprint, (reply, clock()))
                step = _held(
                    begin(
                        flow, opened, policy.store_timeout, lambda pause: self.waiters.pause(pause, policy.max_waiters)
                    )
                )
            if isinstance(step, Hold):
                return BlockingAttempt(self, opened, policy, step, began, where)
        except BaseException:
            if isinstance(step, Hold):
                opened.background.unwatch(step)
            raise
        opened.background.leave(claim.nonce)
        self.conclude(step, claim.id, where, began, fails_open=fails_open)
        return step

    async def abegin(
        self,
        opened: LoopStore,
        policy: Policy,
        id: bytes,
        fingerprint: bytes,
        where: str = "",
        tenant: bytes = b"",
        trace: str = "",
        refingerprint: Refingerprint = unknown_algorithm,
        *,
        beside: bool = False,
        fails_open: bool = False,
        stays: Stays | None = None,
    ) -> LoopAttempt | Conclusion:
        """`begin`, awaited.

        fails_open: who asks runs the work without protection where the store is out of reach; the listeners are told
            so. stays: how a duplicate waits (C18), where it may leave meanwhile.
        """
        began = clock()
        background = opened.background
        claim = self.claim(background, policy, id, fingerprint, tenant, trace, beside)
        attempt: LoopAttempt | None = None
        step: Hold | Conclusion | None
        try:
            asked = opened.perform(claim, policy.store_timeout)
            try:
                reply = await asked
            except asyncio.CancelledError:
                see_to(background, claim, asked)
                raise
            step = after_claim(claim, reply, began, began, policy)
            if step is None:
                step = await self._decide(claim, reply, opened, policy, began, refingerprint, stays)
            if isinstance(step, Hold):
                attempt = LoopAttempt(self, opened, policy, step, began, where)
                return attempt
        finally:
            if attempt is None:
                background.leave(claim.nonce)
        self.conclude(step, id, where, began, fails_open=fails_open)
        return step

    def claim(
        self,
        background: CountingBackground,
        policy: Policy,
        id: bytes,
        fingerprint: bytes,
        tenant: bytes,
        trace: str,
        beside: bool,
    ) -> Claim:
        """A claim with a new nonce, whose attempt has entered the background and must leave it."""
        nonce = os.urandom(16)
        try:
            alone = background.enter(nonce)
            return Claim(  # in the order of its fields: by name it takes twice as long
                id,
                fingerprint,
                nonce,
                policy.lease,
                policy.retention,
                policy.unsettled_retention,
                policy.on_abandoned,
                policy.max_attempts,
                tenant,
                self.trace_of(trace),
                0 if beside else alone,
            )
        except BaseException:
            background.leave(nonce)
            raise

    async def _decide(
        self,
        claim: Claim,
        reply: Reply,
        opened: LoopStore,
        policy: Policy,
        began: float,
        refingerprint: Refingerprint,
        stays: Stays | None,
    ) -> Hold | Conclusion:
        """Continue a claim whose first reply does not decide."""
        flow = machine(claim, policy, began, refingerprint, (reply, clock()))
        return _held(
            await abegin(
                flow,
                opened,
                policy.store_timeout,
                lambda pause: self.waiters.apause(pause, policy.max_waiters, stays),
                before=reply,
            )
        )


def _held(step: Run | Conclusion) -> Hold | Conclusion:
    return step.hold if isinstance(step, Run) else step


class HeldAttempt(Generic[S, Op]):
    """What both kinds of attempts share: the lease is renewed until the attempt is concluded, released or left.

    The work may begin only if `hold.may_begin` says so in the same step, or after `renew` (C6).

    rest: the task that continues to settle it after a cancellation has interrupted `LoopAttempt.finish`.
    """

    __slots__ = ("_attempts", "_began", "_opened", "_watched", "hold", "operation", "policy", "rest")

    OPERATION: type[Op]

    def __init__(self, attempts: Attempts, opened: S, policy: Policy, hold: Hold, began: float, where: str) -> None:
        self._attempts = attempts
        self._opened: S = opened
        self.policy = policy
        self._began = began
        self.hold = hold
        self.operation: Op = self.OPERATION(hold, opened, policy)
        self.rest: asyncio.Task[Conclusion] | None = None
        hold.where = where
        hold.on_overrun = attempts.overran
        hold.on_settled = attempts.settled
        opened.background.watch(hold)
        self._watched = True

    def give_back(self) -> None:
        """Release an attempt that was not begun, in the background; called in place of everything else."""
        self._opened.background.linger(self.hold, self.hold.release())
        self.leave()

    def _conclude(self, conclusion: Conclusion) -> None:
        self._unwatch()
        self._attempts.conclude(conclusion, self.hold.id, self.hold.where, self._began)

    def _unwatch(self) -> None:
        if self._watched:
            self._opened.background.unwatch(self.hold)
            self._watched = False

    def interrupt(self, outcome: WorkOutcome) -> None:
        """Leave the outcome to the keeper, unless it is settled: the caller does not settle it any more."""
        if self._watched:
            leave_settling_to(self._opened.background, self.hold, outcome)
            self._unwatch()

    def leave(self) -> None:
        """The work has ended, whatever came of it; called once more where an interruption came."""
        if self._watched:
            self.hold.refuses = ENDED
            self._unwatch()
        self._opened.background.leave(self.hold.nonce)


class BlockingAttempt(HeldAttempt[BlockingStore, BlockingOperation]):
    """An attempt that holds its claim and runs in a thread."""

    __slots__ = ()

    OPERATION = BlockingOperation

    def renew(self) -> Conclusion | None:
        """Renew a lease that was over before the work began; None if the work may begin now, else the conclusion.

        If it is interrupted, the work was not begun, and the claim is released.
        """
        hold = self.hold
        flow = ended(hold, NOT_BEGUN, self.policy, clock())
        conclusion = renew(flow, hold, self._opened, self.policy.store_timeout)
        if conclusion is not None:
            self._conclude(conclusion)
        return conclusion

    def within(self, call: Callable[[], T]) -> T:
        """Call with this operation as the current one, for work in parts, such as a stream."""
        outer = enter(self.operation)
        try:
            return call()
        finally:
            leave(self.operation, outer)

    def finish(self, outcome: WorkOutcome) -> Conclusion:
        """Store the outcome of the work, or release the operation; tell the listeners.

        An interruption does not lose the outcome: the keeper continues.
        """
        self.hold.refuses = ENDED
        try:
            step = to_settle(self.hold, outcome, self.policy)
            sent, reply = clock(), None
            if isinstance(step, (Complete, Release)):
                reply = self._opened.perform(step, self.policy.store_timeout)
            return self.finished(outcome, step, sent, reply)
        except BaseException:
            self.interrupt(outcome)
            raise

    def finished(
        self, outcome: WorkOutcome, step: Complete | Release | Conclusion | None, sent: float, reply: Reply
    ) -> Conclusion:
        """The rest of `finish`, after the first reply to the command from `to_settle`, if it was one.

        If it is interrupted, the caller must call `interrupt` for the rest.
        """
        hold, policy, opened = self.hold, self.policy, self._opened
        conclusion: Conclusion | None
        if isinstance(step, (Complete, Release)):
            conclusion = after_settling(hold, step, reply)
            if conclusion is None:
                flow = settle(hold, step, policy, sent, (reply, clock()))
                conclusion = finish(flow, opened, policy.store_timeout)
        elif step is not None:
            conclusion = step
        else:
            conclusion = finish(ended(hold, outcome, policy, sent), opened, policy.store_timeout)
        self._conclude(conclusion)
        return conclusion


class LoopAttempt(HeldAttempt[LoopStore, LoopOperation]):
    """An attempt that holds its claim and runs on an event loop."""

    __slots__ = ()

    OPERATION = LoopOperation

    async def renew(self) -> Conclusion | None:
        """`BlockingAttempt.renew`, awaited."""
        hold = self.hold
        flow = ended(hold, NOT_BEGUN, self.policy, clock())
        conclusion = await arenew(flow, hold, self._opened, self.policy.store_timeout)
        if conclusion is not None:
            self._conclude(conclusion)
        return conclusion

    async def finish(self, outcome: WorkOutcome) -> Conclusion:
        """Store the outcome of the work, or release the operation; tell the listeners.

        A cancellation does not lose the outcome: `rest` continues, and tells the listeners at its end. Another
        interruption, which may end the loop, does not lose it either: the keeper continues.
        """
        self.hold.refuses = ENDED
        hold, policy, opened = self.hold, self.policy, self._opened
        conclusion: Conclusion | None
        step = to_settle(hold, outcome, policy)
        try:
            if isinstance(step, (Complete, Release)):
                sent = clock()
                try:
                    reply = await opened.perform(step, policy.store_timeout)
                except asyncio.CancelledError:
                    flow = settle(hold, step, policy, sent)
                    self._adopt(go_on(flow, next(flow), hold, outcome, opened, policy.store_timeout))
                    raise
                conclusion = after_settling(hold, step, reply)
                if conclusion is None:
                    flow = settle(hold, step, policy, sent, (reply, clock()))
                    conclusion = await afinish(flow, hold, outcome, opened, policy.store_timeout, self._adopt)
            elif step is not None:
                conclusion = step
            else:
                flow = ended(hold, outcome, policy, clock())
                conclusion = await afinish(flow, hold, outcome, opened, policy.store_timeout, self._adopt)
        except BaseException:
            self.interrupt(outcome)
            raise
        self._conclude(conclusion)
        return conclusion

    def _adopt(self, rest: asyncio.Task[Conclusion]) -> None:
        """The lease is renewed until `rest` has ended."""
        self._watched = False
        self.rest = rest
        rest.add_done_callback(self._conclude_rest)

    def _conclude_rest(self, rest: asyncio.Task[Conclusion]) -> None:
        if not rest.cancelled() and rest.exception() is None:
            self._conclude(rest.result())


class Overtaking:
    """Cancels the running task when the lease of its attempt is lost (C8), until `end`."""

    __slots__ = ("_cancelled", "_hold", "_loop", "_others", "_task")

    def __init__(self, hold: Hold, loop: asyncio.AbstractEventLoop) -> None:
        task = asyncio.current_task(loop)
        self._hold = hold
        self._loop = loop
        self._task = task
        self._others = 0 if task is None else task.cancelling()  # cancellations by others
        self._cancelled = False  # by us
        hold.on_lost = self
        if hold.lost:  # told meanwhile, in the keeper's thread
            self()

    def __call__(self) -> None:
        """The lease is lost; called from the keeper's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the task has ended with it
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel("the lease was lost")

    def caused(self, error: BaseException) -> bool:
        """Whether this is our own cancellation, and nobody else cancelled the task too; ends it."""
        task = self._task
        self.end()
        alone = task is not None and task.cancelling() == self._others
        return self._cancelled and alone and isinstance(error, asyncio.CancelledError)

    def end(self) -> None:
        """The work has ended, and is not cancelled any more; called once or more."""
        task, self._task = self._task, None
        self._hold.on_lost = None
        if self._cancelled and task is not None:
            task.uncancel()
