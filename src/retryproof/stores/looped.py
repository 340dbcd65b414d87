"""An async store for blocking callers, through an event loop of its own in one thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from retryproof.core.errors import ConfigurationError
from retryproof.forks import keep_from_children
from retryproof.stores.base import AsyncStore, Capabilities
from retryproof.stores.forwarding import ForwardingStore

T = TypeVar("T")

SECONDS = 60.0
"""The longest time of a call; every store ends its calls earlier, within its own time-out."""


class InLoop(ForwardingStore):
    """A blocking store over an async one, for programs without an event loop.

    make: makes the store; called once in a process, in the event loop that the store will belong to.
    The thread with the loop starts at the first call and ends at `close`. All calls share it, from any thread.
    """

    def __init__(self, make: Callable[[], AsyncStore]) -> None:
        self._make_store = make
        self._starting = threading.Lock()
        self._process = 0
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread

    @property
    def capabilities(self) -> Capabilities:
        """Those of the store, which is made for it; its calls block the caller."""
        return self._store().capabilities

    @property
    def _calls(self) -> AsyncStore:
        return self._store()

    def _store(self) -> AsyncStore:
        if self._process not in (0, os.getpid()):
            raise ConfigurationError(
                "This store was opened before the process forked; its loop and connections are the parent's. Make the "
                "store in the child process."
            )
        with self._starting:
            if self._process == 0:
                self._start()
            return self._made

    def _start(self) -> None:
        keep_from_children(self)
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="retryproof-loop", daemon=True)
        self._thread.start()
        try:
            self._made = self._wait_for(self._make_in_loop())
        except BaseException:
            self._stop()
            raise
        self._process = os.getpid()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    async def _make_in_loop(self) -> AsyncStore:
        return self._make_store()

    def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._wait_for(call(*arguments, **options))

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(SECONDS)
        finally:
            future.cancel()  # where this thread was interrupted, or nothing came in time

    def close(self) -> None:
        """Close the store and end the loop and its thread."""
        with self._starting:
            if self._process != os.getpid():
                return
            self._process = 0
            try:
                self._wait_for(self._made.aclose())
            finally:
                self._stop()
