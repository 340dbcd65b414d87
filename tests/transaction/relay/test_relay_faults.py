"""What a relay must live through: backlogs behind one key, cancellation, lost answers, receivers that fail oddly."""

import threading
from asyncio import CancelledError, Event, create_task, get_running_loop, sleep, wait_for
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import asyncpg
import pytest

from retryproof.core.errors import StoreUnavailable
from retryproof.core.message import Message
from retryproof.drive import apump
from retryproof.outbox.in_flight import Pace
from retryproof.publishers import Batch, Outcome
from retryproof.publishers.function import FunctionPublisher
from retryproof.sql.outbox import ClaimedBatch
from retryproof.sql.plan import Plan, Statement
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Relay
from tests.transaction.outboxes import PATIENT, QUICK, Database, Noting, running, until, until_empty


def beside(message: Message, database: Database) -> str:
    """Another key of the same partition."""
    keys = (f"beside{number}" for number in range(100_000))
    return next(key for key in keys if database.outbox.message("t", b"", key=key).partition == message.partition)


@pytest.mark.quiet
async def test_t6_a_backlog_behind_a_slow_key_does_not_hold_up_its_partition(database: Database) -> None:
    slow, *_ = database.send(*["slow"] * 3_000)
    database.send(beside(slow, database))
    answer, sent = Event(), []

    async def hang(message: Message) -> None:
        sent.append(message.payload)
        if message.key == "slow":
            await answer.wait()

    relay = Relay(database.url, hang, policy=replace(PATIENT, poll=0.2, max_poll=1.0, listen=False))
    async with running(relay):
        await until(lambda: len(sent) == 1)
        began = monotonic()
        await until(lambda: len(sent) == 2)
        assert monotonic() - began < 5.0
        answer.set()
        await until(lambda: database.pending == 0)
    assert [payload for payload in sent if payload.startswith(b"slow")] == [b"slow:%d" % n for n in range(3_000)]


async def test_t7_a_cancelled_relay_keeps_what_its_publisher_is_sending(database: Database) -> None:
    database.send("a", "a", "b")
    begun, answer = threading.Event(), threading.Event()

    def hang(message: Message) -> None:
        begun.set()
        answer.wait(20.0)

    relay = Relay(database.url, hang, policy=replace(PATIENT, lease=60.0))
    task = create_task(relay.run())
    await get_running_loop().run_in_executor(None, begun.wait, 20.0)
    task.cancel()
    with suppress(CancelledError):
        await wait_for(task, 10.0)
    assert database.rows("SELECT count(*) FROM retryproof_outbox_relays") == [(1,)], "its lease has to run out"
    answer.set()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_t6_strict_order_ends_with_the_drain_time_and_keeps_what_it_is_sending(
    database: Database, cancelled: bool
) -> None:
    database.send("a", "b")
    begun = Event()

    async def hang(message: Message) -> None:
        begun.set()
        await Event().wait()

    relay = Relay(database.url, hang, policy=replace(PATIENT, order="strict", drain=0.2, timeout=60.0, lease=60.0))
    task = create_task(relay.run())
    await wait_for(begun.wait(), 20.0)
    task.cancel() if cancelled else relay.stop()
    with suppress(CancelledError):
        await wait_for(task, 10.0)
    assert database.pending == 2
    assert database.rows("SELECT count(*) FROM retryproof_outbox_relays") == [(1,)], "its lease has to run out"


async def test_t6_a_message_that_was_passed_over_backs_off_each_time(database: Database) -> None:
    database.send("k")
    publisher = Noting(lambda message: "no")
    policy = replace(QUICK, on_failure="pass", max_attempts=100, backoff=1_000.0, max_backoff=1_000.0)
    relay = Relay(database.url, publisher, policy=policy)
    await relay.run_once()
    database.execute("UPDATE retryproof_outbox_blocked SET due_at = 0")
    await relay.run_until_idle()
    assert len(publisher.tried) == 2
    ((due_at,),) = database.rows("SELECT due_at FROM retryproof_outbox_blocked")
    assert due_at > 0


async def test_t6_a_function_that_raises_a_cancellation_has_failed(database: Database) -> None:
    database.send("bad", "good")

    async def cancelled(message: Message) -> None:
        if message.key == "bad":
            raise CancelledError

    relay = Relay(database.url, cancelled, policy=replace(QUICK, max_attempts=2))
    await until_empty(relay)
    assert (relay.totals.delivered, relay.totals.failed, relay.totals.dead) == (1, 1, 1)
    await relay.aclose()


async def test_t7_a_finish_that_commits_after_its_time_out_leaves_no_key_held_back(
    postgres_url: str, unique: str
) -> None:
    """As where the commit waits for a replica: the next finish must not see the rows as they were before."""
    migrate(f"{postgres_url}?schema={unique}")
    database = Database(f"{postgres_url}?schema={unique}")
    database.send("slow", "good")
    answer = Event()

    async def hang(message: Message) -> None:
        if message.key == "slow":
            await answer.wait()

    relay = Relay(database.url, hang, policy=replace(PATIENT, listen=False))
    member = await relay._joined()
    perform, finish = relay._opened().perform, member.finish
    connection = await asyncpg.connect(postgres_url, server_settings={"search_path": unique})
    transaction = connection.transaction()

    async def execute(statement: Statement) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await connection.fetch(statement.sql, *statement.parameters)]

    async def stalled(plan: Callable[[], Plan[Any]]) -> Any:
        await transaction.start()
        await apump(plan(), execute)
        raise StoreUnavailable("no answer")

    async def first(*args: Any, **options: Any) -> None:
        member.finish = finish  # type: ignore[method-assign] # what it was
        relay._opened().perform = stalled  # type: ignore[method-assign] # the real statement, its commit held up
        try:
            await finish(*args, **options)
        finally:
            relay._opened().perform = perform  # type: ignore[method-assign] # what it was
            answer.set()

    member.finish = first  # type: ignore[method-assign] # the real one, once over a connection that stalls
    waiting = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
        "AND query LIKE '%retryproof_outbox_relays%'"
    )
    async with running(relay):
        await until(lambda: database.rows(waiting))
        await transaction.commit()
        await until(lambda: database.pending == 0)
        assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []
        database.send("slow")
        await until(lambda: relay.totals.delivered == 3)
    await connection.close()


def left_by_a_dead_relay(database: Database, message: Message, deaths: int) -> None:
    """Mark it as one that is to be tried alone."""
    database.execute(f"UPDATE retryproof_outbox SET parked = (1 = 1), alone = (1 = 1), deaths = {deaths}")
    database.execute(
        "INSERT INTO retryproof_outbox_blocked (partition, chain, due_at, alone) "
        "SELECT partition, chain, 0, (1 = 1) FROM retryproof_outbox"
    )


async def test_c15_a_claim_without_an_answer_counts_no_attempt(database: Database) -> None:
    (message,) = database.send("k")
    left_by_a_dead_relay(database, message, 0)
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=replace(QUICK, max_deaths=2))
    member = await relay._joined()
    perform, failures = relay._opened().perform, 5

    async def lossy(plan: Callable[[], Plan[Any]]) -> Any:
        nonlocal failures
        result = await perform(plan)
        if isinstance(result, ClaimedBatch) and failures:
            failures -= 1
            raise StoreUnavailable("the answer was lost")
        return result

    relay._opened().perform = lossy  # type: ignore[method-assign] # the real one, over a connection that loses answers
    while failures:
        with pytest.raises(StoreUnavailable):
            await relay.run_once()
    await until_empty(relay)
    assert relay._member is member
    assert [(m.attempts, m.deaths) for m in publisher.published] == [(0, 0)]
    await relay.aclose()


async def test_c15_what_died_beside_others_has_its_last_attempt_with_nothing_beside_it(database: Database) -> None:
    (message,) = database.send("slow")
    left_by_a_dead_relay(database, message, 1)
    database.send("other")
    events: list[str] = []

    async def note(message: Message) -> None:
        events.append(f"{message.key} begins")
        await sleep(0.5 if message.key == "slow" else 0.0)
        events.append(f"{message.key} ends")

    relay = Relay(database.url, note, policy=replace(PATIENT, max_deaths=2))
    await relay.run_until_idle()
    assert events == ["slow begins", "slow ends", "other begins", "other ends"]
    assert relay.totals.delivered == 2


async def test_t6_what_is_done_of_a_batch_with_a_slow_message_is_let_go(database: Database) -> None:
    database.send("slow", *(f"k{number}" for number in range(50)))
    answer = Event()
    batches: list[Batch] = []

    class Watched(FunctionPublisher):
        async def publish(self, batch: Batch) -> Sequence[Outcome]:
            batches.append(batch)
            return await super().publish(batch)

    async def hang(message: Message) -> None:
        if message.key == "slow":
            await answer.wait()

    relay = Relay(database.url, Watched(hang), policy=PATIENT)
    while database.pending > 1:
        await relay.run_once()
    kept = [message.payload for batch in batches for message in batch.messages if message.payload]
    assert kept == [b"slow:0"]
    assert [message.payload for message in relay._in_flight.messages()] == [b"slow:0"]
    answer.set()
    await relay.run_until_idle()
    assert database.pending == 0


@pytest.mark.quiet
async def test_t6_a_few_slow_keys_among_many_cost_the_others_little(database: Database) -> None:
    """One key in fifty hangs, so that each batch has some; with the whole patience for each it would take 40 s."""
    database.send(*(f"slow{number}" if number % 50 == 0 else f"k{number}" for number in range(2_000)))
    answer = Event()
    quick = 0

    async def hang(message: Message) -> None:
        nonlocal quick
        if str(message.key).startswith("slow"):
            await answer.wait()
        else:
            quick += 1

    relay = Relay(database.url, hang, policy=replace(QUICK, patience=1.0, batch=50))
    began = monotonic()
    async with running(relay):
        await until(lambda: quick == 1_960)
        assert monotonic() - began < 12.0
        answer.set()
        await until(lambda: database.pending == 0)
    assert relay.totals.delivered == 2_000


def test_t6_a_receiver_that_is_slow_for_all_is_given_time_for_the_rest_of_a_batch() -> None:
    pace = Pace(1.0, others=100)
    assert pace.left(0) > 0.9
    pace._begun -= 0.4  # the first answers take that long
    pace.until -= 0.4
    assert 0.5 < pace.left(10) <= 0.6
    assert Pace(1.0, others=0).left(50) > 0.9
    quick = Pace(1.0, others=3)
    assert 0.2 < quick.left(50) <= 0.25


async def test_t6_a_publisher_that_hangs_with_its_batch_has_the_drain_time(database: Database) -> None:
    database.send("a", "a", "b")
    begun = Event()

    class Hanging(Noting):
        async def publish(self, batch: Batch) -> Sequence[Outcome]:
            begun.set()
            await Event().wait()
            return []

    relay = Relay(database.url, Hanging(), policy=replace(PATIENT, drain=0.2, lease=0.5))
    task = create_task(relay.run())
    await wait_for(begun.wait(), 20.0)
    relay.stop()
    await wait_for(task, 10.0)
    assert database.pending == 3
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    assert [payload for payload in publisher.payloads if payload[0] == "a"] == ["a:0", "a:1"]
    assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []
    await relay.aclose()


@pytest.mark.parametrize("passing", ["block", "pass"])
async def test_t6_a_slow_message_that_fails_in_the_end_leaves_nothing_held_back(
    database: Database, passing: Any
) -> None:
    bad, *_ = database.send("slow", "slow", "slow", "good")
    answer = Event()
    sent: list[bytes] = []

    async def hang(message: Message) -> None:
        if message.id == bad.id and message.attempts < 2:
            await answer.wait()
            raise ValueError("no")
        sent.append(message.payload)

    relay = Relay(database.url, hang, policy=replace(PATIENT, on_failure=passing, listen=False))
    async with running(relay):
        await until(lambda: database.pending == 3)
        answer.set()
        await until(lambda: database.pending == 0)
    assert sorted(sent[1:]) == [b"slow:0", b"slow:1", b"slow:2"]
    assert passing == "pass" or sent[1:] == [b"slow:0", b"slow:1", b"slow:2"]
    assert database.rows("SELECT * FROM retryproof_outbox_blocked") == []
