"""A receiver that hangs for one key holds up that key alone: on both databases, over real HTTP where that matters."""

import threading
from asyncio import Event, create_task, sleep, wait_for
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.message import Message
from retryproof.outbox.operator import Operator
from retryproof.publishers import Batch, Outcome
from retryproof.publishers.base import DELIVERED
from retryproof.publishers.httpx import HttpPublisher
from retryproof.transaction import Relay, RelayPolicy
from tests.transaction.outboxes import PATIENT, Database, running, until
from tests.transaction.receivers import Receiver, Request, http_receiver


class Slow:
    """A receiver that keeps requests of the key `slow` waiting until `answer` is set."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.asked = threading.Event()
        self.answer = threading.Event()
        receiver.answer = self._answer

    def _answer(self, request: Request) -> tuple[int, dict[str, str]]:
        if request.body.startswith(b"slow:"):
            self.asked.set()
            self.answer.wait(50.0)
        return 204, {}

    @property
    def bodies(self) -> list[str]:
        return [request.body.decode() for request in self.receiver.requests]

    def of(self, key: str) -> list[str]:
        return [body for body in self.bodies if body.startswith(f"{key}:")]


@pytest.fixture
def slow() -> Iterator[Slow]:
    with http_receiver() as receiver:
        made = Slow(receiver)
        yield made
        made.answer.set()


async def test_t6_a_receiver_that_hangs_for_one_key_holds_up_that_key_alone(database: Database, slow: Slow) -> None:
    database.send("slow", "slow", *(f"k{number}" for number in range(150)), "slow")
    relay = Relay(database.url, HttpPublisher(slow.receiver.url, timeout=60.0), policy=PATIENT)
    async with running(relay):
        await until(lambda: database.pending == 3)
        database.send("late", "slow", "later")
        await until(lambda: database.pending == 4)
        assert slow.of("slow") == ["slow:0"]
        assert slow.of("late") + slow.of("later") == ["late:0", "later:2"]
        assert (await relay.stats()).parked >= 1
        slow.answer.set()
        await until(lambda: database.pending == 0)
    assert slow.of("slow") == ["slow:0", "slow:1", "slow:152", "slow:1"]
    assert len(slow.bodies) == 156
    assert relay.totals.delivered == 156
    assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []


@pytest.mark.quiet
async def test_t6_a_receiver_that_hangs_costs_other_keys_no_more_than_the_patience(
    database: Database, slow: Slow
) -> None:
    database.send("slow", "other")
    relay = Relay(database.url, HttpPublisher(slow.receiver.url, timeout=60.0), policy=PATIENT)
    async with running(relay):
        await until(slow.asked.is_set)
        database.send("next")
        began = monotonic()
        await until(lambda: slow.of("next"))
        assert monotonic() - began < 5.0
        slow.answer.set()
        await until(lambda: database.pending == 0)


async def test_t6_a_message_without_an_answer_in_time_has_failed_and_backs_off(database: Database, slow: Slow) -> None:
    bad, *_ = database.send("slow", "slow", "good", "good")
    policy = replace(PATIENT, timeout=0.3, give_up_after=1.0)
    relay = Relay(database.url, HttpPublisher(slow.receiver.url, timeout=60.0), policy=policy)
    async with running(relay):
        await until(lambda: database.rows("SELECT id FROM retryproof_outbox_dead"))
        slow.answer.set()
        await until(lambda: database.pending == 0)
    operator = Operator(database.url)
    (letter,) = await operator.dead()
    assert letter.message.id == bad.id
    assert "h after its first failure" in letter.reason
    assert slow.of("good") == ["good:2", "good:3"]
    first, again, *_, last = slow.of("slow")
    assert (first, again, last) == ("slow:0", "slow:0", "slow:1")
    await operator.aclose()


async def test_t7_what_a_dead_relay_was_sending_slowly_is_sent_again_in_order(database: Database) -> None:
    database.send("slow", "slow", "good")
    never, asked = Event(), Event()

    async def hang(message: Message) -> None:
        if message.key == "slow":
            asked.set()
            await never.wait()

    dying = Relay(database.url, hang, policy=replace(PATIENT, lease=0.5))
    await dying.run_once()
    assert asked.is_set()
    assert database.pending == 2
    await dying._in_flight.abandon()
    await dying._opened().aclose()
    sent: list[bytes] = []

    async def note(message: Message) -> None:
        sent.append(message.payload)

    relay = Relay(database.url, note, policy=PATIENT)
    async with running(relay):
        await until(lambda: database.pending == 0)
    assert sent == [b"slow:0", b"slow:1"]
    assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []


@pytest.mark.parametrize("relays", [2, 4])
async def test_t7_partitions_of_which_something_is_being_sent_are_not_given_up(database: Database, relays: int) -> None:
    keys = [f"slow{number}" for number in range(30)]
    messages = database.send(*keys, *keys)
    busy = {message.partition for message in messages}
    answer = Event()
    sent: list[tuple[str | None, bytes]] = []

    async def hang(message: Message) -> None:
        sent.append((message.key, message.payload))
        await answer.wait()

    first, *others = (Relay(database.url, hang, policy=PATIENT) for _ in range(relays))
    share = 64 // relays

    def owned(relay: Relay) -> set[int]:
        return set(relay._member._floors.at) if relay._member is not None else set()

    await first.run_once()
    assert len(sent) == 30
    async with running(first, *others):
        await until(lambda: sum(len(owned(relay)) for relay in others) == 64 - max(share, len(busy)))
        assert busy <= owned(first)
        assert len(sent) == 30
        answer.set()
        await until(lambda: database.pending == 0)
        await until(lambda: len(owned(first)) == share)
    assert len(sent) == len(set(sent)) == 60
    assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []


async def test_t6_what_hangs_when_a_relay_is_stopped_has_the_drain_time_and_is_not_lost(database: Database) -> None:
    database.send("slow", "good")
    answer = Event()

    async def hang(message: Message) -> None:
        if message.key == "slow":
            await answer.wait()

    relay = Relay(database.url, hang, policy=replace(PATIENT, drain=0.2, lease=1.0))
    task = create_task(relay.run())
    await until(lambda: database.pending == 1)
    relay.stop()
    totals = await wait_for(task, 10.0)
    assert (totals.delivered, database.pending) == (1, 1)
    assert database.rows("SELECT count(*) FROM retryproof_outbox_relays") == [(1,)], "its lease has to run out"

    relay = Relay(database.url, hang, policy=PATIENT)
    database.send("others")
    async with running(relay):
        await until(lambda: relay.totals.delivered == 1)  # beside what the other relay left, which hangs again
        answer.set()
        await until(lambda: database.pending == 0)


@pytest.mark.parametrize("applied", [False, True])
async def test_t7_a_finish_without_an_answer_is_said_again_and_sends_nothing_twice(
    database: Database, applied: bool
) -> None:
    database.send(*(f"k{number}" for number in range(10)), "slow", "slow")
    answer = Event()
    sent: list[bytes] = []

    async def note(message: Message) -> None:
        sent.append(message.payload)
        if message.key == "slow":
            await answer.wait()

    relay = Relay(database.url, note, policy=PATIENT)
    member = await relay._joined()
    finish, failures = member.finish, 2

    async def lossy(*args: Any, **options: Any) -> None:
        nonlocal failures
        lost, failures = failures > 0, failures - 1
        if applied or not lost:
            await finish(*args, **options)
        if lost:
            raise StoreUnavailable("the answer was lost")

    member.finish = lossy  # type: ignore[method-assign] # the real one, over a connection that loses answers
    async with running(relay):
        await until(lambda: relay.totals.delivered == 10)
        answer.set()
        await until(lambda: database.pending == 0)
    assert len(sent) == len(set(sent)) == 12
    assert sent[-2:] == [b"slow:10", b"slow:11"]


async def test_t6_more_slow_messages_than_may_go_on_are_waited_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retryproof.outbox.in_flight.SLOW", 8)
    database.send(*(f"slow{number}" for number in range(100)))
    working, most = 0, 0

    async def hang(message: Message) -> None:
        nonlocal working, most
        working += 1
        most = max(most, working)
        await sleep(0.05)
        working -= 1

    relay = Relay(database.url, hang, policy=replace(PATIENT, patience=0.01, batch=4))
    async with running(relay):
        await until(lambda: database.pending == 0)
    assert 8 <= most <= 12
    assert relay.totals.delivered == 100


async def test_t6_a_publisher_that_does_not_say_how_far_it_is_has_one_batch_at_a_time(database: Database) -> None:
    class Whole:
        max_payload: int | None = None

        def __init__(self) -> None:
            self.batches = 0
            self.working = 0

        async def publish(self, batch: Batch) -> list[Outcome]:
            self.working += 1
            assert self.working == 1
            await sleep(0.05)
            self.batches += 1
            self.working -= 1
            return [DELIVERED] * len(batch.messages)

        def close(self) -> None:
            pass

    database.send(*(f"k{number}" for number in range(20)))
    publisher = Whole()
    relay = Relay(database.url, publisher, policy=replace(PATIENT, patience=0.01, batch=10))
    await relay.run_until_idle()
    assert database.pending == 0
    assert publisher.batches >= 2


async def test_t6_a_plain_function_that_hangs_is_waited_for_and_named_in_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retryproof.outbox.in_flight.LATE", 0.1)
    database.send("a", "b")
    answer = threading.Event()

    def hang(message: Message) -> None:
        answer.wait(20.0)

    relay = Relay(database.url, hang, policy=PATIENT)
    async with running(relay):
        await until(lambda: "time-outs of its own" in caplog.text)
        assert database.pending == 2
        answer.set()
        await until(lambda: database.pending == 0)


@pytest.mark.parametrize("times", [{"patience": 0.0}, {"timeout": 0.0}])
def test_times_that_make_no_sense_are_refused(times: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(times))):
        RelayPolicy(**times)
