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

    Any other end is delivery. An exception that is a ConnectionError or TimeoutError, or came from one, says that the
    other side is out of reach; any other one counts against the message.

    A coroutine function runs on the relay's loop, queues side by side; any other in a thread, one message at a time.
    name: stands for it in a relay's routes, instead of its module and qualified name.
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
                except Exception as error:  # noqa: BLE001 - whatever it raises, the message was not delivered
                    outcomes[position] = Failed(described(error), kind=kind_of(error))
                if outcomes[position] is not DELIVERED:
                    break
        return outcomes

    def close(self) -> None:
        """Nothing: the function is the caller's."""


def _outcome(returned: object) -> Outcome:
    return returned if isinstance(returned, Failed) else DELIVERED


def _name(function: Callable[[Message], Any]) -> str:
    """A function's module and qualified name; of a partial, those of its function; of another object, its class's."""
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
