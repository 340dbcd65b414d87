"""Transactional mode and its refusals on Django's connection."""

import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from retryproof import Idempotency, current_operation, errors
from retryproof.transaction import Outbox
from tests.stores.engines import alias
from tests.transaction.support import Database, insert


@pytest.fixture
def connection(database: Database) -> Iterator[Any]:
    """The connection of an alias that leads to the database."""
    from django.db import connections  # type: ignore[import-untyped]  # Django has no types of its own

    parts = urlsplit(database.store)
    given: dict[str, Any] = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(database.path)}
    if database.postgres:
        given = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts.path[1:],
            "USER": parts.username,
            "HOST": parts.hostname,
            "PORT": parts.port,
        }
    for name in alias(**given):
        yield connections[name]


def test_t1_work_and_result_commit_together(database: Database, connection: Any) -> None:
    from retryproof.transaction.django import transaction

    said: list[str] = []

    def charge() -> str:
        from django.db import transaction as of_django

        own = current_operation().transaction(transaction(connection.alias))
        with of_django.atomic(using=connection.alias), own.cursor() as cursor:
            cursor.execute(insert(1))
            of_django.on_commit(lambda: said.append("committed"), using=connection.alias)
        assert (database.charges(), said) == ([], [])
        return "charged"

    with Idempotency(database.store) as engine:
        assert [engine.run("k", charge, scope="s").replayed for _ in range(2)] == [False, True]
    assert (database.charges(), said) == ([1], ["committed"])
    assert connection.get_autocommit()


def test_t1_what_raises_rolls_back(database: Database, connection: Any) -> None:
    from retryproof.transaction.django import transaction

    def charge() -> None:
        with current_operation().transaction(transaction(connection.alias)).cursor() as cursor:
            cursor.execute(insert(1))
        raise ValueError("refused")

    with Idempotency(database.store) as engine, pytest.raises(ValueError, match="refused"):
        engine.run("k", charge, scope="s")
    assert database.charges() == []
    assert connection.get_autocommit()


def test_t1_a_commit_of_the_handlers_own_leaves_an_unknown_outcome(database: Database, connection: Any) -> None:
    from retryproof.transaction.django import transaction

    def charge() -> None:
        own = current_operation().transaction(transaction(connection.alias))
        with own.cursor() as cursor:
            cursor.execute(insert(1))
        own.commit()

    with Idempotency(database.store) as engine:
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", charge, scope="s")
        database.execute("UPDATE retryproof_operations SET lease_until = 0")
        with pytest.raises(errors.OutcomeUnknown, match="committed without its result"):
            engine.run("k", charge, scope="s")
    assert database.charges() == [1]


def test_t1_a_nested_operation_on_the_connection_underneath_is_refused(database: Database, connection: Any) -> None:
    from retryproof.transaction.django import transaction

    def inner() -> None:
        current_operation().transaction(connection.connection)

    def outer() -> str:
        current_operation().transaction(transaction(connection.alias))
        if database.postgres:  # on SQLite nothing can be claimed beside a transaction that writes
            with pytest.raises(errors.ConfigurationError, match="connection of its own"):
                engine.run("inner", inner, scope="s")
        return "charged"

    with Idempotency(database.store) as engine:
        assert engine.run("outer", outer, scope="s").value == "charged"


def test_autocommit_and_atomic_blocks_are_refused(database: Database, connection: Any) -> None:
    from django.db import transaction

    def refusal() -> str:
        def charge() -> None:
            current_operation().transaction(connection)

        with Idempotency(database.store) as engine, pytest.raises(errors.ConfigurationError) as caught:
            engine.run(uuid.uuid4().hex, charge, scope="s")
        return caught.value.message

    assert "autocommit" in refusal()
    if database.postgres:  # on SQLite nothing can be claimed beside a transaction that writes
        with transaction.atomic(using=connection.alias):
            assert "commits by itself" in refusal()
            with transaction.atomic(using=connection.alias):
                assert "savepoint" in refusal()


def test_t5_messages_are_added_in_djangos_transaction(connection: Any) -> None:
    from django.db import transaction as of_django

    outbox = Outbox()
    with of_django.atomic(using=connection.alias):
        outbox.add(connection, topic="t", payload=b"1")
        outbox.add_many(connection, [outbox.message("t", b"2"), outbox.message("t", b"3")])
        with pytest.raises(errors.ConfigurationError, match="the database 64"):
            Outbox(partitions=8).add(connection, topic="t", payload=b"")
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM retryproof_outbox")
        assert cursor.fetchone() == (3,)
