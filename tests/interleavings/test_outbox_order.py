"""A relay's order and its floors (T5, T6) through every interleaving of writers and claims, on a model of PostgreSQL.

The model has what matters of the server: transaction ids that are given at the first write, numbers that are drawn
apart from them, row locks, snapshots that list open transactions up to the highest that has ended. Steps are apart that
the server takes apart: id, draw, insert and commit of a writer; snapshot, own id and answer of a claim; the finish.
The relay's floors are the real ones. Checked are: a message goes after all whose commit was seen before it was drawn
(of its key, or all in strict order), none is sent twice, and none is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import pytest

from retryproof.core.message import Message
from retryproof.outbox.floors import Floors
from retryproof.sql.outbox import ClaimedBatch

Order = Callable[[Message, int], Any]
"""By what a claim sorts: of a message, and the id of its transaction."""

ADD = ("id", "draw", "insert")
ORDERED = ("lock", *ADD, "commit")
"""The lock that orders it, and then the message."""


@dataclass(frozen=True)
class Scenario:
    """Writers by their steps, each with its partition; how many claims there may be before all writers are over."""

    writers: tuple[tuple[int, tuple[str, ...]], ...]
    strict: bool = False
    batch: int = 4
    claims: int = 3


@dataclass(frozen=True)
class Relay:
    """How the relay works; each seeded fault changes one thing."""

    floors: type[Floors] = Floors
    order: Order = lambda message, xid: message.sequence
    lists_all: bool = False
    old_snapshot: bool = False


@dataclass
class Writer:
    """A transaction on its way."""

    place: int = 0
    xid: int = 0
    number: int = 0
    seen: frozenset[int] = frozenset()


@dataclass
class World:
    """The server, the writers and the relay."""

    writers: list[Writer]
    floors: Floors
    next_xid: int = 1
    next_number: int = 1
    lock: int | None = None
    ended: frozenset[int] = frozenset()
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By number: writer and transaction id."""
    snapshot: tuple[frozenset[int], tuple[int, ...]] | None = None
    """What had ended, and the numbers of the rows that are visible."""
    older: tuple[frozenset[int], tuple[int, ...]] | None = None
    flight: tuple[int, ...] | None = None
    sent: tuple[int, ...] = ()
    claims: int = 0

    def clone(self) -> World:
        """The same, for a step to be taken in."""
        world, floors = copy.copy(self), copy.copy(self.floors)
        world.writers, world.rows, world.floors = [copy.copy(one) for one in self.writers], dict(self.rows), floors
        floors.at, floors._ahead = dict(floors.at), dict(floors._ahead)
        return world

    def key(self) -> object:
        """The same for worlds that will act alike."""
        floors = self.floors
        return (
            tuple((one.place, one.xid, one.number, one.seen) for one in self.writers),
            *(self.next_xid, self.next_number, self.lock, self.ended, tuple(self.rows.items())),
            *(self.snapshot, self.older, self.flight, self.sent, self.claims),
            *(tuple(floors.at.items()), tuple(floors.open.items()), floors.highest),
            *(floors._before, floors._own, floors._unlisted, tuple(floors._ahead.items())),
        )


class Violation(AssertionError):
    """Something that must not happen did."""


class Explorer:
    """Visits every world."""

    def __init__(self, scenario: Scenario, relay: Relay) -> None:
        self.scenario = scenario
        self.relay = relay
        self.known: set[object] = set()

    def explore(self) -> int:
        """Raises Violation; how many worlds there were."""
        floors = self.relay.floors()
        floors.own(sorted({partition for partition, _ in self.scenario.writers}))
        waiting = [World([Writer() for _ in self.scenario.writers], floors)]
        while waiting:
            world = waiting.pop()
            if (key := world.key()) in self.known:
                continue
            self.known.add(key)
            following = list(self._steps(world))
            if not following:
                self._drain(world)
            waiting += following
        return len(self.known)

    def _steps(self, world: World) -> Iterator[World]:
        for number, writer in enumerate(world.writers):
            steps = self.scenario.writers[number][1]
            if writer.place < len(steps) and not (steps[writer.place] == "lock" and world.lock is not None):
                yield self._write(world.clone(), number, steps[writer.place])
        writing = any(one.place < len(self.scenario.writers[at][1]) for at, one in enumerate(world.writers))
        if world.snapshot or world.flight is not None or (writing and world.claims < self.scenario.claims):
            yield self._relay(world.clone())

    def _write(self, world: World, number: int, step: str) -> World:
        writer = world.writers[number]
        match step:
            case "add":
                for part in ADD:
                    self._write(world, number, part)
                writer.place -= len(ADD)
            case "lock":
                world.lock = number
            case "id" if not writer.xid:
                writer.xid, world.next_xid = world.next_xid, world.next_xid + 1
            case "draw":
                committed = {row[0] for row in world.rows.values() if row[1] in world.ended}
                writer.seen = frozenset(committed | set(world.sent))
                writer.number, world.next_number = world.next_number, world.next_number + 1
            case "insert":
                world.rows[writer.number] = (number, writer.xid)
            case "insert at the first number":
                world.rows[0] = (number, writer.xid)
            case "commit":
                world.ended |= {writer.xid}
                world.lock = None if world.lock == number else world.lock
        writer.place += 1
        return world

    def _relay(self, world: World) -> World:
        if world.flight is not None:
            world.next_xid, world.ended = world.next_xid + 1, world.ended | {world.next_xid}
            for number in world.flight:
                del world.rows[number]
            world.flight = None
            world.floors.advance()
        elif world.snapshot is None:
            visible = tuple(number for number, (_, xid) in world.rows.items() if xid in world.ended)
            world.snapshot = world.ended, visible
        else:
            self._answer(world)
        return world

    def _answer(self, world: World) -> None:
        """The claim has its own id, which is not the next one after the snapshot where others began since."""
        assert world.snapshot is not None
        own, world.next_xid = world.next_xid, world.next_xid + 1
        ended, visible = (world.older or world.snapshot) if self.relay.old_snapshot else world.snapshot
        world.older, world.snapshot = world.snapshot, None
        world.ended |= {own}
        world.claims += 1
        floors, end = world.floors, max(ended, default=0) + 1
        starts = dict(floors.begin())
        low = min((low for xid, low in floors.open.items() if xid in ended), default=None)
        listed = {xid for xid in range(1, end) if xid not in ended} | {xid for xid in floors.open if xid not in ended}
        found = self._found(world, starts, low, visible)
        unlisted = end < own and not self.relay.lists_all
        floors.learn(ClaimedBatch(True, False, found, (), low, sorted(listed), unlisted, own, 0))
        if not self.scenario.strict:
            floors.follow(found, (), quota=self.scenario.batch, batch=self.scenario.batch)
        elif found:
            floors.follow_all(found[-1].sequence)
        self._publish(world, found)

    def _found(self, world: World, starts: dict[int, int], low: int | None, visible: Sequence[int]) -> list[Message]:
        known = world.rows if not self.relay.old_snapshot else {**dict.fromkeys(visible, (0, 0)), **world.rows}
        rows = [(self._message(number, known[number][0]), known[number][1]) for number in visible]
        rows.sort(key=lambda row: self.relay.order(*row))
        found: list[Message] = []
        for partitions in [set(starts)] if self.scenario.strict else [{partition} for partition in starts]:
            found += [
                message
                for message, _ in rows
                if message.partition in partitions
                and (message.sequence >= starts[message.partition] or (low is not None and message.sequence >= low))
            ]
        return found[: self.scenario.batch]

    def _message(self, number: int, writer: int) -> Message:
        return Message(UUID(int=writer), "t", b"", sequence=number, partition=self.scenario.writers[writer][0])

    def _publish(self, world: World, found: Sequence[Message]) -> None:
        for message in found:
            writer = message.id.int
            if writer in world.sent:
                raise Violation(f"{writer} was sent twice")
            partition = self.scenario.writers[writer][0]
            for before in world.writers[writer].seen - set(world.sent):
                if self.scenario.strict or self.scenario.writers[before][0] == partition:
                    raise Violation(f"{writer} was sent before {before}, whose commit it saw")
            world.sent += (writer,)
        world.flight = tuple(message.sequence for message in found) or None

    def _drain(self, world: World) -> None:
        """Everybody is over: the relay goes on until it finds nothing."""
        world = world.clone()
        for _ in range(3 * len(world.writers) + 3):
            world = self._relay(world)
        left = {writer for writer, xid in world.rows.values() if xid in world.ended and writer not in world.sent}
        if left and not world.flight:
            raise Violation(f"{left} were left behind")


IN_TURN = Scenario(((0, ("id", *ORDERED)), (0, ORDERED)))
"""One has its transaction id before it waits for the lock; two of them are what was found to be sent the wrong way."""
FINE, COARSE = (*ADD, "commit"), ("add", "commit")
BESIDE = Scenario(((0, FINE), (1, COARSE), (0, COARSE)), claims=2)
BEGUN_BEFORE = Scenario(((0, ("id", *COARSE)), (0, COARSE), (1, COARSE)), claims=2)
SMALL_BATCHES = Scenario(((0, COARSE), (1, ("lock", *COARSE)), (0, ("lock", *COARSE))), batch=1, claims=2)
SCENARIOS = {
    "transactions that lock a row in turn": IN_TURN,
    "the same in strict order": replace(IN_TURN, strict=True),
    "transactions beside each other": BESIDE,
    "the same in strict order, beside each other": replace(BESIDE, strict=True),
    "one that has its id for long": BEGUN_BEFORE,
    "batches of one": SMALL_BATCHES,
    "batches of one in strict order": replace(SMALL_BATCHES, strict=True),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_t6_no_interleaving_loses_the_order_or_a_message(name: str) -> None:
    assert Explorer(SCENARIOS[name], Relay()).explore() > 100


class TooEarly(Floors):
    """Floors that are taken as if nobody was open."""

    def learn(self, taken: ClaimedBatch) -> None:
        super().learn(replace(taken, low=None, open=(), unlisted=False))


class Forgetful(Floors):
    """Floors that go back for a claim, and not for what it did not come to."""

    def _lower(self, low: int) -> None:
        pass


DRAWN_FIRST = Scenario(((0, ("draw", "id", "insert", "commit")), (0, (*ADD, "commit"))))
REQUEUED = Scenario(((0, (*ADD, "commit")), (0, ("draw", "id", "insert at the first number", "commit"))))


@pytest.mark.parametrize(
    ("scenario", "relay", "says"),
    [
        (IN_TURN, Relay(order=lambda message, xid: (xid, message.sequence)), "whose commit it saw"),
        (replace(IN_TURN, strict=True), Relay(order=lambda message, xid: xid), "whose commit it saw"),
        (BESIDE, Relay(floors=TooEarly), "left behind"),
        (replace(BESIDE, strict=True), Relay(floors=TooEarly), "left behind"),
        (BESIDE, Relay(lists_all=True), "left behind"),
        (SMALL_BATCHES, Relay(floors=Forgetful), "left behind|whose commit it saw"),
        (IN_TURN, Relay(old_snapshot=True), "sent twice"),
        (DRAWN_FIRST, Relay(), "left behind"),
        (REQUEUED, Relay(), "left behind|whose commit it saw"),
    ],
    ids=[
        "sorted by transaction id",
        "sorted by transaction id, strict",
        "a floor too early",
        "a floor too early, strict",
        "a snapshot believed to list all",
        "floors lowered for one claim only",
        "a claim with an old snapshot",
        "a number drawn before the id",
        "requeued under its old number",
    ],
)
def test_t6_each_fault_is_found(scenario: Scenario, relay: Relay, says: str) -> None:
    with pytest.raises(Violation, match=says):
        Explorer(scenario, relay).explore()
