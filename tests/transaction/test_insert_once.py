"""Upserts where the client knows the id: created or already there, with the row (T8)."""

import threading
from typing import Any

import asyncpg
import psycopg
import pytest

from retryproof import errors
from retryproof.transaction import ainsert_once, insert_once
from tests.transaction.support import Database, transaction

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def orders(database: Database) -> Database:
    database.execute('CREATE TABLE "or""ders" (id text PRIMARY KEY, amount integer, note text DEFAULT \'none\')')
    return database


def test_t8_created_or_already_there_with_the_row(orders: Database) -> None:
    answers: list[Any] = []
    for amount in (5, 6):
        with transaction(orders) as connection:
            given = {"id": "a", "amount": amount}
            answers.append(insert_once(connection, 'or"ders', given, key=("id",), returning=("id", "amount", "note")))
    row = {"id": "a", "amount": 5, "note": "none"}
    assert [(answer.created, answer.row) for answer in answers] == [(True, row), (False, row)]


def test_t8_of_many_at_once_one_creates(postgres: Database) -> None:
    postgres.execute("CREATE TABLE orders (id integer PRIMARY KEY, amount integer)")
    answers: list[Any] = []

    def create(amount: int) -> None:
        with transaction(postgres) as connection:
            answers.append(insert_once(connection, "public.orders", {"id": 1, "amount": amount}, key=("id",)))

    threads = [threading.Thread(target=create, args=(amount,)) for amount in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answer.created for answer in answers) == [False] * 7 + [True]
    assert len({answer.row["amount"] for answer in answers}) == 1


async def test_t8_on_an_event_loop(postgres: Database) -> None:
    postgres.execute("CREATE TABLE orders (id integer PRIMARY KEY)")
    connection = await asyncpg.connect(postgres.store)
    async with connection.transaction():
        answers = [await ainsert_once(connection, "orders", {"id": 1}, key=("id",)) for _ in range(2)]
        with pytest.raises(errors.ConfigurationError, match="awaited"):
            insert_once(connection, "orders", {"id": 1}, key=("id",))
    await connection.close()
    assert [answer.created for answer in answers] == [True, False]


@pytest.mark.parametrize("key", [(), "id", ("other",)])
def test_a_key_without_a_value_is_refused(orders: Database, key: Any) -> None:
    with transaction(orders) as connection, pytest.raises(errors.ConfigurationError, match="must name columns"):
        insert_once(connection, 'or"ders', {"id": "a"}, key=key)


def test_another_unique_key_is_an_error(postgres: Database) -> None:
    postgres.execute("CREATE TABLE orders (id integer PRIMARY KEY, other integer UNIQUE)")
    with transaction(postgres) as connection:
        insert_once(connection, "orders", {"id": 1, "other": 1}, key=("id",))
        with pytest.raises(psycopg.errors.UniqueViolation):
            insert_once(connection, "orders", {"id": 2, "other": 1}, key=("id",))
        connection.rollback()
