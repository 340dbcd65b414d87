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

from retryproof.core.message import Conclusion, Message
from retryproof.stores.sql.migrate import migrate
from retryproof.transaction import Relay
from retryproof.transaction.membership import MOST_OPEN, Membership
from tests.transaction.outboxes import QUICK, Database, Noting

OFTEN = replace(QUICK, lease=0.8)
"""A lease with which a relay looks for open transactions every 0.2 s."""


@pytest.fixture
def database(postgres_url: str, unique: str) -> Database:
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return Database(url)


@contextmanager
def left_open(database: Database, key: str) -> Iterator[tuple[Any, UUID]]:
    """A connection whose transaction has written a message, and the message's id."""
    connection = database.connect()
    try:
        yield connection, database.outbox.add(connection, topic="t", payload=b"", key=key)
    finally:
        connection.close()


async def looked_twice(member: Membership, database: Database) -> None:
    """What is open now is open for long; a later transaction has to end for a snapshot to show it."""
    database.send("later")
    await member._look()
    await member._look()


async def passed(member: Membership) -> list[Message]:
    """All that is there, taken and done."""
    messages: list[Message] = []
    while claimed := await member.claim():
        messages += claimed
        await member.finish(Conclusion(done=claimed), all_done=True)
    return messages


async def test_t6_a_transaction_that_is_open_for_long_does_not_hold_the_floors_back(database: Database) -> None:
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    with left_open(database, "k") as (connection, late):
        await looked_twice(member, database)
        (xid,) = member._open
        sent = database.send(*(f"k{number}" for number in range(300)))
        assert {message.id for message in sent} <= {message.id for message in await passed(member)}
        assert min(floor for floor in member._floors.values() if floor) > xid
        assert await passed(member) == []
        connection.commit()
        assert [message.id for message in await passed(member)] == [late]
    await relay.aclose()


async def test_t6_what_is_found_below_the_floors_waits_for_no_further_look(database: Database) -> None:
    """One that is over frees the floors of all partitions, also of those that a claim did not come to."""
    relay = Relay(database.url, Noting(), policy=replace(QUICK, batch=8))
    member = await relay._joined()
    await member.balance()
    with left_open(database, "a") as (first, a), left_open(database, "b") as (second, b):
        await looked_twice(member, database)
        database.send(*(f"k{number}" for number in range(300)))
        await passed(member)
        database.send(*(f"k{number}" for number in range(300)))
        first.commit()
        assert a in {message.id for message in await passed(member)}
        second.commit()
        assert b in {message.id for message in await passed(member)}
    await relay.aclose()


async def test_t6_a_look_after_the_end_of_a_transaction_leaves_nothing_behind(database: Database) -> None:
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    with left_open(database, "k") as (connection, late):
        await looked_twice(member, database)
        database.send(*(f"k{number}" for number in range(300)))
        await passed(member)
        connection.commit()
        await member._look()
        assert [message.id for message in await passed(member)] == [late]
    await relay.aclose()


async def test_t6_more_transactions_than_are_asked_after_hold_the_floors_back(database: Database) -> None:
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    connections = [database.connect() for _ in range(MOST_OPEN + 2)]
    late = [database.outbox.add(connection, topic="t", payload=b"") for connection in connections]
    await looked_twice(member, database)
    database.send(*(f"k{number}" for number in range(100)))
    await passed(member)
    found: set[UUID] = set()
    for connection in connections:
        connection.commit()
        found |= {message.id for message in await passed(member)}
        connection.close()
    assert found == set(late)
    await relay.aclose()


async def until_published(publisher: Noting, sent: set[UUID]) -> None:
    """The test's time-out ends it where something is left."""
    while not sent <= {message.id for message in publisher.published}:  # noqa: ASYNC110  # a publisher tells nobody
        await asyncio.sleep(0.01)


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
