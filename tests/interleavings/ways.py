"""The ways through an attempt, side by side: `attempt.py` as it runs, in both colours, and the machine alone.

The explorer tells each way what it tells the machine. After each reply all must stand at the same command, or have come
to the same conclusion. At each command all are cancelled, or interrupted, as well: what the background is left with
must be the same, and nothing may stay watched. There is no event loop and no thread here: the real coroutines are
stepped by hand, and the real blocking calls are made anew from the start for each step, up to an interruption.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterator, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from retryproof import attempt as straight
from retryproof import drive
from retryproof.core import flow
from retryproof.core.commands import (
    NOT_BEGUN,
    Checkpoint,
    Claim,
    Command,
    Complete,
    Disown,
    Done,
    LeaseLost,
    Linger,
    Lost,
    NotBegun,
    Pause,
    Paused,
    Raised,
    Release,
    Renew,
    Reply,
    Returned,
    Run,
)
from retryproof.core.hold import Hold
from retryproof.drive import clock as real_clock
from retryproof.stores.memory import MemoryStore
from retryproof.waiters import Waiters
from tests.interleavings.callers import BEGUN, ID, RENEWED, STEP, Caller, Told, frozen
from tests.interleavings.invariants import Violation

_now = 0.0


class Asked:
    """A command on its way; stands for the future that a store answers with."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.reply: Reply = None
        self.answered = False

    def done(self) -> bool:
        return self.answered

    def cancelled(self) -> bool:
        return False

    def result(self) -> Reply:
        return self.reply

    def __await__(self) -> Generator[Asked, Reply, Reply]:
        return (yield self)


class Rest:
    """A task that goes on after a cancellation."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self.work = work

    def add_done_callback(self, tell: Callable[[Any], None]) -> None:
        """It is not run to its end here."""


class Background:
    """What the keeper is left with."""

    def __init__(self) -> None:
        self.left: list[Disown | Linger] = []
        self.answers: list[Reply] = []
        self.watched = 0
        self.entered: set[bytes] = set()

    def enter(self, nonce: bytes) -> int:
        self.entered.add(nonce)
        return 2

    def leave(self, nonce: bytes) -> None:
        self.entered.discard(nonce)

    def watch(self, hold: Hold) -> None:
        self.watched += 1

    def unwatch(self, hold: Hold) -> None:
        self.watched -= 1

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        self.left.append(Disown(claim))
        self.answers.append(reply)

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        self.left.append(Linger(hold, last))


class Store:
    """An opened store whose commands go to whoever steps the way."""

    capabilities = MemoryStore.capabilities
    loop: Any = None

    def __init__(self, background: Background) -> None:
        self.background = background

    def perform(self, command: Any, timeout: float) -> Asked:
        return Asked(command)


class Scripted(Waiters):
    """Waiters whose time is the explorer's."""

    __slots__ = ()

    def pause(self, pause: Pause, most: int) -> Paused:
        paused = _script.perform(pause, 0.0)
        assert isinstance(paused, Paused)
        return paused


class Named(straight.Attempts):
    """Attempts of a caller whose nonce is its name."""

    __slots__ = ("caller",)

    def __init__(self, caller: Caller) -> None:
        super().__init__(())
        self.waiters = Scripted()
        self.caller = caller

    def claim(self, background: straight.CountingBackground, *rest: Any) -> Claim:
        claim = self.caller.claim()
        background.enter(claim.nonce)
        return claim


async def by_attempt(way: Way) -> flow.Conclusion:
    """As an engine does it."""
    caller = way.caller

    async def stays(seconds: float) -> bool:
        return await Asked(Pause(seconds, waiting=True)) == Paused()

    attempt = await Named(caller).abegin(
        way.store, caller.policy, ID, caller.fingerprint, refingerprint=caller.refingerprint, stays=stays
    )
    if not isinstance(attempt, straight.LoopAttempt):
        return attempt
    way.hold = attempt.hold
    try:
        outcome: Any = await Asked(Run(attempt.hold))
        if outcome == NOT_BEGUN:
            conclusion = await attempt.renew()
            if conclusion is not None:
                return conclusion
            outcome = await Asked(Run(attempt.hold))
        return await attempt.finish(outcome)
    finally:
        attempt.leave()


async def by_machine(way: Way) -> flow.Conclusion:
    """The machine alone, from its start, and again from what came of the work."""
    caller, policy, timeout = way.caller, way.caller.policy, way.caller.policy.store_timeout

    async def pause(command: Pause) -> Paused:
        return await Asked(command)  # type: ignore[return-value]  # the explorer answers a Pause so

    begun = await drive.abegin(
        flow.attempt(caller.claim(), policy, _now, caller.refingerprint), way.store, timeout, pause
    )
    if not isinstance(begun, Run):
        return begun
    hold = way.hold = begun.hold
    way.background.watch(hold)
    unwatch = True
    try:
        outcome: Any = await Asked(begun)
        if outcome == NOT_BEGUN:
            late = flow.ended(hold, NOT_BEGUN, policy, _now)
            conclusion = await drive.arenew(late, hold, way.store, timeout)
            if conclusion is not None:
                return conclusion
            outcome = await Asked(begun)

        def adopt(rest: Any) -> None:
            nonlocal unwatch
            unwatch = False

        rest = flow.ended(hold, outcome, policy, _now)
        return await drive.afinish(rest, hold, outcome, way.store, timeout, adopt)
    finally:
        if unwatch:
            way.background.unwatch(hold)


class Way:
    """One caller, awaited, with the commands and replies of the machine."""

    def __init__(self, life: Callable[[Way], Coroutine[Any, Any, flow.Conclusion]], caller: Caller, now: float) -> None:
        self.caller = caller
        self.background = Background()
        self.store: Any = Store(self.background)
        self.hold: Hold | None = None
        self._conclusion: flow.Conclusion | None = None
        self._life = life(self)
        self._at = now
        self._asked: Asked | None = None
        self._late: Done | None = None
        self._ready: deque[Command] = deque()
        self._step(None, now)

    @property
    def command(self) -> Command | None:
        """Where it stands."""
        if self._ready:
            return self._ready[0]
        if self._late is not None and self.hold is not None:
            return Run(self.hold)
        return None if self._asked is None else self._asked.command

    @property
    def conclusion(self) -> flow.Conclusion | None:
        """What it came to, once the background has what it was left with."""
        return None if self._ready else self._conclusion

    @property
    def is_late(self) -> bool:
        """Whether the answer to a renewal came too late as well."""
        return self._late is not None and self.hold is not None and not self.hold.may_begin(self._at)

    def begun(self, now: float) -> None:
        """The work begins: found in the step in which the answer to a renewal came."""
        if self._late is not None:
            late, self._late = self._late, None
            self._step(late, now)

    def tell(self, reply: Reply, now: float) -> None:
        """The reply to `command`."""
        if self._ready:
            self._ready.popleft()
        elif isinstance(self.command, Renew) and isinstance(reply, Done):
            assert self.hold is not None
            self._late = reply  # until it is known whether the work begins
            self.hold.renewed(self._at)
            self._at = now
        elif self._late is not None:  # it does not
            self.begun(now)
        else:
            self._step(reply, now)

    def _step(self, reply: Reply, now: float) -> None:
        global _now
        _now = self._at = now
        known = len(self.background.left)
        try:
            self._asked = self._life.send(reply)
        except StopIteration as stop:
            self._asked, self._conclusion = None, stop.value
        self._ready.extend(self.background.left[known:])

    def cancelled(self, reply: Reply) -> object:
        """What is left once the caller is cancelled here; `reply` is there, and unread, where it is one."""
        before, asked = len(self.background.left), self._asked
        if asked is None or self._ready or isinstance(self.command, Run):
            return None  # the work's cancellation is an outcome
        asked.reply, asked.answered = reply, reply is not None
        rests.clear()
        try:
            self._life.throw(asyncio.CancelledError())
        except asyncio.CancelledError:
            pass
        else:
            raise Violation("a cancellation is swallowed")
        watched = self.background.watched
        for rest in rests:
            go_on = rest.work.send(None)
            assert isinstance(go_on, Asked)
            self._ready.append(go_on.command)
            rest.work.close()  # as a loop that shuts down: the keeper goes on
        if self.background.watched > 0:
            raise Violation("a hold is watched after its end")
        left = self.background.left[before:]
        return watched, len(rests), *map(point, (*self._ready, *left)), *map(frozen, self.background.answers)


rests: list[Rest] = []


class Interruption(KeyboardInterrupt):
    """Where the script of a blocking way ends."""

    def __init__(self, command: Command) -> None:
        self.command = command


class Script:
    """An opened store, for a caller that blocks: it answers what it was told to, and is interrupted after that."""

    capabilities = MemoryStore.capabilities

    def __init__(self, told: Sequence[Told]) -> None:
        global _now
        self.background = Background()
        self.hold: Hold | None = None
        self._told = deque(told[1:])
        _now = told[0].now

    def perform(self, command: Any, timeout: float) -> Reply:
        """The next reply."""
        global _now
        while self._told:
            item = self._told.popleft()
            if item.what == RENEWED and self.hold is not None:
                self.hold.renewed(item.now)
            elif item.what == STEP:
                kept = self._told.popleft() if self._told else None
                if kept is None:
                    raise Interruption(Checkpoint(ID, b"", 0, "step", b"kept"))
                if isinstance(kept.what, Lost):
                    _now = kept.now
                    return LeaseLost()
            elif item.what is not None and not isinstance(item.what, str):
                _now = item.now
                if isinstance(command, Renew) and isinstance(item.what, Done):
                    self._begin_late()
                return item.what
        raise Interruption(command)

    def _begin_late(self) -> None:
        """Whether the work begins is found in the step in which the answer to a renewal comes."""
        global _now
        while self._told and self._told[0].what == RENEWED:
            renewed = self._told.popleft()
            assert self.hold is not None
            self.hold.renewed(renewed.now)
        if self._told and self._told[0].what in (BEGUN, NOT_BEGUN):
            _now = self._told.popleft().now


def blocking(caller: Caller, told: Sequence[Told]) -> tuple[object, object]:
    """Where the blocking way stands after this, or what it came to; and what is left when it is interrupted there."""
    global _script
    script: Any = Script(told)
    _script = script
    attempt: straight.BlockingAttempt | flow.Conclusion | None = None
    try:
        attempt = Named(caller).begin(script, caller.policy, ID, caller.fingerprint, refingerprint=caller.refingerprint)
        if not isinstance(attempt, straight.BlockingAttempt):
            return point(attempt), ()
        script.hold = attempt.hold
        outcome = script.perform(Run(attempt.hold), 0.0)
        if outcome == NOT_BEGUN:
            conclusion = attempt.renew()
            if conclusion is not None:
                return point(conclusion), ()
            outcome = script.perform(Run(attempt.hold), 0.0)
        return point(attempt.finish(outcome)), ()
    except Interruption as interruption:
        return point(interruption.command), tuple(map(point, script.background.left))
    finally:
        if isinstance(attempt, straight.BlockingAttempt):
            attempt.leave()
        if script.background.watched > 0 or script.background.entered:
            raise Violation("a hold is watched after its end")


_script: Script


@contextlib.contextmanager
def by_hand() -> Iterator[None]:
    """No event loop, no thread, no time but the explorer's."""

    async def sleep(seconds: float) -> None:
        await Asked(Pause(seconds))

    def create_task(work: Coroutine[Any, Any, Any]) -> Rest:
        rests.append(Rest(work))
        return rests[-1]

    loop = SimpleNamespace(create_task=create_task)
    hand = SimpleNamespace(
        CancelledError=asyncio.CancelledError,
        Future=Asked,
        sleep=sleep,
        get_running_loop=lambda: loop,
    )
    blocked = SimpleNamespace(sleep=lambda seconds: _script.perform(Pause(seconds), 0.0))
    assert drive.clock is real_clock
    with (
        patch.object(straight, "clock", lambda: _now),
        patch.object(drive, "clock", lambda: _now),
        patch.object(drive, "time", blocked),
        patch.object(straight, "asyncio", hand),
        patch.object(drive, "asyncio", hand),
        patch.object(drive, "_outliving", set()),
    ):
        yield


def point(value: Any) -> Hashable:
    """Equal for the same command or conclusion; of a hold, what the machine reads."""
    hold = getattr(value, "hold", None)
    if hold is None:
        return frozen(value)
    rest = [frozen(getattr(value, one.name)) for one in fields(value) if one.name != "hold"]
    deadline = hold.deadline if isinstance(value, Run) else None
    return type(value), hold.nonce, hold.token, deadline, hold.stops, hold.lost, *rest


class Ways:
    """All ways of one caller, with the replies of the machine; raises Violation if one differs."""

    def __init__(self, caller: Caller, now: float) -> None:
        self._caller = caller
        self._told = [Told("begin", now)]
        self._outcome: Reply = None
        self.awaited = (Way(by_attempt, caller, now), Way(by_machine, caller, now))

    def note(self, item: Told, command: Command | None) -> None:
        """What the caller is told, at this command."""
        self._told.append(item)
        if item.what == BEGUN:
            for way in self.awaited:
                way.begun(item.now)
        elif item.what == RENEWED:
            for way in self.awaited:
                assert way.hold is not None
                way.hold.renewed(item.now)
        elif not isinstance(item.what, str) and isinstance(command, Run):
            self._outcome = item.what

    def tell(self, reply: Reply, now: float) -> None:
        """The reply to the command at which all stand."""
        for way in self.awaited:
            way.tell(reply, now)

    def compare(self, command: Command | None, conclusion: flow.Conclusion | None) -> None:
        """All stand where the machine stands."""
        at = (point(command), point(conclusion))
        for way in self.awaited:
            if (found := (point(way.command), point(way.conclusion))) != at:
                raise Violation(f"the machine is at {at}, and attempt.py at {found}")
        if conclusion is not None and any(way.background.watched > 0 for way in self.awaited):
            raise Violation("a hold is watched after its end")
        if isinstance(command, Disown | Linger) or any(way.is_late for way in self.awaited):
            return  # in the midst of a step, for a caller that blocks
        blocked, left = blocking(self._caller, self._told)
        if blocked != (at[0] if conclusion is None else at[1]):
            raise Violation(f"the machine is at {at}, and the blocking attempt at {blocked}")
        if conclusion is None and left != (expected := self._left(command)):
            raise Violation(f"an interruption at {command} leaves {left}, not {expected}")

    def _left(self, command: Command | None) -> object:
        """What an interruption at this command must leave to the keeper, beside what was left before (C3, C4)."""
        way = self.awaited[0]
        before = tuple(map(point, way.background.left))
        if way.hold is None or isinstance(command, Run) or self._outcome is None:
            return before
        last: Complete | Release
        match self._outcome:
            case Returned(result):
                last = way.hold.complete(result)
            case NotBegun():
                last = way.hold.release()
            case Raised(unknown=False):
                last = way.hold.release()
            case _:
                return before
        return (*before, point(Linger(way.hold, last)))

    def cancel(self, reply: Reply) -> None:
        """Cancel all here; nobody goes on from here. reply: the answer that is there unread, or None."""
        ours, alone = [way.cancelled(reply) for way in self.awaited]
        if ours != alone:
            raise Violation(f"a cancellation leaves {ours}, and under the machine alone {alone}")
