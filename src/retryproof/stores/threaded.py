"""A blocking store for async callers, through one thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from retryproof.stores.base import Store
from retryproof.stores.forwarding import AsyncForwardingStore

T = TypeVar("T")


class InThread(AsyncForwardingStore):
    """An async store over a blocking one; it makes one call at a time, in a thread of its own.

    An engine over it uses the blocking store directly, with its batches.
    """

    def __init__(self, blocking: Store) -> None:
        self.blocking = self._calls = blocking
        self.capabilities = blocking.capabilities
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="retryproof-store")

    async def _make(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self._process != os.getpid():  # forked, without the thread
            self._start()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: call(*arguments, **options))

    async def aclose(self) -> None:
        """Close the store and end the thread."""
        await self._make(self.blocking.close)
        self._thread.shutdown(wait=False)
