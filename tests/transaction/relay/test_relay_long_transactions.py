"""Relays beside transactions that are open for long, on PostgreSQL: nothing is left behind, and nothing slows down."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import BatchResult, Message
from retryproof.outbox.membership import Membership
from retryproof.outbox.operator import Operator
from retryproof.publishers import Failed
from retryproof.transaction import Relay
from tests.transaction.outboxes import QUICK, Database, Noting, until_empty, until_published

OFTEN = replace(QUICK, lease=0.8)
"""A lease with which a relay looks after the others, and its numbers, every 0.2 s."""
LAST_NUMBER = "SELECT last_value FROM retryproof_outbox_sequence_seq"


@pytest.fixture
def database(postgres_outbox: Database) -> Database:
    return postgres_outbox


@contextmanager
def left_open(database: Database, key: str) -> Iterator[tuple[Any, UUID]]:
    """A connection whose transaction has written a message, and the message's id."""
    connection = database.connect()
    try:
        yield connection, database.outbox.add(connection, topic="t", payload=b"", key=key)
    finally:
        connection.close()


async def passed(member: Membership) -> list[Message]:
    """All that is there, taken and done."""
    messages: list[Message] = []
    while claimed := await member.claim():
        messages += claimed
        await member.finish(BatchResult(done=claimed), all_done=True)
    return messages


async def test_t6_a_transaction_that_is_open_for_long_does_not_hold_the_floors_back(database: Database) -> None:
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    with left_open(database, "k") as (connection, late):
        for _ in range(2):
            sent = database.send(*(f"k{number}" for number in range(300)))
            assert {message.id for message in sent} <= {message.id for message in await passed(member)}
            assert min(member._floors.at.values()) >= max(number for (number,) in database.rows(LAST_NUMBER)) - 300
        assert await passed(member) == []
        connection.commit()
        assert [message.id for message in await passed(member)] == [late]
    await relay.aclose()


async def test_t6_what_is_found_below_the_floors_waits_for_no_further_look(database: Database) -> None:
    """One that is over lowers the floors of all partitions, also of those that a claim did not come to."""
    relay = Relay(database.url, Noting(), policy=replace(QUICK, batch=8))
    member = await relay._joined()
    await member.balance()
    with left_open(database, "a") as (first, a), left_open(database, "b") as (second, b):
        database.send(*(f"k{number}" for number in range(300)))
        await passed(member)
        database.send(*(f"k{number}" for number in range(300)))
        first.commit()
        assert a in {message.id for message in await passed(member)}
        second.commit()
        assert b in {message.id for message in await passed(member)}
    await relay.aclose()


async def test_t6_any_number_of_transactions_may_be_open(database: Database) -> None:
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    connections = [database.connect() for _ in range(24)]
    late = [database.outbox.add(connection, topic="t", payload=b"") for connection in connections]
    database.send(*(f"k{number}" for number in range(100)))
    await passed(member)
    found: list[UUID] = []
    for connection in connections:
        connection.commit()
        found += [message.id for message in await passed(member)]
        connection.close()
    assert found == late
    await relay.aclose()


async def test_t6_what_is_requeued_is_above_the_floors(database: Database) -> None:
    def fails(message: Message) -> Failed | None:
        return Failed("no", permanent=True) if message.key == "bad" else None

    publisher = Noting(fails)
    relay = Relay(database.url, publisher, policy=QUICK)
    bad, *_ = database.send("bad", *(f"k{number}" for number in range(300)))
    await until_empty(relay)
    publisher.fails = lambda message: None
    operator = Operator(database.url)
    assert await operator.requeue([bad.id]) == 1
    await operator.aclose()
    await until_empty(relay)
    assert publisher.published[-1].id == bad.id
    await relay.aclose()


async def test_t6_floors_do_not_outlive_the_start_of_a_server(database: Database) -> None:
    """A promoted server may not have what was seen last, and draws its numbers again."""
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    database.send(*(f"k{number}" for number in range(300)))
    await passed(member)
    database.execute("SELECT setval(pg_get_serial_sequence('retryproof_outbox', 'sequence'), 10)")
    (again,) = database.send("k")
    member._floors.open = {}  # other tests' transactions
    assert await passed(member) == []
    member._floors.server -= 1
    assert [message.id for message in await passed(member)] == [again.id]
    await relay.aclose()


async def test_t6_numbers_that_were_set_back_are_noticed_by_a_relay_at_work(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=OFTEN)
    database.send(*(f"k{number}" for number in range(300)))
    await until_empty(relay)
    database.execute("TRUNCATE retryproof_outbox RESTART IDENTITY")
    (again,) = database.send("k")
    running = asyncio.create_task(relay.run())
    await until_published(publisher, {again.id})
    while "were set back" not in caplog.text:  # noqa: ASYNC110  # nobody is told of a log
        await asyncio.sleep(0.01)
    relay.stop()
    await running


async def test_t6_a_number_below_that_of_a_message_that_waits_stops_a_relay_at_work(database: Database) -> None:
    """Only some rows were set aside: what is added now would overtake them."""
    publisher = Noting(lambda message: Failed("down") if message.key == "waits" else None)
    relay = Relay(database.url, publisher, policy=replace(OFTEN, backoff=10.0, max_backoff=10.0))
    database.send(*(f"k{number}" for number in range(300)), "waits")
    while (await relay.stats()).pending > 1:
        await relay.run_once()
    database.execute("SELECT setval(pg_get_serial_sequence('retryproof_outbox', 'sequence'), 10)")
    with pytest.raises(ConfigurationError, match=r"setval\('.*retryproof_outbox_sequence_seq', 301\)"):
        await relay.run()


@pytest.mark.timeout(60)
async def test_t6_nothing_is_left_below_the_floors_by_writers_of_any_length(database: Database) -> None:
    """One relay throughout: another one would begin at the first message, and hide what this one left."""
    sent: set[UUID] = set()

    def write() -> None:
        connection = database.connect()
        for _ in range(12):
            ids = [database.outbox.add(connection, topic="t", payload=b"", key=f"k{random.randint(0, 40)}")]
            time.sleep(random.choice((0.0, 0.001, 0.01, 0.05, 0.6)))
            ids.append(database.outbox.add(connection, topic="t", payload=b"", key=f"k{random.randint(0, 40)}"))
            connection.commit()
            sent.update(ids)
        connection.close()

    publisher = Noting()
    relay = Relay(database.url, publisher, policy=OFTEN)
    running = asyncio.create_task(relay.run())
    await asyncio.gather(*(asyncio.to_thread(write) for _ in range(20)))
    await until_published(publisher, sent)
    relay.stop()
    await running
    assert {message.id for message in publisher.published} == sent
