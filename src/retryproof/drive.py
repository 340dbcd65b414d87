"""The pumps: they perform what a generator asks for, in a thread or on the event loop. Only here has code a colour.

`pump` and `apump` serve every generator of steps: a SQL plan's statements, a transaction's steps, a step's result that
is to be kept. `drive`, `abegin` and `afinish` pump a flow: they give every store command to the opened store, `Run` and
`Pause` to the caller, and the background work (`Disown`, `Linger`) to the store's keeper. What a store raises becomes
`Unreachable`: the flow decides.
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
"""Seconds, by which leases are counted (C6). On Linux `time.monotonic` stands still while the machine is suspended; the
store's clock, by which the lease ends, goes on."""


# Any steps


def pump(steps: Generator[S, Any, T], perform: Callable[[S], Any]) -> T:
    """Perform each step and send its answer, in this thread; what the steps return in the end.

    What `perform` raises is thrown into the steps, interruptions too: they decide what it means, and clean up.
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
    """What goes on beside the attempts: renewal, and what callers left behind."""

    def watch(self, hold: Hold) -> None:
        """Renew this hold until `unwatch`."""

    def unwatch(self, hold: Hold) -> None:
        """Stop renewing it, unless it lingers."""

    def disown(self, claim: Claim, reply: Reply = None) -> None:
        """Release this claim if it was applied, or turns out to have been. reply: the answer that nobody reads."""

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Renew and settle until it is stored."""


class Performer(Protocol):
    """An opened store for callers that block."""

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
    """The opened store as the code of an operation asks it, from a thread."""

    __slots__ = ("_store", "_timeout")

    def __init__(self, store: Performer, timeout: float) -> None:
        self._store = store
        self._timeout = timeout

    def check_blocking(self) -> None:
        """Raise ConfigurationError where a call that blocks must not be made from here."""

    def check_awaited(self) -> None:
        """Raise ConfigurationError where a call that is awaited must not be made from here."""
        raise ConfigurationError("This operation is run by a sync engine: use the blocking call, not the awaited one.")

    def ask(self, command: Any) -> Reply:
        """The reply to one command."""
        return self._store.perform(command, self._timeout)

    def aask(self, command: Any) -> Awaitable[Reply]:
        """`ask` for a task of the operation's event loop."""
        raise NotImplementedError


class LoopAsking(Asking):
    """The same, where an event loop runs the operation: from its tasks, and from threads that they start."""

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
        """From a thread; on the loop itself there is no answer to be had without blocking."""
        if asyncio._get_running_loop() is self._loop:
            return Unreachable(ConfigurationError("A blocking call on the event loop cannot ask an async store."))

        async def asked() -> Reply:
            return await self.aask(command)

        return asyncio.run_coroutine_threadsafe(asked(), self._loop).result()

    def aask(self, command: Any) -> Awaitable[Reply]:
        return self._awaited.perform(command, self._timeout)


def begin(flow: Steps[T], store: Performer, timeout: float, pause: Callable[[Pause], Paused]) -> T | Run:
    """Pump a flow from its start to its `Run` or its conclusion, in this thread.

    The caller performs the `Run`: it watches the hold, and in the step that calls the work it asks `hold.may_begin`;
    where that says no it pumps `renew` first. `finish` pumps what follows the outcome.
    """
    return _pump(flow, None, store, timeout, pause)


def renew(flow: Steps[T], hold: Hold, store: Performer, timeout: float) -> T | None:
    """Pump a flow that begins with work which may not begin (C6): None, when it may now; or the flow's conclusion.

    What is interrupted meanwhile was not begun, and is given back.
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
    """Pump a flow that begins with an outcome, or later, to its conclusion, in this thread.

    Where it is interrupted, the caller leaves it to the background: `leave_settling_to`.
    """
    conclusion = _pump(flow, None, store, timeout, _sleep)
    if isinstance(conclusion, Run):
        raise RuntimeError(_TWICE)
    return conclusion


def _pump(
    flow: Steps[T], told: Told | None, store: Performer, timeout: float, pause: Callable[[Pause], Paused]
) -> T | Run:
    """Tell the flow this, None at its start, and perform what it asks for, up to `Run` or the conclusion."""
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

    A cancellation cannot lose the outcome: the rest then goes on in a task of its own, which is handed to `adopt`.
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
    """A task that settles what was cancelled at this command, and unwatches the hold.

    What was on its way is sent again: commands are idempotent by nonce (C3).
    """
    return _in_background(_settle(flow, command, hold, outcome, store, timeout))


async def _settle(
    flow: Steps[T], command: Command, hold: Hold, outcome: Reply, store: AsyncPerformer, timeout: float
) -> T:
    """Perform this command and what follows; when the loop shuts down meanwhile, the keeper goes on."""
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

    The store sees to a claim that is on its way. Nobody else knows of one whose reply has come and is not read, or
    whose first sending went unanswered.
    """
    answer = asked.result() if _is_answered(asked) else before
    if may_stand(answer) or may_stand(before):
        background.disown(claim, answer)


def may_stand(reply: Reply) -> bool:
    """Whether a claim that was answered so, and whose caller has gone, stands or may stand."""
    return isinstance(reply, Acquired) or (isinstance(reply, Unreachable) and reply.sent)


def _is_answered(asked: Awaitable[Reply]) -> TypeGuard[asyncio.Future[Reply]]:
    return isinstance(asked, asyncio.Future) and asked.done() and not asked.cancelled()


def leave_settling_to(background: Background, hold: Hold, outcome: Reply) -> None:
    """Who was settling this attempt has been interrupted: what it came to must not be lost (C4)."""
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
    """A task that the loop does not lose."""
    task = asyncio.get_running_loop().create_task(rest)
    _outliving.add(task)
    task.add_done_callback(_outliving.discard)
    return task
