"""A relay's routes: which publisher the messages of a topic go to (T6).

What they are is a digest in the database, so that relays with other routes do not share an outbox. A batch for several
publishers is sent to all of them side by side. A chain goes to one publisher at a time: where its messages have
several, those behind the first change are left for the next batch.
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
from retryproof.publishers.base import UNTRIED, Batch, Outcome, Progress, Publisher, chains, destination_of, handed
from retryproof.publishers.function import FunctionPublisher
from retryproof.publishers.url import open_publisher

Destination: TypeAlias = Publisher | str | Callable[[Message], Any]
EVERYTHING = ""
"""Stands for all topics that have no route of their own."""


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
        """Where everything goes, if that is one place."""
        return self._routes[EVERYTHING] if list(self._routes) == [EVERYTHING] else None

    def of(self, topic: str) -> Publisher | None:
        """Where a topic goes, or None where nobody said."""
        return self._routes.get(topic, self._routes.get(EVERYTHING))

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Send a batch, each publisher's share side by side."""
        outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)

        async def send(publisher: Publisher, places: list[int], progress: _Share) -> None:
            share = replace(batch, messages=[batch.messages[place] for place in places], progress=progress)
            for place, outcome in zip(places, await handed(publisher, share), strict=True):
                outcomes[place] = outcome
            progress.over([outcomes[place] for place in places])

        shares = [(*share, _Share(batch.progress, share[1])) for share in self._shares(batch.messages)]
        await asyncio.gather(*(send(*share) for share in shares))
        return outcomes

    def _shares(self, messages: Sequence[Message]) -> list[tuple[Publisher, list[int]]]:
        """The places of each publisher's messages, in order."""
        shares: dict[int, tuple[Publisher, list[int]]] = {}
        for chain in chains(messages):
            first = self.of(messages[chain[0]].topic)
            for place in chain:
                if first is None or self.of(messages[place].topic) is not first:
                    break
                shares.setdefault(id(first), (first, []))[1].append(place)
        return [(publisher, sorted(places)) for publisher, places in shares.values()]

    async def close(self) -> None:
        """Close all of them."""
        for publisher in self.publishers:
            closed = publisher.close()
            if inspect.isawaitable(closed):
                await closed


class _Share(Progress):
    """How far one publisher is, told to the whole batch; all of its share is under way until it says more."""

    def __init__(self, whole: Progress, places: Sequence[int]) -> None:
        super().__init__()
        self._whole = whole
        self._places = places
        self._told = False
        for place in places:
            whole.begin(place)

    def begin(self, place: int) -> None:
        if not self._told:
            self._told = True
            self._whole.under_way.difference_update(self._places)
        super().begin(place)
        self._whole.begin(self._places[place])

    def end(self, place: int, outcome: Outcome) -> None:
        super().end(place, outcome)
        self._whole.end(self._places[place], outcome)

    def over(self, outcomes: Sequence[Outcome]) -> None:
        """The publisher is done with its share; what it told already stands."""
        if not self._told:
            for place, outcome in zip(self._places, outcomes, strict=True):
                self._whole.end(place, outcome)


def _publisher(given: Destination, by_url: Mapping[str, Publisher]) -> Publisher:
    if isinstance(given, str):
        return by_url[given]
    if hasattr(given, "publish"):
        return cast(Publisher, given)
    return FunctionPublisher(given)


def _digest(routes: Mapping[str, Publisher]) -> str:
    """The same in every process that has the same routes, whatever passwords they use."""
    hashed = hashlib.sha256()
    for topic in sorted(routes):
        for text in (topic.encode(), destination_of(routes[topic]).encode()):
            hashed.update(len(text).to_bytes(4) + text)
    return hashed.hexdigest()[:32]
