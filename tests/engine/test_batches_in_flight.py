"""Lanes that may have several batches on their way, and batches that hang."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from retryproof.core.commands import Acquired, Claim, Complete, Done, Lost, Reply, Running, Unreachable
from retryproof.stores.lanes import TaskCoalescer
from tests.engine.support import SECONDS, OnLoop, make_claim


class Overlapping(OnLoop):
    """An async store whose batches wait until the test opens a gate of theirs, and which watches what overlaps."""

    def __init__(self, batches_in_flight: int, max_batch: int = 256) -> None:
        super().__init__(batches_in_flight=batches_in_flight, max_batch=max_batch)
        self.gates: list[asyncio.Event] = []
        self.ids_in_flight: Counter[tuple[str, bytes]] = Counter()
        self.most = 0
        self.before = self.wait

    async def wait(self, name: str, commands: Sequence[Any]) -> None:
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()

    async def _call(self, name: str, commands: Sequence[Any]) -> Sequence[Any]:
        ids = [(name, command.id) for command in commands]
        self.ids_in_flight.update(ids)
        self.most = max(self.most, *self.ids_in_flight.values())
        try:
            return await super()._call(name, commands)
        finally:
            self.ids_in_flight.subtract(ids)

    def open_all(self) -> None:
        self.before = None
        for gate in self.gates:
            gate.set()


class Lanes(TaskCoalescer):
    def __init__(self, store: OnLoop, **options: Any) -> None:
        self.orphans: list[Claim] = []
        super().__init__(store, lambda claim, reply: self.orphans.append(claim), **options)


async def rounds(number: int = 5) -> None:
    """Let the loop run what is ready."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_what_comes_while_a_batch_is_on_its_way_leaves_at_once_where_the_store_takes_several() -> None:
    store = Overlapping(batches_in_flight=2)
    lanes = Lanes(store)
    asked = []
    for number in range(4):
        asked += [lanes.perform(make_claim(f"{number} {letter}"), SECONDS) for letter in "ab"]
        await rounds()
    assert store.sent == [("claim", 2)] * 2
    store.gates[1].set()
    await rounds(10)
    assert [future.done() for future in asked] == [False] * 2 + [True] * 2 + [False] * 4
    assert store.sent == [("claim", 2), ("claim", 2), ("claim", 4)]
    store.open_all()
    assert {type(reply) for reply in await asyncio.gather(*asked)} == {Acquired}


async def test_a_crowd_beyond_one_batch_is_sent_in_several_at_a_time() -> None:
    store = Overlapping(batches_in_flight=3, max_batch=4)
    lanes = Lanes(store)
    asked = [lanes.perform(make_claim(f"{number}"), SECONDS) for number in range(18)]
    await rounds(10)
    assert store.sent == [("claim", 4)] * 3
    store.open_all()
    await asyncio.gather(*asked)
    assert store.sent == [("claim", 4)] * 4 + [("claim", 2)]


@pytest.mark.parametrize("other", [False, True], ids=["twin", "other input"])
async def test_an_id_never_travels_in_two_batches_at_once(other: bool) -> None:
    store = Overlapping(batches_in_flight=4)
    lanes = Lanes(store)
    first = lanes.perform(make_claim(), SECONDS)
    await rounds()
    again = lanes.perform(make_claim(fingerprint=b"\0\0other" if other else b"\0\0one"), SECONDS)
    neighbour = lanes.perform(make_claim("neighbour"), SECONDS)
    await rounds(10)
    assert store.sent == [("claim", 1)] * 2
    store.open_all()
    replies = await asyncio.gather(first, again, neighbour)
    assert isinstance(replies[0], Acquired)
    assert not isinstance(replies[1], Acquired | Unreachable)
    assert isinstance(replies[2], Acquired)
    assert store.most == 1


async def test_what_waits_for_a_batch_that_failed_leaves_after_it() -> None:
    store = Overlapping(batches_in_flight=2)
    lanes = Lanes(store)

    async def fail(name: str, commands: Sequence[Any]) -> None:
        await Overlapping.wait(store, name, commands)
        raise OSError("gone")

    store.before = fail
    first = lanes.perform(make_claim(), SECONDS)
    await rounds()
    again = lanes.perform(make_claim(), SECONDS)
    await rounds()
    store.open_all()
    assert [type(reply) for reply in await asyncio.gather(first, again)] == [Unreachable, Acquired]


async def test_c3_a_loop_that_shuts_down_leaves_nobody_waiting_on_any_of_several_batches() -> None:
    store = Overlapping(batches_in_flight=2)
    lanes = Lanes(store)
    asked = []
    for name in ("a", "b", "c", "b"):
        asked.append(lanes.perform(make_claim(name), SECONDS))
        await rounds()
    asked[1].cancel()
    sending = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert len(sending) == 2
    for task in sending:
        task.cancel()
    async with asyncio.timeout(SECONDS):
        replies: list[Reply] = await asyncio.gather(asked[0], *asked[2:])
        store.open_all()
        later = [await lanes.perform(make_claim(name), SECONDS) for name in ("a", "b", "c")]
    assert {type(reply) for reply in replies} == {Unreachable}
    assert [claim.id for claim in lanes.orphans] == [make_claim("b").id]
    assert {type(reply) for reply in later} == {Acquired}


@pytest.mark.parametrize("seed", range(3))
async def test_under_pressure_everybody_is_answered_and_no_id_is_on_its_way_twice(seed: int) -> None:
    """Twins, cancellations, short time-outs and failures over three batches at a time."""
    dice = random.Random(seed)
    store = Overlapping(batches_in_flight=3, max_batch=8)

    async def stumble(name: str, commands: Sequence[Any]) -> None:
        for _ in range(dice.randrange(8)):
            await asyncio.sleep(0)
        if dice.random() < 0.1:
            raise OSError("gone")

    store.before = stumble
    lanes = Lanes(store)

    async def visit(number: int) -> None:
        claim = make_claim(f"{dice.randrange(30)}", fingerprint=dice.choice((b"\0\0one", b"\0\0one", b"\0\0other")))
        reply = await lanes.perform(claim, dice.choice((0.001, SECONDS)))
        if isinstance(reply, Acquired):
            answer = await lanes.perform(Complete(claim.id, claim.nonce, reply.token, b"done"), SECONDS)
            assert isinstance(answer, Done | Lost | Unreachable)

    for _ in range(20):
        tasks = [asyncio.create_task(visit(number)) for number in range(100)]
        await rounds(dice.randrange(6))
        for task in dice.sample(tasks, 20):
            task.cancel()
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() or task.exception() is None for task in tasks)
    assert store.most == 1
    assert all(not count for count in store.ids_in_flight.values())
    assert isinstance(await lanes.perform(make_claim("at last"), SECONDS), Acquired | Unreachable)


# Batches that hang


async def test_c10_a_batch_that_hangs_is_broken_off_and_the_next_leaves() -> None:
    store = Overlapping(batches_in_flight=1)
    lanes = Lanes(store, hang_limit=0.1)
    hanging, twin = lanes.perform(make_claim(), SECONDS), lanes.perform(make_claim(), SECONDS)
    await rounds()
    next = lanes.perform(make_claim("next"), SECONDS)
    store.before = None
    async with asyncio.timeout(SECONDS / 2):
        replies = await asyncio.gather(hanging, twin, next)
    assert [type(reply) for reply in replies] == [Unreachable, Acquired, Acquired]
    assert lanes.orphans == []


async def test_c10_a_store_that_hides_that_it_was_broken_off_is_sent_the_next_batch() -> None:
    store = Overlapping(batches_in_flight=1)

    async def stubborn(name: str, commands: Sequence[Any]) -> None:
        store.before = None
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            raise OSError("gone") from None

    store.before = stubborn
    lanes = Lanes(store, hang_limit=0.1)
    hanging = lanes.perform(make_claim(), SECONDS)
    await rounds()
    next = lanes.perform(make_claim("next"), SECONDS)
    async with asyncio.timeout(SECONDS / 2):
        assert [type(reply) for reply in await asyncio.gather(hanging, next)] == [Unreachable, Acquired]
        for number in range(3):
            assert isinstance(await lanes.perform(make_claim(f"{number}"), SECONDS), Acquired)


async def test_a_loop_that_shuts_down_ends_a_batch_that_was_just_broken_off() -> None:
    store = Overlapping(batches_in_flight=1)
    ends = asyncio.Event()

    async def slow_to_end(name: str, commands: Sequence[Any]) -> None:
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            ends.set()
            await asyncio.sleep(SECONDS)

    store.before = slow_to_end
    lanes = Lanes(store, hang_limit=0.05)
    asked = lanes.perform(make_claim(), SECONDS)
    await rounds()
    [sending] = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await ends.wait()
    sending.cancel()
    async with asyncio.timeout(SECONDS / 2):
        assert isinstance(await asked, Unreachable)
        await asyncio.wait([sending])
    assert sending.cancelled()
    store.before = None
    assert isinstance(await lanes.perform(make_claim("later"), SECONDS), Acquired | Running)
