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
    described,
    kind_of,
    one_by_one,
    queues,
)


class FunctionPublisher:
    """Calls a function with each message; an exception is a failure, as is a `Failed` that it returns.

    Otherwise the message is delivered. A ConnectionError or TimeoutError, or an exception with one as its cause, means
    that the receiver is out of reach. Any other exception counts against the message.

    A coroutine function runs on the relay's event loop, queues side by side. Any other function runs in a thread, one
    message at a time.
    name: its name in a relay's routes, in place of its module and qualified name.
    """

    max_payload: int | None = None

    def __init__(self, function: Callable[[Message], Any], name: str | None = None) -> None:
        self._function = function
        self.destination = name or _name(function)
        self._on_loop = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object whose call is a coroutine function
        )

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Call the function for each message."""
        if self._on_loop:
            return await one_by_one(batch, self._send)
        return await asyncio.to_thread(self._publish_in_thread, batch)

    async def _send(self, message: Message) -> Outcome:
        return _outcome(await self._function(message))

    def _publish_in_thread(self, batch: Batch) -> Sequence[Outcome]:
        outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)
        for queue in queues(batch.messages):
            for position in queue:
                if not batch.live():
                    return outcomes
                try:
                    outcomes[position] = _outcome(self._function(batch.messages[position]))
                except Exception as error:  # noqa: BLE001 - after any exception, the message counts as not delivered
                    outcomes[position] = Failed(described(error), kind=kind_of(error))
                if outcomes[position] is not DELIVERED:
                    break
        return outcomes

    def close(self) -> None:
        """Do nothing: the function belongs to the caller."""


def _outcome(returned: object) -> Outcome:
    return returned if isinstance(returned, Failed) else DELIVERED


def _name(function: Callable[[Message], Any]) -> str:
    """Module and qualified name: of a function, of the function of a partial, or of the class of another object."""
    function = getattr(function, "func", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


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
    return FunctionPublisher(found, path)
