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


def drive(
    flow: Steps[T],
    store: Performer,
    timeout: float,
    run: Callable[[Hold], Reply],
    pause: Callable[[Pause], Paused],
) -> T:
    """Pump a flow to its conclusion in this thread.

    run: calls the work, unless its hold may not begin it. An interruption while the attempt is being settled cannot
        lose its result: the keeper goes on.
    """
    background = store.background
    hold: Hold | None = None
    outcome: Reply = None
    try:
        command = next(flow)
        while True:
            kind = type(command)
            reply: Reply = None
            if isinstance(command, Run):
                if hold is None:
                    hold = command.hold
                    background.watch(hold)
                outcome = None
                reply = outcome = run(hold) if hold.may_begin(clock()) else NOT_BEGUN
            elif isinstance(command, Pause):
                reply = pause(command)
            elif kind is Disown or kind is Linger:
                _leave_to(background, command)
            else:
                reply = store.perform(command, timeout)
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result
    except BaseException:
        if hold is not None:
            _leave_settling_to(background, hold, outcome)
        raise
    finally:
        if hold is not None:
            background.unwatch(hold)


def abegin(
    flow: Steps[T], store: AsyncPerformer, timeout: float, pause: Callable[[Pause], Awaitable[Paused]]
) -> Awaitable[T | Run]:
    """Pump a flow up to its `Run`, which the caller then performs and hands to `afinish`; or to its conclusion.

    The caller watches the hold; `afinish` unwatches it. In the step that calls the work it asks `hold.may_begin`, and
    where that says no it pumps `arenew` first.
    """
    return _pump(flow, next(flow), store, timeout, pause)


async def arenew(flow: Steps[T], hold: Hold, store: AsyncPerformer, timeout: float) -> T | None:
    """Pump a flow whose hold may not begin its work (C6): None, when it may now; or the flow's conclusion, unwatched.

    What is cancelled meanwhile was not begun, and is given back.
    """
    try:
        while not hold.may_begin(clock()):
            step = await _pump(flow, flow.send((NOT_BEGUN, clock())), store, timeout, _sleep)
            if not isinstance(step, Run):
                store.background.unwatch(hold)
                return step
    except BaseException:
        store.background.linger(hold, hold.release())
        raise
    return None


async def afinish(
    flow: Steps[T],
    reply: Reply,
    hold: Hold,
    store: AsyncPerformer,
    timeout: float,
    adopt: Callable[[asyncio.Task[T]], None],
) -> T:
    """Pump a flow from the outcome of its `Run` to its conclusion.

    A cancellation cannot lose it: the rest then goes on in a task of its own, which is handed to `adopt`.
    """
    command: Command | None = None
    outcome = reply
    try:
        while True:
            command = flow.send((reply, clock()))
            kind = type(command)
            reply = None
            if kind is Linger:
                _leave_to(store.background, command)
            elif isinstance(command, Pause):
                await asyncio.sleep(command.seconds)
            else:
                reply = await store.perform(command, timeout)
    except StopIteration as stop:
        store.background.unwatch(hold)
        result: T = stop.value
        return result
    except asyncio.CancelledError:
        if command is None:
            store.background.unwatch(hold)
        else:
            # What was on its way is sent again: commands are idempotent by nonce (C3).
            adopt(_in_background(_settle(flow, command, hold, outcome, store, timeout)))
        raise
    except BaseException:
        store.background.unwatch(hold)
        raise


async def _settle(
    flow: Steps[T], command: Command, hold: Hold, outcome: Reply, store: AsyncPerformer, timeout: float
) -> T:
    """Perform this command and what follows; when the loop shuts down meanwhile, the keeper goes on."""
    try:
        conclusion = await _pump(flow, command, store, timeout, _sleep)
        if isinstance(conclusion, Run):
            raise RuntimeError("A flow runs once.")
        return conclusion
    except BaseException:
        _leave_settling_to(store.background, hold, outcome)
        raise
    finally:
        store.background.unwatch(hold)


async def _pump(
    flow: Steps[T],
    command: Command,
    store: AsyncPerformer,
    timeout: float,
    pause: Callable[[Pause], Awaitable[Paused]],
) -> T | Run:
    """Perform this command and what follows, up to `Run` or the conclusion."""
    reply: Reply = None
    try:
        while True:
            kind, before, reply = type(command), reply, None
            if isinstance(command, Run):
                return command
            if isinstance(command, Pause):
                reply = await pause(command)
            elif kind is Disown or kind is Linger:
                _leave_to(store.background, command)
            else:
                asked = store.perform(command, timeout)
                try:
                    reply = await asked
                except asyncio.CancelledError:
                    # The store sees to a claim that is on its way. Nobody else knows of one whose reply has come and
                    # is not read, or whose first sending went unanswered.
                    if isinstance(command, Claim):
                        answer = asked.result() if _is_answered(asked) else before
                        if may_stand(answer) or may_stand(before):
                            store.background.disown(command, answer)
                    raise
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result


def may_stand(reply: Reply) -> bool:
    """Whether a claim that was answered so, and whose caller has gone, stands or may stand."""
    return isinstance(reply, Acquired) or (isinstance(reply, Unreachable) and reply.sent)


def _is_answered(asked: Awaitable[Reply]) -> TypeGuard[asyncio.Future[Reply]]:
    return isinstance(asked, asyncio.Future) and asked.done() and not asked.cancelled()


def _leave_settling_to(background: Background, hold: Hold, outcome: Reply) -> None:
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


async def _sleep(pause: Pause) -> Paused:
    await asyncio.sleep(pause.seconds)
    return Paused()


_outliving: set[asyncio.Task[Any]] = set()


def _in_background(rest: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that the loop does not lose."""
    task = asyncio.get_running_loop().create_task(rest)
    _outliving.add(task)
    task.add_done_callback(_outliving.discard)
    return task
