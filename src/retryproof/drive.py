"""The pumps: they perform the steps of generators, blocking in a thread or awaited on an event loop.

`pump` and `apump` serve every generator of steps: the statements of a SQL plan, the steps of a transaction, the storing
of a step's result. `drive`, `abegin` and `afinish` run a flow: they give store commands to the opened store, `Run` and
`Pause` to the caller, and background work (`Disown`, `Linger`) to the store's keeper. An exception of a store becomes
`Unreachable`, and the flow decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, Protocol, TypeGuard, TypeVar

from retryproof.core.commands import (
    NOT_BEGUN,
    Acquired,
    Claim,
    Command,
    Complete,
    Disown,
    Linger,
    NotBegun,
    Pause,
    Paused,
    Raised,
    Release,
    Reply,
    Returned,
    Run,
    Unreachable,
)
from retryproof.core.errors import ConfigurationError
from retryproof.core.hold import Hold

S = TypeVar("S")
T = TypeVar("T")
Steps = Generator[Command, tuple[Reply, float], T]
Told = tuple[Reply, float]
_TWICE = "A flow runs once."

clock: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""The clock that counts leases, in seconds (C6). On Linux, `time.monotonic` stops while the machine is suspended, but
the store's clock, which ends the lease, continues."""


# Any steps


def pump(steps: Generator[S, Any, T], perform: Callable[[S], Any]) -> T:
    """Perform each step and send its answer, in this thread; return the result of the steps.

    Exceptions of `perform`, interruptions too, are thrown into the steps: they decide, and clean up.
    """
    try:
        step = next(steps)
        while True:
            try:
                answer = perform(step)
            except BaseException as error:  # noqa: BLE001  # the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def apump(steps: Generator[S, Any, T], perform: Callable[[S], Awaitable[Any]]) -> T:
    """`pump` on the event loop; a cancellation is thrown into the steps as well."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await perform(step)
            except BaseException as error:  # noqa: BLE001  # the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result


# A flow


class Background(Protocol):
    """The background work for attempts: renewal, and attempts that their callers left."""

    def watch(self, hold: Hold) -> None:
        """Renew this hold until `unwatch`."""

    def unwatch(self, hold: Hold) -> None:
        """Stop renewing it, unless its result waits to be stored."""

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        """Release this claim if it was, or later proves to be, applied. reply: the answer that nobody read."""

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Renew and settle until it is stored."""


class Performer(Protocol):
    """An opened store for blocking callers."""

    @property
    def background(self) -> Background: ...

    def perform(self, command: Any, timeout: float) -> Reply:
        """One store command or Look; answers Unreachable rather than raise."""


class AsyncPerformer(Protocol):
    """An opened store for callers on an event loop."""

    @property
    def background(self) -> Background: ...

    def perform(self, command: Any, timeout: float) -> Awaitable[Reply]:
        """One store command or Look; answers Unreachable rather than raise anything but cancellation.

        The store sees to a claim whose caller was cancelled.
        """


class Asking:
    """The opened store for the code of an operation, from a thread."""

    __slots__ = ("_store", "_timeout")

    def __init__(self, store: Performer, timeout: float) -> None:
        self._store = store
        self._timeout = timeout

    def check_blocking(self) -> None:
        """Raise ConfigurationError if a blocking call is not allowed here."""

    def check_awaited(self) -> None:
        """Raise ConfigurationError if an awaited call is not allowed here."""
        raise ConfigurationError("This operation is run by a sync engine: use the blocking call, not the awaited one.")

    def ask(self, command: Any) -> Reply:
        """The reply to one command."""
        return self._store.perform(command, self._timeout)

    def aask(self, command: Any) -> Awaitable[Reply]:
        """`ask` for a task of the operation's event loop."""
        raise NotImplementedError


class LoopAsking(Asking):
    """The same for an operation on an event loop: from its tasks, and from threads that they start."""

    __slots__ = ("_awaited", "_loop")

    def __init__(self, store: AsyncPerformer, timeout: float, loop: asyncio.AbstractEventLoop) -> None:
        self._awaited = store
        self._timeout = timeout
        self._loop = loop

    def check_blocking(self) -> None:
        if asyncio._get_running_loop() is self._loop:
            raise ConfigurationError("step would block the event loop: await astep instead.")

    def check_awaited(self) -> None:
        if asyncio._get_running_loop() is not self._loop:
            raise ConfigurationError("This operation belongs to another event loop: use step here, not astep.")

    def ask(self, command: Any) -> Reply:
        """From a thread; on the loop itself, it would have to block."""
        if asyncio._get_running_loop() is self._loop:
            return Unreachable(ConfigurationError("A blocking call on the event loop cannot ask an async store."))

        async def asked() -> Reply:
            return await self.aask(command)

        return asyncio.run_coroutine_threadsafe(asked(), self._loop).result()

    def aask(self, command: Any) -> Awaitable[Reply]:
        return self._awaited.perform(command, self._timeout)


def begin(flow: Steps[T], store: Performer, timeout: float, pause: Callable[[Pause], Paused]) -> T | Run:
    """Run a flow from its start to its `Run` or its conclusion, in this thread.

    The caller performs the `Run`: it renews the hold, and checks `hold.may_begin` in the step that calls the work. If
    that says no, it calls `renew` first. `finish` runs the flow after the outcome.
    """
    return _pump(flow, None, store, timeout, pause)


def renew(flow: Steps[T], hold: Hold, store: Performer, timeout: float) -> T | None:
    """Run a flow whose work may not begin yet (C6); None if it may begin now, else the flow's conclusion.

    If it is interrupted, the work was not begun, and the claim is released.
    """
    told: Told | None = None
    try:
        while not hold.may_begin(clock()):
            step = _pump(flow, told, store, timeout, _sleep)
            if not isinstance(step, Run):
                return step
            told = (NOT_BEGUN, clock())
    except BaseException:
        store.background.linger(hold, hold.release())
        raise
    return None


def finish(flow: Steps[T], store: Performer, timeout: float) -> T:
    """Run a flow from an outcome, or from a later point, to its conclusion, in this thread.

    If it is interrupted, the caller leaves it to the background: `leave_settling_to`.
    """
    conclusion = _pump(flow, None, store, timeout, _sleep)
    if isinstance(conclusion, Run):
        raise RuntimeError(_TWICE)
    return conclusion


def _pump(
    flow: Steps[T], told: Told | None, store: Performer, timeout: float, pause: Callable[[Pause], Paused]
) -> T | Run:
    """Send the flow this (None at its start), and perform its commands up to `Run` or the conclusion."""
    try:
        command = flow.send(told)  # type: ignore[arg-type]  # None starts a generator
        while True:
            reply: Reply = None
            if isinstance(command, Run):
                return command
            if isinstance(command, Pause):
                reply = pause(command)
            elif isinstance(command, Disown | Linger):
                _leave_to(store.background, command)
            else:
                reply = store.perform(command, timeout)
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result


def abegin(
    flow: Steps[T],
    store: AsyncPerformer,
    timeout: float,
    pause: Callable[[Pause], Awaitable[Paused]],
    before: Reply = None,
) -> Awaitable[T | Run]:
    """`begin`, awaited. before: the reply to its claim that the flow knows already."""
    return _apump(flow, None, store, timeout, pause, before)


async def arenew(flow: Steps[T], hold: Hold, store: AsyncPerformer, timeout: float) -> T | None:
    """`renew`, awaited; a cancellation is an interruption."""
    told: Told | None = None
    try:
        while not hold.may_begin(clock()):
            step = await _apump(flow, told, store, timeout, _asleep)
            if not isinstance(step, Run):
                return step
            told = (NOT_BEGUN, clock())
    except BaseException:
        store.background.linger(hold, hold.release())
        raise
    return None


async def afinish(
    flow: Steps[T],
    hold: Hold,
    outcome: Reply,
    store: AsyncPerformer,
    timeout: float,
    adopt: Callable[[asyncio.Task[T]], None],
) -> T:
    """`finish`, awaited. outcome: that of the work.

    A cancellation does not lose the outcome: the rest continues in a task of its own, which is passed to `adopt`.
    """
    command: Command | None = None
    told: Told | None = None
    try:
        while True:
            command = flow.send(told)  # type: ignore[arg-type]  # None starts a generator
            if isinstance(command, Pause):
                await asyncio.sleep(command.seconds)
                reply: Reply = None
            elif isinstance(command, Linger):
                _leave_to(store.background, command)
                reply = None
            else:
                reply = await store.perform(command, timeout)
            told = (reply, clock())
    except StopIteration as stop:
        result: T = stop.value
        return result
    except asyncio.CancelledError:
        if command is not None:
            adopt(go_on(flow, command, hold, outcome, store, timeout))
        raise


def go_on(
    flow: Steps[T], command: Command, hold: Hold, outcome: Reply, store: AsyncPerformer, timeout: float
) -> asyncio.Task[T]:
    """A task that continues settling from the cancelled command, and then stops renewing the hold.

    A command that was under way is sent again: commands are idempotent by nonce (C3).
    """
    return _in_background(_settle(flow, command, hold, outcome, store, timeout))


async def _settle(
    flow: Steps[T], command: Command, hold: Hold, outcome: Reply, store: AsyncPerformer, timeout: float
) -> T:
    """Perform this command and the following ones; if the loop shuts down meanwhile, the keeper continues."""
    try:
        conclusion = await _apump(flow, None, store, timeout, _asleep, command=command)
        if isinstance(conclusion, Run):
            raise RuntimeError(_TWICE)
        return conclusion
    except BaseException:
        leave_settling_to(store.background, hold, outcome)
        raise
    finally:
        store.background.unwatch(hold)


async def _apump(
    flow: Steps[T],
    told: Told | None,
    store: AsyncPerformer,
    timeout: float,
    pause: Callable[[Pause], Awaitable[Paused]],
    reply: Reply = None,
    command: Command | None = None,
) -> T | Run:
    """`_pump`, awaited. reply: the one before. command: the one at which the flow stands, to begin with."""
    try:
        if command is None:
            command = flow.send(told)  # type: ignore[arg-type]  # None starts a generator
        while True:
            before, reply = reply, None
            if isinstance(command, Run):
                return command
            if isinstance(command, Pause):
                reply = await pause(command)
            elif isinstance(command, Disown | Linger):
                _leave_to(store.background, command)
            else:
                asked = store.perform(command, timeout)
                try:
                    reply = await asked
                except asyncio.CancelledError:
                    if isinstance(command, Claim):
                        see_to(store.background, command, asked, before)
                    raise
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result


def see_to(background: Background, claim: Claim, asked: Awaitable[Reply], before: Reply = None) -> None:
    """Disown a claim whose caller was cancelled. before: the reply to an earlier sending.

    The store handles a claim that is under way. But only the caller knew of a claim whose reply has come and was not
    read, or whose first sending got no answer.
    """
    answer = asked.result() if _is_answered(asked) else before
    if may_stand(answer) or may_stand(before):
        background.disown(claim, answer)


def may_stand(reply: Reply) -> bool:
    """Whether a claim with this answer, whose caller has gone, was or may have been applied."""
    return isinstance(reply, Acquired) or (isinstance(reply, Unreachable) and reply.sent)


def _is_answered(asked: Awaitable[Reply]) -> TypeGuard[asyncio.Future[Reply]]:
    return isinstance(asked, asyncio.Future) and asked.done() and not asked.cancelled()


def leave_settling_to(background: Background, hold: Hold, outcome: Reply) -> None:
    """Settling this attempt was interrupted: pass it to the keeper, so that its outcome is not lost (C4)."""
    if isinstance(outcome, Returned):
        background.linger(hold, hold.complete(outcome.result))
    elif isinstance(outcome, NotBegun) or (isinstance(outcome, Raised) and not outcome.unknown):
        background.linger(hold, hold.release())


def _leave_to(background: Background, command: Command) -> None:
    if isinstance(command, Disown):
        background.disown(command.claim)
    elif isinstance(command, Linger):
        background.linger(command.hold, command.last)


def _sleep(pause: Pause) -> Paused:
    time.sleep(pause.seconds)
    return Paused()


async def _asleep(pause: Pause) -> Paused:
    await asyncio.sleep(pause.seconds)
    return Paused()


_outliving: set[asyncio.Task[Any]] = set()


def _in_background(rest: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task to which a reference is kept, so that the loop does not lose it."""
    task = asyncio.get_running_loop().create_task(rest)
    _outliving.add(task)
    task.add_done_callback(_outliving.discard)
    return task
