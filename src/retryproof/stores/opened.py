"""The opened store: a store with its coalescer and its keeper, shared by everything that uses the store.

A blocking store has one opened store in a process. An async store has one too, which belongs to its event loop.
`Source` turns a user's URL or store into the opened store for the current process and loop. A URL is opened at the
first use, once per process, and for an async driver once per event loop. `close` or `aclose` closes a store that was
opened from a URL; a store object belongs to its caller.

After a fork, the child opens a URL again, and refuses a store object. The child never uses or closes what it inherited;
the garbage collector and the end of the interpreter do not close it either (`forks`). A SQLite file is closed before
the fork, since inheriting it open would break its locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, TypeVar, cast

from retryproof.core.commands import Claim, Found, Look, Reply, Unreachable
from retryproof.core.errors import ConfigurationError
from retryproof.core.record import Record
from retryproof.forks import keep_from_children
from retryproof.stores.base import AsyncStore, Capabilities, DatabaseEngine, HasKeeper, Store
from retryproof.stores.forwarding import ForwardingStore
from retryproof.stores.keeper import MAX_UNSTORED, NO_ANSWER, Keeper
from retryproof.stores.lanes import Bridge, TaskCoalescer, ThreadCoalescer
from retryproof.stores.threaded import InThread
from retryproof.stores.url import is_async_url, is_engine, open_async, open_store

T = TypeVar("T")
logger = logging.getLogger("retryproof")

_fork_generation = 0


def _forked() -> None:
    global _fork_generation, _opening
    _fork_generation += 1
    _opening = threading.RLock()


os.register_at_fork(after_in_child=_forked)
_opening = threading.RLock()


class Opened:
    """A blocking store, opened: for threads, and for the tasks of any event loop.

    directly: one command's reply from a store that never blocks and takes calls from anywhere.
    """

    def __init__(self, store: Store, max_unstored: int = MAX_UNSTORED) -> None:
        self.store = store
        self.capabilities = store.capabilities
        self.users = 0  # sources that opened it from a URL and have not closed it
        self._generation = _fork_generation
        keep_from_children(self)
        self._threads = ThreadCoalescer(store, self._orphaned, self._heard)
        self.directly = self._threads.directly
        self.bridge = Bridge(self._threads, self._orphaned)
        self.background = Keeper(
            lambda: _InTurn(self._threads, store),
            owns=False,
            max_batch=store.capabilities.max_batch,
            max_unstored=max_unstored,
        )

    def check_usable(self) -> None:
        """Refuse to be used in a process that inherited it over a fork."""
        if self._generation != _fork_generation:
            raise ConfigurationError(
                "This store was opened before the process forked; its connections are the parent's. "
                "Make the store in the child process, or pass a URL, which is opened once per process."
            )

    def perform(self, command: Any, timeout: float) -> Reply:
        """One command's reply, for a thread."""
        if type(command) is Claim and (command.id in self.background.holds or self.background.full):
            [instead] = self.background.instead([command], timeout)
            if instead is not None:
                return instead
        return self._threads.perform(command, timeout) if self.capabilities.blocking else self.directly(command)

    def perform_many(self, commands: Sequence[Any], timeout: float) -> list[Reply]:
        """Each command's reply, in order, for a thread; the commands share batches."""
        background = self.background
        asks = [type(one) is Claim and (one.id in background.holds or background.full) for one in commands]
        instead = iter(background.instead([one for one, ask in zip(commands, asks, strict=True) if ask], timeout))
        replies = [next(instead) if ask else None for ask in asks]
        left = [command for command, reply in zip(commands, replies, strict=True) if reply is None]
        if self.capabilities.blocking:
            answers = iter(self._threads.perform_many(left, timeout) if left else ())
        else:
            answers = iter([self.directly(command) for command in left])
        return [next(answers) if reply is None else reply for reply in replies]

    def close(self, drain: float = 0.0) -> None:
        """Wait up to `drain` seconds for running and unsettled operations, and end the threads; the store stays."""
        self.background.close(drain)
        self.bridge.close()

    def _orphaned(self, claim: Claim, reply: Reply) -> None:
        self.background.disown(claim, reply)

    def _heard(self) -> None:
        self.background.heard()


class AsyncView:
    """An opened blocking store as the tasks of an event loop see it."""

    def __init__(self, opened: Opened) -> None:
        self.loop = asyncio.get_running_loop()
        self.opened = opened
        self.capabilities = opened.capabilities
        self.background = opened.background
        self._perform: Callable[[Any, float], Awaitable[Reply]] = self._lane(opened)

    def perform(self, command: Any, timeout: float) -> Awaitable[Reply]:
        """One command's reply, for a task."""
        if type(command) is Claim and (command.id in self.background.holds or self.background.full):
            return _instead(self.background, command, timeout, self._perform)
        return self._perform(command, timeout)

    def _lane(self, opened: Opened) -> Callable[[Any, float], Awaitable[Reply]]:
        return opened.bridge.end().perform


class DirectView(AsyncView):
    """The same for a store that never blocks: a task calls it directly."""

    async def perform(self, command: Any, timeout: float) -> Reply:
        """See AsyncView. Without another coroutine in between: it would cost as much as the call."""
        if type(command) is Claim and (command.id in self.background.holds or self.background.full):
            return await _instead(self.background, command, timeout, self._perform)
        return self._directly(command)

    def _lane(self, opened: Opened) -> Callable[[Any, float], Awaitable[Reply]]:
        self._directly = opened.directly

        async def perform(command: Any, timeout: float) -> Reply:
            return opened.directly(command)

        return perform


class AsyncOpened:
    """An async store, opened for the running event loop."""

    def __init__(self, store: AsyncStore, max_unstored: int = MAX_UNSTORED) -> None:
        self.store = store
        self.capabilities = store.capabilities
        self._generation = _fork_generation
        keep_from_children(self)
        self.loop = asyncio.get_running_loop()
        self._submit = TaskCoalescer(store, self._orphaned, self._heard).submit
        self.background = Keeper(
            self._keeper_store, owns=True, max_batch=store.capabilities.max_batch, max_unstored=max_unstored
        )

    def perform(self, command: Any, timeout: float) -> Awaitable[Reply]:
        """One command's reply, for a task."""
        if type(command) is Claim and (command.id in self.background.holds or self.background.full):
            return _instead(self.background, command, timeout, self._submit[Claim])
        return self._submit[type(command)](command, timeout)

    def _keeper_store(self) -> Store:
        if isinstance(self.store, HasKeeper):
            try:
                return self.store.keeper()
            except ConfigurationError as error:
                logger.warning("Leases are renewed through the event loop, and are lost where it blocks: %s", error)
        return _OnLoop(self.store, self.loop)

    def check_usable(self) -> None:
        """Refuse to be used in another event loop or process than its own."""
        if self._generation != _fork_generation or asyncio.get_running_loop() is not self.loop:
            raise ConfigurationError(
                "This async store was first used in another event loop or process, where its connections belong. "
                "Make one store per event loop, or pass a URL, which is opened once per process and event loop."
            )

    async def aclose(self, drain: float = 0.0) -> None:
        """Wait up to `drain` seconds for running and unsettled operations, and end the thread; the store stays."""
        await self.loop.run_in_executor(None, self.background.close, drain)

    def _orphaned(self, claim: Claim, reply: Reply) -> None:
        self.background.disown(claim, reply)

    def _heard(self) -> None:
        self.background.heard()


async def _instead(
    background: Keeper, claim: Claim, timeout: float, perform: Callable[[Any, float], Awaitable[Reply]]
) -> Reply:
    """The answer to a claim whose operation this process still holds (C10)."""
    asked = background.ask(claim)
    if asked is not None:
        instead = background.told(claim, asked.result() if asked.done() else await _heard_of(asked, timeout))
        if instead is not None:
            return instead
    answer = perform(claim, timeout)
    try:
        return await answer
    except asyncio.CancelledError:
        if isinstance(answer, asyncio.Future) and answer.done() and not answer.cancelled():  # and nobody reads it
            background.disown(claim, answer.result())
        raise


async def _heard_of(asked: ConcurrentFuture[Reply], timeout: float) -> Reply:
    """A future of the keeper's thread, which many may wait for."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def tell(asked: ConcurrentFuture[Reply]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(news.set)

    asked.add_done_callback(tell)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(news.wait(), timeout)
    return asked.result() if asked.done() else NO_ANSWER


class _InTurn:
    """A blocking store for its keeper: between the callers' batches, and in the same commits."""

    SECONDS = 30.0

    def __init__(self, threads: ThreadCoalescer, store: Store) -> None:
        self._threads = threads
        self._store = store
        self.capabilities = store.capabilities
        self.claim = self.complete = self.release = self.renew = self.checkpoint = self._perform
        self.scan, self.evict, self.reap = store.scan, store.evict, store.reap

    def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        """Each record as it stands."""
        records: list[Record | None] = []
        for reply in self._threads.perform_many([Look(id) for id in ids], self.SECONDS):
            if not isinstance(reply, Found):
                raise reply.error if isinstance(reply, Unreachable) else TypeError(reply)
            records.append(reply.record)
        return records

    def _perform(self, commands: Sequence[Any]) -> Sequence[Any]:
        return [
            reply.error if isinstance(reply, Unreachable) else reply
            for reply in self._threads.perform_many(commands, self.SECONDS)
        ]

    def close(self) -> None:
        """The store is its opener's."""


class _OnLoop(ForwardingStore):
    """An async store that has no keeper of its own, as the keeper's thread uses it: through the store's event loop.

    A handler that blocks that loop for longer than its lease loses it.
    """

    SECONDS = 10.0

    def __init__(self, store: AsyncStore, loop: asyncio.AbstractEventLoop) -> None:
        self.capabilities: Capabilities = store.capabilities
        self._loop = loop
        self._calls = store

    def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        work = call(*arguments, **options)
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise
        try:
            return future.result(self.SECONDS)
        finally:
            future.cancel()  # one that has not ended in time
            if self._loop.is_closed():
                work.close()  # and will never begin

    def close(self) -> None:
        """The store is its opener's."""


def open_blocking(store: Store, max_unstored: int = MAX_UNSTORED) -> Opened:
    """The opened store of a blocking store in this process, made at the first call."""
    opened = _attached(store, lambda: Opened(store, max_unstored))
    opened.check_usable()
    return opened


def open_on_loop(store: AsyncStore, max_unstored: int = MAX_UNSTORED) -> AsyncOpened:
    """The opened store of an async store, made at the first call; it belongs to that call's event loop."""
    opened = _attached(store, lambda: AsyncOpened(store, max_unstored))
    opened.check_usable()
    return opened


def _shared(store: Store, max_unstored: int) -> Opened:
    """The opened store of a store from a URL, which memory with a name has in common with others."""
    with _opening:
        opened = open_blocking(store, max_unstored)
        opened.users += 1
    return opened


def _is_last_user(opened: Opened) -> bool:
    """Whether nobody else uses it any more; the next to open the same store starts anew."""
    with _opening:
        opened.users -= 1
        if opened.users == 0:
            del opened.store._retryproof_opened  # type: ignore[attr-defined]  # as `_attached`
        return opened.users == 0


def _attached(store: object, make: Callable[[], T]) -> T:
    """What a store carries with it, so that all who share the store share its batches, and it ends with the store."""
    with _opening:
        found: T | None = getattr(store, "_retryproof_opened", None)
        if found is None:
            found = make()
            store._retryproof_opened = found  # type: ignore[attr-defined]  # any store may be given; none declares it
        return found


class Source:
    """What a user passed as `store`: a URL, an engine or a store, checked when made and opened when used.

    An engine is opened like a URL, once per process; it stays its caller's.
    timeout: seconds that one call of a store opened here may take.
    max_unstored: bytes of results that may wait while the store is out of reach; the first opener of the store decides.
    """

    def __init__(self, store: object, timeout: float, max_unstored: int = MAX_UNSTORED) -> None:
        if isinstance(store, str) or is_engine(store):
            self._url: str | DatabaseEngine | None = store
            self._async = is_async_url(store)
        elif isinstance(store, Store | AsyncStore):
            self._url = None
            self._async = _is_async(store)
        else:
            raise ConfigurationError(
                f"store={store!r} is neither a URL like 'sqlite:///keys.db' nor a store, nor an engine of "
                "SQLAlchemy's; see retryproof.stores.open_store."
            )
        self.given = store
        self._timeout = timeout
        self._max_unstored = max_unstored
        self._generation = _fork_generation
        self._process: Opened | None = None
        self._opening = threading.RLock()
        self._loops: dict[asyncio.AbstractEventLoop, AsyncOpened | AsyncView] = {}
        self._last: tuple[asyncio.AbstractEventLoop | None, AsyncOpened | AsyncView | None] = (None, None)

    def opened(self) -> Opened:
        """The opened store for threads of this process."""
        if self._generation != _fork_generation:
            self._forget()
        process = self._process
        if process is None:
            with self._opening:
                process = self._process
                if process is None:
                    process = self._process = self._open_blocking()
        return process

    def aopened(self) -> AsyncOpened | AsyncView:
        """The opened store for the running event loop."""
        if self._generation != _fork_generation:
            self._forget()
        loop = asyncio.get_running_loop()
        known, opened = self._last
        if known is not loop or opened is None:
            with self._opening:
                self._forget_closed_loops()
                opened = self._loops.get(loop)
                if opened is None:
                    opened = self._loops[loop] = self._open_for_loop()
            self._last = (loop, opened)
        return opened

    def _forget_closed_loops(self) -> None:
        """Drop what belongs to a closed event loop: it is useless, and would keep the loop in memory."""
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            del self._loops[loop]

    def close(self, drain: float = 0.0) -> None:
        """Close what was opened from a URL; a store object belongs to its caller."""
        if self._generation != _fork_generation:
            self._forget()
        process, self._process = self._process, None
        if process is not None and self._url is not None and _is_last_user(process):
            process.close(drain)
            process.store.close()
        elif process is not None and self._url is None:
            process.background.say_what_is_left()

    async def aclose(self, drain: float = 0.0) -> None:
        """Close what was opened from a URL for the running event loop; a store object belongs to its caller."""
        if self._generation != _fork_generation:
            self._forget()
        with self._opening:
            self._forget_closed_loops()
            opened = self._loops.pop(asyncio.get_running_loop(), None)
        self._last = (None, None)
        if opened is None:
            return
        if self._url is None:
            opened.background.say_what_is_left()
            return
        if isinstance(opened, AsyncOpened):
            await opened.aclose(drain)
            await opened.store.aclose()
        elif not self._loops:
            await asyncio.get_running_loop().run_in_executor(None, self.close, drain)

    def _open_blocking(self) -> Opened:
        if self._url is not None:
            return _shared(open_store(self._url, timeout=self._timeout), self._max_unstored)
        if isinstance(self.given, InThread):
            return open_blocking(self.given.blocking, self._max_unstored)
        if self._async:
            raise ConfigurationError(
                f"{type(self.given).__name__} is an async store, which belongs to an event loop; a sync engine takes a "
                "blocking store, a URL, or stores.InLoop(make_store), which gives it a loop of its own."
            )
        return open_blocking(cast(Store, self.given), self._max_unstored)

    def _open_for_loop(self) -> AsyncOpened | AsyncView:
        if not self._async or isinstance(self.given, InThread):
            opened = self.opened()
            return AsyncView(opened) if opened.capabilities.blocking else DirectView(opened)
        if self._url is not None:
            return open_on_loop(open_async(self._url, timeout=self._timeout), self._max_unstored)
        return open_on_loop(cast(AsyncStore, self.given), self._max_unstored)

    def _forget(self) -> None:
        """After a fork: forget what the parent opened; it is neither used nor closed here."""
        with _opening:
            if self._generation == _fork_generation:  # another thread was first
                return
            self._process, self._last, self._loops = None, (None, None), {}
            self._opening = threading.RLock()
            self._generation = _fork_generation


def _is_async(store: object) -> bool:
    return asyncio.iscoroutinefunction(getattr(type(store), "claim", None))
