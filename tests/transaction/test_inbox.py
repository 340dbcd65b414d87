"""A message takes effect once, in the consumer's own transaction (T4)."""

import contextlib
import threading
from typing import Any

import asyncpg
import psycopg
import pytest

from retryproof import errors
from retryproof.transaction import Inbox, Outbox
from tests.transaction.support import WAITING, Database, insert, transaction

pytestmark = pytest.mark.timeout(60)


INBOX = Inbox("billing")


def test_t4_a_duplicate_does_not_run_and_gets_what_the_first_came_to(database: Database) -> None:
    sent = [Outbox().message("invoices", b"7", key="customer 1", headers={"a": "b"})]
    given: Any = {"source": "orders", "message_id": "1", "payload": b"p"}
    with transaction(database) as connection:
        first = INBOX.receive(connection, **given)
        connection.execute(insert(1))
        INBOX.keep(connection, first, result=b"", outgoing=sent)
    with transaction(database) as connection:
        second = INBOX.receive(connection, **given)
    assert (first.status, second.status, second.result) == ("fresh", "duplicate", b"")
    assert second.outgoing == sent


def test_t4_what_rolls_back_was_not_taken(database: Database) -> None:
    for expected in ("fresh", "fresh"):
        with contextlib.suppress(ZeroDivisionError), transaction(database) as connection:
            assert INBOX.receive(connection, source="s", message_id="1", payload=b"").status == expected
            raise ZeroDivisionError


def test_t4_the_same_id_with_another_payload_is_a_dead_letter(database: Database) -> None:
    with transaction(database) as connection:
        answers = INBOX.receive_many(connection, "s", [("1", b"a"), ("1", b"b"), ("1", b"a"), ("2", b"b")])
    assert [answer.status for answer in answers] == ["fresh", "dead", "duplicate", "fresh"]
    with transaction(database) as connection:
        assert INBOX.receive(connection, source="s", message_id="2", payload=b"c").status == "dead"
        letters = INBOX.dead(connection)
        assert [(letter.message_id, letter.payload) for letter in letters] == [("1", b"b"), ("2", b"c")]
        assert "another payload" in letters[0].reason
        assert [INBOX.drop(connection, letters[0]) for _ in range(2)] == [True, False]


def test_consumers_and_sources_are_apart(database: Database) -> None:
    with transaction(database) as connection:
        for inbox, source in ((INBOX, "a"), (INBOX, "b"), (Inbox("other"), "a"), (Inbox("billinga"), "")):
            assert inbox.receive(connection, source=source, message_id="1", payload=b"").fresh


def test_t4_a_batch_falls_back_to_single_messages(database: Database) -> None:
    def handle(connection: Any, message: tuple[str, bytes]) -> None:
        connection.execute(insert(int(message[0])))
        if message[1] == b"poison":
            raise ValueError("poison")

    messages = [("1", b""), ("2", b"poison"), ("3", b"")]
    answers = INBOX.process(lambda: transaction(database), "s", messages, handle)
    assert [getattr(answer, "status", "failed") for answer in answers] == ["fresh", "failed", "fresh"]
    assert database.charges() == [1, 3]


def test_purging_is_bounded_and_forgets_the_old(database: Database) -> None:
    with transaction(database) as connection:
        INBOX.receive_many(connection, "s", [(str(number), b"") for number in range(5)])
    with transaction(database) as connection:
        assert INBOX.purge(connection, older_than=60) == 0
        assert [INBOX.purge(connection, older_than=-60, limit=3) for _ in range(3)] == [3, 2, 0]


def test_a_rival_is_waited_for(postgres: Database) -> None:
    got: list[str] = []

    def rival() -> None:
        with transaction(postgres) as other:
            got.append(INBOX.receive(other, source="s", message_id="1", payload=b"").status)

    thread = threading.Thread(target=rival)
    with transaction(postgres) as connection:
        assert INBOX.receive(connection, source="s", message_id="1", payload=b"").fresh
        thread.start()
        with postgres.connect() as watcher:
            while not watcher.execute(WAITING).fetchone()[0]:
                assert thread.is_alive()
        assert got == []
    thread.join(10)
    assert got == ["duplicate"]


def test_batches_in_opposite_orders_do_not_deadlock(postgres: Database) -> None:
    messages = [(str(number), b"") for number in range(200)]
    fresh: list[int] = []

    def take(order: list[tuple[str, bytes]]) -> None:
        with transaction(postgres) as connection:
            fresh.append(sum(answer.fresh for answer in INBOX.receive_many(connection, "s", order)))

    threads = [threading.Thread(target=take, args=(messages[::step],)) for step in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(fresh) == [0, 0, 0, 200]


async def test_the_same_on_an_event_loop(postgres: Database) -> None:
    connection = await asyncpg.connect(postgres.store)
    async with connection.transaction():
        first = await INBOX.areceive(connection, source="s", message_id="1", payload=b"")
        await INBOX.akeep(connection, first, result=b"kept")
        second = await INBOX.areceive(connection, source="s", message_id="1", payload=b"")
    assert (first.status, second.status, second.result) == ("fresh", "duplicate", b"kept")
    await connection.close()


async def test_t4_dead_letters_on_an_event_loop(postgres: Database) -> None:
    connection = await asyncpg.connect(postgres.store)
    async with connection.transaction():
        await INBOX.areceive_many(connection, "s", [("1", b"a"), ("1", b"b"), ("1", b"c"), ("1", b"d")])
        letters = await INBOX.adead(connection)
        assert {letter.payload for letter in letters} == {b"b", b"c", b"d"}
        assert [await INBOX.adrop(connection, letters[0]) for _ in range(2)] == [True, False]
        assert await INBOX.apurge_dead(connection, older_than=60) == 0
        assert [await INBOX.apurge_dead(connection, older_than=-60, limit=1) for _ in range(3)] == [1, 1, 0]
        assert await INBOX.apurge(connection, older_than=-60) == 1
        with pytest.raises(errors.ConfigurationError, match="awaited"):
            INBOX.dead(connection)
    await connection.close()


def test_t4_dead_letters_are_purged_apart_from_messages(database: Database) -> None:
    with transaction(database) as connection:
        INBOX.receive_many(connection, "s", [("1", b"a"), *(("1", str(number).encode()) for number in range(5))])
    with transaction(database) as connection:
        assert INBOX.purge_dead(connection, older_than=60) == 0
        assert [INBOX.purge_dead(connection, older_than=-60, limit=3) for _ in range(3)] == [3, 2, 0]
        assert INBOX.receive(connection, source="s", message_id="1", payload=b"a").status == "duplicate"


def test_t4_a_pipeline_is_refused_and_takes_nothing(postgres: Database) -> None:
    """psycopg answers later in one: nobody would know that a message is fresh, and it would be taken all the same."""
    with psycopg.connect(postgres.store) as connection:
        with connection.pipeline(), pytest.raises(errors.ConfigurationError, match="pipeline"):
            INBOX.receive(connection, source="s", message_id="1", payload=b"")
        connection.commit()
        assert INBOX.receive(connection, source="s", message_id="1", payload=b"").fresh


async def test_t4_a_pipeline_is_refused_on_an_event_loop(postgres: Database) -> None:
    async with await psycopg.AsyncConnection.connect(postgres.store) as connection:
        async with connection.pipeline():
            with pytest.raises(errors.ConfigurationError, match="pipeline"):
                await INBOX.areceive(connection, source="s", message_id="1", payload=b"")
        await connection.commit()
        assert (await INBOX.areceive(connection, source="s", message_id="1", payload=b"")).fresh


def test_autocommit_and_missing_tables_are_refused(postgres: Database, postgres_url: str) -> None:
    with postgres.connect() as connection, pytest.raises(errors.ConfigurationError, match="autocommit"):
        INBOX.receive(connection, source="s", message_id="1", payload=b"")
    elsewhere = Inbox("billing", schema="nowhere")
    with psycopg.connect(postgres.store) as open_one, pytest.raises(errors.ConfigurationError, match="migrate"):
        elsewhere.receive(open_one, source="s", message_id="1", payload=b"")
