"""The two pumps: they perform what a flow asks for, one blocking, one on the event loop. Only here has code a colour.

A pump gives every store command to the opened store, `Run` and `Pause` to its caller, and the background work
(`Disown`, `Linger`) to the store's keeper. What a store raises becomes `Unreachable`: the flow decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

from retryproof.core.commands import Claim, Command, Complete, Disown, Linger, Pause, Paused, Release, Reply, Run
from retryproof.core.hold import Hold

T = TypeVar("T")
Steps = Generator[Command, tuple[Reply, float], T]

clock = time.monotonic


class Background(Protocol):
    """What goes on beside the attempts: renewal, and what callers left behind."""

    def watch(self, hold: Hold) -> None:
        """Renew this hold until `unwatch`."""

    def unwatch(self, hold: Hold) -> None:
        """Stop renewing it."""

    def disown(self, claim: Claim) -> None:
        """Release this claim if it turns out to have been applied."""

    def linger(self, hold: Hold, last: Complete | Release) -> None:
        """Renew and settle until it is stored."""


class Performer(Protocol):
    """An opened store for callers that block."""

    @property
    def background(self) -> Background: ...

    def perform(self, command: Any, timeout: float) -> Reply:
        """One store command or Look; never raises, answers Unreachable."""


class AsyncPerformer(Protocol):
    """An opened store for callers on an event loop."""

    @property
    def background(self) -> Background: ...

    async def perform(self, command: Any, timeout: float) -> Reply:
        """One store command or Look; raises nothing but cancellation."""


def drive(
    flow: Steps[T],
    store: Performer,
    timeout: float,
    run: Callable[[Hold], Reply],
    pause: Callable[[Pause], Paused],
) -> T:
    """Pump a flow to its conclusion in this thread."""
    background = store.background
    hold: Hold | None = None
    lingers = False
    command: Command | None = None
    try:
        command = next(flow)
        while True:
            reply: Reply = None
            if isinstance(command, Run):
                hold = command.hold
                background.watch(hold)
                reply = run(hold)
            elif isinstance(command, Pause):
                reply = pause(command)
            elif isinstance(command, Disown):
                background.disown(command.claim)
            elif isinstance(command, Linger):
                lingers = True
                background.linger(command.hold, command.last)
            else:
                reply = store.perform(command, timeout)
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result
    except BaseException:
        if isinstance(command, Claim):  # interrupted while claiming: the claim may have been applied
            background.disown(command)
        raise
    finally:
        if hold is not None and not lingers:
            background.unwatch(hold)


async def adrive(
    flow: Steps[T],
    store: AsyncPerformer,
    timeout: float,
    run: Callable[[Hold], Awaitable[Reply]],
    pause: Callable[[Pause], Awaitable[Paused]],
) -> T:
    """Pump a flow to its conclusion in this task.

    A cancellation that arrives while the attempt is being settled cannot lose its result: the rest of the flow goes on
    in a task of its own, is waited for, and only then the cancellation goes on. A second one does not wait.
    """
    return await _apump(flow, next(flow), store, timeout, run, pause, None)


async def _apump(
    flow: Steps[T],
    command: Command,
    store: AsyncPerformer,
    timeout: float,
    run: Callable[[Hold], Awaitable[Reply]],
    pause: Callable[[Pause], Awaitable[Paused]],
    hold: Hold | None,
) -> T:
    background = store.background
    leaves_hold = False
    try:
        while True:
            reply: Reply = None
            if isinstance(command, Run):
                hold = command.hold
                background.watch(hold)
                reply = await run(hold)
            elif isinstance(command, Pause):
                reply = await pause(command)
            elif isinstance(command, Disown):
                background.disown(command.claim)
            elif isinstance(command, Linger):
                leaves_hold = True
                background.linger(command.hold, command.last)
            else:
                reply = await store.perform(command, timeout)
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result
    except asyncio.CancelledError:
        if isinstance(command, Claim):
            background.disown(command)
        elif hold is not None and not isinstance(command, Run):
            leaves_hold = True
            # Whatever was on its way is sent again: commands are idempotent by nonce (C3).
            await _outlive(_apump(flow, command, store, timeout, run, _sleep, hold))
        raise
    finally:
        if hold is not None and not leaves_hold:
            background.unwatch(hold)


async def _sleep(pause: Pause) -> Paused:
    await asyncio.sleep(pause.seconds)
    return Paused()


_outliving: set[asyncio.Task[Any]] = set()


async def _outlive(rest: Any) -> None:
    """Run the rest of a cancelled attempt in a task of its own, and wait for it unless cancelled once more."""
    await asyncio.wait({_in_background(rest)})


def _in_background(rest: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.get_running_loop().create_task(rest)
    _outliving.add(task)
    task.add_done_callback(_outliving.discard)
    return task


async def abegin(
    flow: Steps[T], store: AsyncPerformer, timeout: float, pause: Callable[[Pause], Awaitable[Paused]]
) -> T | Run:
    """Pump a flow up to its `Run`, which the caller then performs and hands to `afinish`; or to its conclusion.

    For callers whose work ends in the middle of somebody else's call, and so cannot be awaited by `adrive`. The caller
    watches the hold; `afinish` unwatches it.
    """
    command: Command | None = None
    try:
        command = next(flow)
        while not isinstance(command, Run):
            reply: Reply = None
            if isinstance(command, Pause):
                reply = await pause(command)
            elif isinstance(command, Disown):
                store.background.disown(command.claim)
            else:
                reply = await store.perform(command, timeout)
            command = flow.send((reply, clock()))
    except StopIteration as stop:
        result: T = stop.value
        return result
    except BaseException:
        if isinstance(command, Claim):
            store.background.disown(command)
        raise
    return command


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
    background = store.background
    leaves_hold = False
    command: Command | None = None
    try:
        while True:
            command = flow.send((reply, clock()))
            reply = None
            if isinstance(command, Linger):
                leaves_hold = True
                background.linger(command.hold, command.last)
            elif isinstance(command, Pause):
                await asyncio.sleep(command.seconds)
            else:
                reply = await store.perform(command, timeout)
    except StopIteration as stop:
        result: T = stop.value
        return result
    except asyncio.CancelledError:
        if command is None:
            raise
        leaves_hold = True
        # What was on its way is sent again: commands are idempotent by nonce (C3).
        adopt(_in_background(_apump(flow, command, store, timeout, _ran, _sleep, hold)))
        raise
    finally:
        if not leaves_hold:
            background.unwatch(hold)


async def _ran(hold: Hold) -> Reply:
    raise RuntimeError("A flow runs once.")
