"""What a relay must live through: backlogs behind one key, cancellation, lost answers, receivers that fail oddly."""

import threading
from asyncio import CancelledError, Event, create_task, get_running_loop, wait_for
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest

from retryproof.core.message import Message
from retryproof.transaction import Relay
from tests.transaction.outboxes import QUICK, Database, Noting, sqlite_url, until_empty
from tests.transaction.test_relay_slow import PATIENT, running, until


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Database:
    if request.param == "sqlite":
        return Database(sqlite_url(tmp_path))
    from retryproof.stores.sql.migrate import migrate

    url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
    migrate(url)
    return Database(url)


def beside(message: Message, database: Database) -> str:
    """Another key of the same partition."""
    keys = (f"beside{number}" for number in range(100_000))
    return next(key for key in keys if database.outbox.message("t", b"", key=key).partition == message.partition)


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
