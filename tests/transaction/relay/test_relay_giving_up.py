"""When a relay gives a message up: receivers that are down for long, answers, deaths, age (T6, C15)."""

import logging
from asyncio import sleep
from collections.abc import Sequence
from dataclasses import replace

import pytest

from retryproof.core.message import Message
from retryproof.outbox import breaker
from retryproof.outbox.operator import Operator
from retryproof.publishers import UNTRIED, Batch, Failed, Outcome
from retryproof.publishers.httpx import HttpPublisher
from retryproof.transaction import Relay
from tests.transaction.outboxes import QUICK, Database, Noting, until_empty
from tests.transaction.receivers import Request, http_receiver

DAY = 86_400 * 1_000_000


@pytest.fixture(autouse=True)
def quick_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE", 0.02)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_t6_a_receiver_that_is_down_for_long_makes_no_dead_letter_and_keeps_the_order(
    database: Database, status: int
) -> None:
    database.send("a", "b", "a", "b", "a")
    down = 60

    def answer(request: Request) -> tuple[int, dict[str, str]]:
        nonlocal down
        down -= 1
        return (status if down >= 0 else 204), {}

    with http_receiver() as receiver:
        receiver.answer = answer
        relay = Relay(database.url, HttpPublisher(receiver.url), policy=replace(QUICK, max_attempts=2))
        await until_empty(relay)
        received = [request.body for request in receiver.requests[60:]]
    assert (await relay.stats()).dead == 0
    assert [body for body in received if body[:1] == b"a"] == [b"a:0", b"a:2", b"a:4"]
    assert [body for body in received if body[:1] == b"b"] == [b"b:1", b"b:3"]
    await relay.aclose()


async def test_t6_answers_about_the_message_are_counted_beside_failures_that_are_not(database: Database) -> None:
    database.send("k")
    verdicts = [Failed("503", kind="unreachable"), Failed("400"), Failed("503", kind="unreachable"), Failed("400")]
    publisher = Noting(lambda message: verdicts[len(publisher.tried) - 1])
    relay = Relay(database.url, publisher, policy=replace(QUICK, max_attempts=2))
    await until_empty(relay)
    assert [(m.attempts, m.answers) for m in publisher.tried] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert all(m.failed_at == publisher.tried[1].failed_at for m in publisher.tried[1:])
    operator = Operator(database.url)
    (letter,) = await operator.dead()
    assert (letter.reason, letter.message.attempts) == ("400", 4)
    await operator.aclose()
    await relay.aclose()


async def test_t6_what_is_too_old_is_given_up_without_being_sent_again(database: Database) -> None:
    old, _ = database.send("old", "new")
    database.execute(f"UPDATE retryproof_outbox SET failed_at = created_at - {DAY}, attempts = 3 WHERE id = '{old.id}'")
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    assert publisher.payloads == ["new:1"]
    operator = Operator(database.url)
    (letter,) = await operator.dead()
    assert letter.reason == "given up 24.0 h after its first failure"
    await operator.aclose()
    await relay.aclose()


async def test_t6_a_later_resend_and_an_age_over_a_day_warn(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.send("old")
    database.execute(f"UPDATE retryproof_outbox SET failed_at = created_at - {2 * DAY}")
    publisher = Noting()
    with caplog.at_level(logging.WARNING, "retryproof.relay"):
        relay = Relay(database.url, publisher, policy=replace(QUICK, give_up_after=3 * 86_400.0))
        assert "give_up_after= is 72 h" in caplog.text
        await until_empty(relay)
    assert publisher.payloads == ["old:0"]
    assert "more than a day after its first failure" in caplog.text
    await relay.aclose()


async def test_t6_a_requeue_begins_the_age_anew_and_warns_of_old_messages(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = database.send("old", "new")
    relay = Relay(database.url, Noting(lambda message: Failed("410", permanent=True)), policy=QUICK)
    await relay.run_until_idle()
    operator = Operator(database.url)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "retryproof.relay"):
        assert await operator.requeue([new.id]) == 1
        assert caplog.text == ""
        database.execute(f"UPDATE retryproof_outbox_dead SET created_at = created_at - {DAY}")
        assert await operator.requeue([old.id]) == 1
        assert "1 of the 1 requeued messages are older than a day" in caplog.text
    await operator.aclose()
    assert database.rows("SELECT failed_at, answers, deaths, attempts FROM retryproof_outbox") == [(None, 0, 0, 0)] * 2


async def test_c15_a_death_beside_others_begins_the_age_and_one_alone_counts_too(database: Database) -> None:
    database.send("a", "b")
    for _ in range(2):
        dying = Relay(database.url, Noting(), policy=replace(QUICK, batch=10))
        member = await dying._joined()
        await member.balance()
        await member.claim()
        await dying._opened().aclose()
        database.execute("UPDATE retryproof_outbox_relays SET lease_until = 1")
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    assert sorted(m.deaths for m in publisher.published) == [0, 1]
    assert all(m.failed_at == m.created_at for m in publisher.published)
    await relay.aclose()


class Stopping(Noting):
    """As where the relay is to stop: what was claimed is given back."""

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        return [UNTRIED] * len(batch.messages)


async def test_c15_an_attempt_alone_that_was_not_made_counts_no_death(database: Database) -> None:
    database.send("k")
    database.execute("UPDATE retryproof_outbox SET parked = (1 = 1), alone = (1 = 1)")
    database.execute(
        "INSERT INTO retryproof_outbox_blocked (partition, chain, due_at, alone) "
        "SELECT partition, chain, 0, (1 = 1) FROM retryproof_outbox"
    )
    relay = Relay(database.url, Stopping(), policy=QUICK)
    for _ in range(3):
        await relay.run_once()
    await relay.aclose()
    assert database.rows("SELECT deaths, attempts FROM retryproof_outbox") == [(0, 0)]
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=replace(QUICK, max_deaths=1))
    await until_empty(relay)
    assert publisher.payloads == ["k:0"]
    await relay.aclose()


async def test_t6_a_dead_receiver_is_tried_a_few_times_however_much_is_due(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE", 60.0)
    database.send(*(f"k{number}" for number in range(1_000)))
    publisher = Noting(lambda message: Failed("refused", kind="unreachable"))
    relay = Relay(database.url, publisher, policy=QUICK)
    for _ in range(50):
        await relay.run_once()
    assert len(publisher.tried) == QUICK.batch
    publisher.fails = lambda message: None
    (down,) = relay._screening.down.values()
    down._until = 0.0
    await until_empty(relay)
    assert len(publisher.published) == 1_000
    assert (await relay.stats()).dead == 0
    await relay.aclose()


async def test_t6_a_key_whose_receiver_is_out_of_reach_does_not_hold_up_others(database: Database) -> None:
    database.send(*(f"bad{number}" for number in range(30)))

    def fails(message: Message) -> Failed | None:
        return Failed("refused", kind="unreachable") if str(message.key).startswith("bad") else None

    publisher = Noting(fails)
    relay = Relay(database.url, publisher, policy=replace(QUICK, backoff=600.0, max_backoff=600.0))
    for _ in range(10):
        await relay.run_once()
    database.send(*(f"good{number}" for number in range(50)))
    for _ in range(1_000):
        if len(publisher.published) == 50:
            break
        if await relay.run_once() is None:
            await relay._idle(0.01)
    assert len(publisher.published) == 50
    await relay.aclose()


async def test_t6_new_keys_are_tried_though_many_that_failed_before_are_due(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some keys of a receiver are never answered, they must not take all places of its probes."""
    database.send(*(f"bad{number}" for number in range(200)))

    def fails(message: Message) -> Failed | None:
        return Failed("refused", kind="unreachable") if str(message.key).startswith("bad") else None

    publisher = Noting(fails)
    relay = Relay(database.url, publisher, policy=QUICK)
    while len(publisher.tried) < 200:
        await relay.run_once()
        await sleep(0.002)
    database.send("good")
    before = len(publisher.tried)
    while not publisher.published:
        await relay.run_once()
        await sleep(0.002)
    assert len(publisher.tried) - before < 100
    await relay.aclose()


async def test_t6_a_relay_whose_receiver_is_down_sleeps(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 60.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE", 60.0)
    database.send(*["a", "b", "c", "d"] * 30)
    relay = Relay(database.url, Noting(lambda message: Failed("refused", kind="unreachable")), policy=QUICK)
    for _ in range(20):
        await relay.run_once()
        await sleep(0.003)
        if relay._screening.down:
            break
    assert [await relay.run_once() for _ in range(3)] == [None] * 3
    await relay.aclose()
