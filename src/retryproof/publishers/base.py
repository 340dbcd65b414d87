"""Where a relay sends: the contract of publishers, and what they have in common."""

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
"""How many queues a publisher serves at the same time, if it sends one message of a queue at a time."""
_OUT_OF_REACH = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_DEEPEST = 10
"""How many causes of an exception are checked: libraries wrap the errors of connections in their own."""

log = logging.getLogger("retryproof.relay")
EMPTY_CHECK: Callable[[], bool] = lambda: True  # noqa: E731


@dataclass(frozen=True, slots=True)
class Delivered:
    """The receiver has the message."""


FailureKind: TypeAlias = Literal["answer", "unreachable", "unsent"]
"""Kinds of failure that may be tried again: an answer about the message itself (4xx, 500); no answer about it (no
connection, no answer in time, 429, 502 to 504); not sent, for a reason of the relay."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Not delivered, as far as the publisher knows.

    permanent: do not try again; the message becomes a dead letter. retry_after: seconds that the receiver asked for.
    kind: whether the failure says something about the message; this decides when the relay gives it up.
    """

    reason: str
    permanent: bool = False
    retry_after: float | None = None
    kind: FailureKind = "answer"

    @property
    def counts_as(self) -> FailureKind | Literal["refusal"]:
        """Its row in the relay's table of failures and limits."""
        return "refusal" if self.permanent else self.kind


@dataclass(frozen=True, slots=True)
class Untried:
    """Not sent: an earlier message of its queue failed, or the relay's lease is over. This is no attempt."""


Outcome: TypeAlias = Delivered | Failed | Untried
DELIVERED = Delivered()
UNTRIED = Untried()


class Progress:
    """The state of a batch: the positions of messages that are being sent, and the outcomes of others.

    A publisher on the event loop that keeps this up to date gets other batches while some messages take long.
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
        """Record the outcome of a message."""
        self.under_way.discard(position)
        self.ended[position] = outcome
        self._changed()


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages to publish; those of a queue are in their order.

    live: whether the relay may still publish; check it before each message that is sent alone.
    timeout: seconds for each such message. progress: kept by publishers that send one message at a time.
    """

    messages: Sequence[Message]
    live: Callable[[], bool] = EMPTY_CHECK
    timeout: float = inf
    progress: Progress = field(default_factory=Progress)


class Publisher(Protocol):
    """Sends messages. `publish` may be a coroutine function; otherwise it is called in a thread.

    `publish` returns one outcome for each message, in order. After a message failed, it does not send later ones of the
    same queue. A message may come again, with the same id: after a crash, or after a lost answer. An exception counts
    as the failure of the whole batch. `publish` must end by itself. With `one_by_one` it does, after the batch's
    time-out for each message.

    The relay's routes contain the publisher's attribute `destination`: a text without secrets, the same in every
    process. Without that attribute, the name of its class is used, so that all publishers of one class are the same
    route.
    """

    max_payload: int | None
    """The most bytes that a payload may have, or None."""

    def publish(self, batch: Batch) -> Sequence[Outcome] | Awaitable[Sequence[Outcome]]:
        """Send a batch."""

    def close(self) -> Awaitable[None] | None:
        """Close connections."""


def destination_of(publisher: Publisher) -> str:
    """Where a publisher sends, as a text without secrets that is the same in every process."""
    kind = type(publisher)
    return str(getattr(publisher, "destination", None) or f"{kind.__module__}:{kind.__qualname__}")


async def handed(publisher: Publisher, batch: Batch) -> Sequence[Outcome]:
    """Send a batch by a sync or async publisher; one outcome for each message. An exception fails all of them."""
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
    """Send one message of a queue at a time, queues side by side. A failure or a time-out ends its queue."""
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
    """Send a message. An exception is a failure, and so is no answer within the time-out (seconds)."""
    clock = asyncio.timeout(timeout if timeout < inf else None)
    try:
        async with clock:
            return await send(message)
    except asyncio.CancelledError as error:
        if being_cancelled():
            raise
        return Failed(described(error))
    except Exception as error:  # noqa: BLE001 - after any exception of a publisher, the message counts as not delivered
        reason = f"no answer within {timeout:g} s" if clock.expired() else described(error)
        return Failed(reason, kind="unreachable" if clock.expired() else kind_of(error))


def being_cancelled() -> bool:
    """Whether a CancelledError is for this task, and did not only come from the code that it called."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def kind_of(error: BaseException) -> FailureKind:
    """Whether an exception, or one of its causes, says that the receiver was out of reach."""
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
