"""Where a relay sends: the contract of a publisher, and what its kinds have in common."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol, TypeAlias

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message

CONCURRENCY = 32
"""Chains that are sent at the same time by publishers that send one message at a time."""
_OUT_OF_REACH = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_DEEPEST = 10
"""Causes of an exception that are looked at: a library wraps a connection's errors in its own."""

log = logging.getLogger("retryproof.relay")
EMPTY_CHECK: Callable[[], bool] = lambda: True  # noqa: E731


@dataclass(frozen=True, slots=True)
class Delivered:
    """The other side has it."""


FailureKind: TypeAlias = Literal["answer", "unreachable", "unsent"]
"""Kinds of failure that may be tried again: an answer about the message itself (4xx, 500); nobody who could have said
anything about it (no connection, no answer in time, 429, 502 to 504); not sent, for the relay's own reasons."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Not delivered, as far as is known.

    permanent: trying again makes no sense; it goes to dead letters. retry_after: seconds the other side asked for.
    kind: whether the failure says something about the message, which decides when it is given up.
    """

    reason: str
    permanent: bool = False
    retry_after: float | None = None
    kind: FailureKind = "answer"

    @property
    def counts_as(self) -> FailureKind | Literal["refusal"]:
        """Its row in the relay's table of what a failure counts towards."""
        return "refusal" if self.permanent else self.kind


@dataclass(frozen=True, slots=True)
class Untried:
    """Not sent: an earlier message of its queue failed, or the relay's lease is over. It counts no attempt."""


Outcome: TypeAlias = Delivered | Failed | Untried
DELIVERED = Delivered()
UNTRIED = Untried()


class Progress:
    """How far a batch is: the positions of messages that are being sent, and what came of others.

    A publisher that keeps it, on the event loop, is given other batches while some messages take long.
    """

    __slots__ = ("_changed", "ended", "under_way")

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.under_way: set[int] = set()
        self.ended: dict[int, Outcome] = {}
        self._changed = changed

    def begin(self, position: int) -> None:
        """A message is being sent from now on."""
        self.under_way.add(position)

    def end(self, position: int, outcome: Outcome) -> None:
        """What came of it."""
        self.under_way.discard(position)
        self.ended[position] = outcome
        self._changed()


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages to publish, those of a queue in their order.

    live: whether the relay may still publish; to be asked before each message that is sent by itself.
    timeout: seconds for each such message. progress: kept by publishers that send one message at a time.
    """

    messages: Sequence[Message]
    live: Callable[[], bool] = EMPTY_CHECK
    timeout: float = inf
    progress: Progress = field(default_factory=Progress)


class Publisher(Protocol):
    """Sends messages. `publish` may be a coroutine function; else it is called in a thread.

    It gives one outcome a message, in their order. After a message failed, later ones of its queue are not sent.
    A message may come again, with the same id: after a crash, or when it was sent and the answer was lost.
    An exception counts as the failure of everything in the batch. It must end by itself: what sends with `one_by_one`
    does, after the batch's time-out for each message.

    Where it sends is part of the relay's routes: a text in its attribute `destination`, the same in every process and
    without secrets. Without that attribute it is the name of its class, so that all of one class are the same route.
    """

    max_payload: int | None
    """Bytes that a payload may have, or None."""

    def publish(self, batch: Batch) -> Sequence[Outcome] | Awaitable[Sequence[Outcome]]:
        """Send a batch."""

    def close(self) -> Awaitable[None] | None:
        """Close connections."""


def destination_of(publisher: Publisher) -> str:
    """Where a publisher sends, as a text without secrets that is the same in every process."""
    kind = type(publisher)
    return str(getattr(publisher, "destination", None) or f"{kind.__module__}:{kind.__qualname__}")


async def handed(publisher: Publisher, batch: Batch) -> Sequence[Outcome]:
    """Have a publisher of either colour send a batch: one outcome a message. An exception fails all of them."""
    count = len(batch.messages)
    try:
        if inspect.iscoroutinefunction(publisher.publish):
            published: Any = await publisher.publish(batch)
        else:
            published = await asyncio.to_thread(publisher.publish, batch)
    except asyncio.CancelledError as error:
        if being_cancelled():
            raise
        return [Failed(described(error))] * count
    except Exception as error:
        log.warning("publishing %d messages failed", count, exc_info=True)
        return [Failed(described(error), kind=kind_of(error))] * count
    outcomes: Sequence[Outcome] = list(published)
    if len(outcomes) != count:
        raise ConfigurationError(
            f"The publisher gave {len(outcomes)} outcomes for {count} messages; it must give one each."
        )
    return outcomes


def queues(messages: Sequence[Message]) -> list[list[int]]:
    """The positions of the messages by queue, in order."""
    found: dict[bytes, list[int]] = {}
    for position, message in enumerate(messages):
        found.setdefault(message.queue, []).append(position)
    return list(found.values())


async def one_by_one(
    batch: Batch, send: Callable[[Message], Awaitable[Outcome]], concurrency: int = CONCURRENCY
) -> Sequence[Outcome]:
    """Send messages one at a time within a queue, queues side by side; a failure, or a time-out, ends its queue."""
    outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)
    room = asyncio.Semaphore(concurrency)

    async def send_queue(queue: list[int]) -> None:
        async with room:
            for position in queue:
                if not batch.live():
                    return
                batch.progress.begin(position)
                outcomes[position] = await guarded(send, batch.messages[position], batch.timeout)
                batch.progress.end(position, outcomes[position])
                if outcomes[position] is not DELIVERED:
                    return

    await asyncio.gather(*(send_queue(queue) for queue in queues(batch.messages)))
    return outcomes


async def guarded(send: Callable[[Message], Awaitable[Outcome]], message: Message, timeout: float = inf) -> Outcome:
    """Send, any exception as a failure, and no answer within so many seconds too."""
    clock = asyncio.timeout(timeout if timeout < inf else None)
    try:
        async with clock:
            return await send(message)
    except asyncio.CancelledError as error:
        if being_cancelled():
            raise
        return Failed(described(error))
    except Exception as error:  # noqa: BLE001 - whatever a publisher raises, the message was not delivered
        reason = f"no answer within {timeout:g} s" if clock.expired() else described(error)
        return Failed(reason, kind="unreachable" if clock.expired() else kind_of(error))


def being_cancelled() -> bool:
    """Whether a CancelledError is meant for this task, and did not just come out of what it called."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def kind_of(error: BaseException) -> FailureKind:
    """Whether an exception, or one that it came from, says that the other side was out of reach."""
    seen: BaseException | None = error
    for _ in range(_DEEPEST):
        if isinstance(seen, _OUT_OF_REACH):
            return "unreachable"
        seen = seen and (seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__))
    return "answer"


def described(error: BaseException) -> str:
    """An error in one line."""
    text = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else "")
    return f"{type(error).__name__}: {text}".strip()[:500]
