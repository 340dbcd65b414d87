"""A relay's routes: the publisher for the messages of each topic (T6).

A digest of the routes is in the database, so that relays with other routes do not share an outbox. A batch for several
publishers is sent to all of them side by side. A queue goes to one publisher at a time: if its messages have several
publishers, those after the first change wait for the next batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.publishers.base import UNTRIED, Batch, Outcome, Progress, Publisher, destination_of, handed, queues
from retryproof.publishers.function import FunctionPublisher
from retryproof.publishers.url import open_publisher

Destination: TypeAlias = Publisher | str | Callable[[Message], Any]
EVERYTHING = ""
"""The name for all topics without a route of their own."""


class Routes:
    """Publishers by topic; EVERYTHING is for topics without one of their own. A publisher itself, of all of them."""

    max_payload: int | None = None  # each route has its own

    def __init__(self, routes: Mapping[str, Destination]) -> None:
        if not routes:
            raise ConfigurationError("A relay needs somewhere to send: a publisher, or routes={topic: publisher}.")
        by_url = {given: open_publisher(given) for given in routes.values() if isinstance(given, str)}
        self._routes = {topic: _publisher(given, by_url) for topic, given in routes.items()}
        self.publishers = list({id(publisher): publisher for publisher in self._routes.values()}.values())
        self.digest = _digest(self._routes)

    @property
    def one(self) -> Publisher | None:
        """The publisher of all messages, if there is only one."""
        return self._routes[EVERYTHING] if list(self._routes) == [EVERYTHING] else None

    def of(self, topic: str) -> Publisher | None:
        """The publisher of a topic, or None if there is none."""
        return self._routes.get(topic, self._routes.get(EVERYTHING))

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Send a batch: each publisher its own messages, side by side."""
        outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)

        async def send(publisher: Publisher, positions: list[int], progress: _Assignment) -> None:
            part = replace(batch, messages=[batch.messages[position] for position in positions], progress=progress)
            for position, outcome in zip(positions, await handed(publisher, part), strict=True):
                outcomes[position] = outcome
            progress.over([outcomes[position] for position in positions])

        assigned = [
            (publisher, positions, _Assignment(batch.progress, positions))  # all of them, before one begins
            for publisher, positions in self._assigned(batch.messages)
        ]
        await asyncio.gather(*(send(*assignment) for assignment in assigned))
        return outcomes

    def _assigned(self, messages: Sequence[Message]) -> list[tuple[Publisher, list[int]]]:
        """The positions of each publisher's messages, in order."""
        assigned: dict[int, tuple[Publisher, list[int]]] = {}
        for queue in queues(messages):
            first = self.of(messages[queue[0]].topic)
            for position in queue:
                if first is None or self.of(messages[position].topic) is not first:
                    break
                assigned.setdefault(id(first), (first, []))[1].append(position)
        return [(publisher, sorted(positions)) for publisher, positions in assigned.values()]

    async def close(self) -> None:
        """Close all of them."""
        for publisher in self.publishers:
            closed = publisher.close()
            if inspect.isawaitable(closed):
                await closed


class _Assignment(Progress):
    """How far one publisher is with its messages, told to the whole batch; all are under way until it says more."""

    def __init__(self, whole: Progress, positions: Sequence[int]) -> None:
        super().__init__()
        self._whole = whole
        self._positions = positions
        self._told = False
        for position in positions:
            whole.begin(position)

    def begin(self, position: int) -> None:
        if not self._told:
            self._told = True
            self._whole.under_way.difference_update(self._positions)
        super().begin(position)
        self._whole.begin(self._positions[position])

    def end(self, position: int, outcome: Outcome) -> None:
        super().end(position, outcome)
        self._whole.end(self._positions[position], outcome)

    def over(self, outcomes: Sequence[Outcome]) -> None:
        """The publisher is done; what it told already stands."""
        if not self._told:
            for position, outcome in zip(self._positions, outcomes, strict=True):
                self._whole.end(position, outcome)


def _publisher(given: Destination, by_url: Mapping[str, Publisher]) -> Publisher:
    if isinstance(given, str):
        return by_url[given]
    if hasattr(given, "publish"):
        return cast(Publisher, given)
    return FunctionPublisher(given)


def _digest(routes: Mapping[str, Publisher]) -> str:
    """A digest that is the same in every process with the same routes, whatever the passwords are."""
    hashed = hashlib.sha256()
    for topic in sorted(routes):
        for text in (topic.encode(), destination_of(routes[topic]).encode()):
            hashed.update(len(text).to_bytes(4) + text)
    return hashed.hexdigest()[:32]
