"""A Python callable as a publisher: `module:function` on the command line."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.publishers.base import (
    DELIVERED,
    UNTRIED,
    Batch,
    Failed,
    Outcome,
    chains,
    described,
    one_by_one,
)


class FunctionPublisher:
    """Calls a function with each message; an exception is a failure, any other end is delivery.

    A coroutine function runs on the relay's loop, chains side by side; any other in a thread, one message at a time.
    """

    max_payload: int | None = None

    def __init__(self, function: Callable[[Message], Any]) -> None:
        self._function = function
        self._on_loop = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
        )

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Call the function for each message."""
        if self._on_loop:
            return await one_by_one(batch, self._send)
        return await asyncio.to_thread(self._publish_in_thread, batch)

    async def _send(self, message: Message) -> Outcome:
        await self._function(message)
        return DELIVERED

    def _publish_in_thread(self, batch: Batch) -> Sequence[Outcome]:
        outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)
        for chain in chains(batch.messages):
            for place in chain:
                if not batch.live():
                    return outcomes
                try:
                    self._function(batch.messages[place])
                    outcomes[place] = DELIVERED
                except Exception as error:  # noqa: BLE001 - whatever it raises, the message was not delivered
                    outcomes[place] = Failed(described(error))
                    break
        return outcomes

    def close(self) -> None:
        """Nothing: the function is the caller's."""


def from_path(path: str) -> FunctionPublisher:
    """The publisher of `module:function`."""
    module, _, name = path.partition(":")
    try:
        found: Callable[[Message], Awaitable[None] | None] = importlib.import_module(module)  # type: ignore[assignment] # walked down below
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigurationError(f"{path} is not callable; give module:function")
    return FunctionPublisher(found)
