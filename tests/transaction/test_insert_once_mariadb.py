"""insert_once on MariaDB, through the libraries that people use: created or already there, with the row (T8)."""

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncmy
import mysql.connector
import pymysql
import pytest
from mysql.connector.pooling import MySQLConnectionPool
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from retryproof import errors
from retryproof.transaction import ainsert_once, insert_once

pytestmark = pytest.mark.timeout(60)

Connect = Callable[..., Any]


def address(url: str) -> dict[str, Any]:
    """A URL as the libraries' keywords."""
    parts = urlsplit(url)
    return {
        "host": parts.hostname,
        "port": parts.port or 3306,
        "user": unquote(parts.username or "root"),
        "password": unquote(parts.password or ""),
        "database": parts.path.strip("/"),
    }


@pytest.fixture
def connect(mariadb_url: str) -> Iterator[Connect]:
    """Opens PyMySQL connections, closed at the end; autocommit is off unless asked for."""
    with contextlib.ExitStack() as opened:

        def open_one(**options: Any) -> Any:
            return opened.enter_context(contextlib.closing(pymysql.connect(**address(mariadb_url), **options)))

        yield open_one


@pytest.fixture
def orders(connect: Connect, unique: str) -> str:
    """A table of this test's own: id, amount, a note with a default, and a second unique column."""
    run(
        connect(),
        f"CREATE TABLE {unique} (id varchar(20) PRIMARY KEY, amount integer, note varchar(10) DEFAULT 'none', "
        "reference integer UNIQUE) ENGINE=InnoDB",
    )
    return unique


def run(connection: Any, sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


@contextlib.contextmanager
def transaction(library: str, url: str) -> Iterator[Any]:
    """A connection of a library, committed at the end."""
    match library:
        case "pymysql":
            with pymysql.connect(**address(url)) as connection:
                yield connection
                connection.commit()
        case "pymysql with dictionaries":
            with pymysql.connect(**address(url), cursorclass=pymysql.cursors.DictCursor) as connection:
                yield connection
                connection.commit()
        case "connector":
            with contextlib.closing(mysql.connector.connect(**address(url), use_pure=True)) as connector:
                yield connector
                connector.commit()
        case "connector's pool":
            pool = MySQLConnectionPool(pool_size=1, pool_reset_session=False, use_pure=True, **address(url))
            with pool.get_connection() as lent:
                yield lent
                lent.commit()
            pool._remove_connections()
        case _:
            engine = create_engine(make_url(url).set(drivername="mysql+pymysql"))
            with Session(engine) if library == "session" else engine.connect() as connection_or_session:
                yield connection_or_session
                connection_or_session.commit()
            engine.dispose()


LIBRARIES = ["pymysql", "pymysql with dictionaries", "connector", "connector's pool", "session", "sqlalchemy"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_t8_on_mariadb_created_or_already_there_with_the_row(library: str, orders: str, mariadb_url: str) -> None:
    answers: list[Any] = []
    for amount in (5, 6):
        with transaction(library, mariadb_url) as connection:
            given = {"id": "a%b?", "amount": amount}
            answers.append(insert_once(connection, orders, given, key=("id",), returning=("id", "amount", "note")))
    row = {"id": "a%b?", "amount": 5, "note": "none"}
    assert [(answer.created, answer.row) for answer in answers] == [(True, row), (False, row)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_t8_on_mariadb_another_unique_key_is_an_error(library: str, orders: str, mariadb_url: str) -> None:
    violation = (pymysql.err.IntegrityError, mysql.connector.IntegrityError, IntegrityError)
    with transaction(library, mariadb_url) as connection:
        insert_once(connection, orders, {"id": "a", "reference": 1}, key=("id",))
        with pytest.raises(violation, match="Duplicate entry '1' for key 'reference'"):
            insert_once(connection, orders, {"id": "b", "reference": 1}, key=("id",))
        again = insert_once(connection, orders, {"id": "a", "reference": 1}, key=("id",))
    assert again.created is False


@pytest.mark.parametrize("library", ["asyncmy", "sqlalchemy"])
async def test_t8_on_mariadb_on_an_event_loop(library: str, orders: str, mariadb_url: str) -> None:
    answers = []
    for amount in (5, 6):
        async with loop_transaction(library, mariadb_url) as connection:
            answers.append(await ainsert_once(connection, orders, {"id": "a", "amount": amount}, key=("id",)))
            with pytest.raises(errors.ConfigurationError, match="awaited"):
                insert_once(connection, orders, {"id": "a"}, key=("id",))
    row = {"id": "a", "amount": 5}
    assert [(answer.created, answer.row) for answer in answers] == [(True, row), (False, row)]


@contextlib.asynccontextmanager
async def loop_transaction(library: str, url: str) -> AsyncIterator[Any]:
    if library == "asyncmy":
        connection = await asyncmy.connect(
            **{key: value for key, value in address(url).items() if key != "database"}, db=address(url)["database"]
        )
        yield connection
        await connection.commit()
        await connection.ensure_closed()
    else:
        engine = create_async_engine(make_url(url).set(drivername="mysql+asyncmy"))
        async with engine.begin() as begun:
            yield begun
        await engine.dispose()


async def test_on_mariadb_an_autocommit_loop_connection_is_refused(orders: str, mariadb_url: str) -> None:
    async with loop_transaction("asyncmy", mariadb_url) as connection:
        await connection.autocommit(True)
        with pytest.raises(errors.ConfigurationError, match="autocommit"):
            await ainsert_once(connection, orders, {"id": "a"}, key=("id",))
        await connection.begin()
        assert (await ainsert_once(connection, orders, {"id": "a"}, key=("id",))).created


def test_t8_on_mariadb_of_fifty_at_once_one_creates_and_all_have_its_row(orders: str, mariadb_url: str) -> None:
    answers: list[Any] = []
    together = threading.Barrier(50)

    def create(amount: int) -> None:
        with transaction("pymysql", mariadb_url) as connection:
            run(connection, "SELECT 1 FROM DUAL")
            together.wait(30)
            answers.append(insert_once(connection, orders, {"id": "a", "amount": amount}, key=("id",)))

    threads = [threading.Thread(target=create, args=(amount,)) for amount in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answer.created for answer in answers) == [False] * 49 + [True]
    (creator,) = [answer for answer in answers if answer.created]
    assert [answer.row for answer in answers] == [creator.row] * 50


def test_t8_on_mariadb_an_earlier_snapshot_sees_the_winners_row(orders: str, connect: Connect) -> None:
    early, winner = connect(), connect()
    assert run(early, "SELECT @@tx_isolation") == (("REPEATABLE-READ",),)
    assert run(early, f"SELECT * FROM {orders}") == ()  # takes the snapshot
    insert_once(winner, orders, {"id": "a", "amount": 5}, key=("id",))
    winner.commit()
    assert run(early, f"SELECT * FROM {orders}") == ()
    answer = insert_once(early, orders, {"id": "a", "amount": 6}, key=("id",))
    assert (answer.created, answer.row) == (False, {"id": "a", "amount": 5})


def test_on_mariadb_a_strict_snapshot_says_so_instead_of_hiding_the_row(orders: str, connect: Connect) -> None:
    early, winner = connect(), connect()
    run(early, "SET SESSION innodb_snapshot_isolation = ON")  # MariaDB's default from 11.6.2 on
    run(early, f"SELECT * FROM {orders}")
    insert_once(winner, orders, {"id": "a", "amount": 5}, key=("id",))
    winner.commit()
    with pytest.raises(pymysql.err.OperationalError, match="Record has changed"):
        insert_once(early, orders, {"id": "a", "amount": 6}, key=("id",))
    early.rollback()
    assert insert_once(early, orders, {"id": "a", "amount": 6}, key=("id",)).row["amount"] == 5


def test_on_mariadb_what_rolls_back_was_not_created(orders: str, connect: Connect) -> None:
    first, second = connect(), connect()
    assert insert_once(first, orders, {"id": "a", "amount": 5}, key=("id",)).created
    first.rollback()
    answer = insert_once(second, orders, {"id": "a", "amount": 6}, key=("id",))
    assert (answer.created, answer.row["amount"]) == (True, 6)


def test_t8_on_mariadb_a_creator_that_rolls_back_leaves_one_other_to_create(orders: str, connect: Connect) -> None:
    first, looking = connect(), connect(autocommit=True)
    insert_once(first, orders, {"id": "a", "amount": 0}, key=("id",))
    answers: list[Any] = []

    def create(amount: int) -> None:
        connection = connect()
        with contextlib.suppress(pymysql.err.OperationalError):  # InnoDB's deadlock: to be tried again
            answers.append(insert_once(connection, orders, {"id": "a", "amount": amount}, key=("id",)))
        connection.commit()

    threads = [threading.Thread(target=create, args=(amount,)) for amount in range(1, 6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        waiting = f"SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'INSERT INTO `{orders}`%'"
        if run(looking, waiting)[0][0] == len(threads):
            break
    first.rollback()
    for thread in threads:
        thread.join(20)
    (amount,) = run(looking, f"SELECT amount FROM {orders}")[0]
    assert [answer.row["amount"] for answer in answers if answer.created] == [amount]
    assert {answer.row["amount"] for answer in answers} == {amount}


def test_on_mariadb_autocommit_is_refused_before_anything_is_written(orders: str, connect: Connect) -> None:
    connection = connect(autocommit=True)
    with pytest.raises(errors.ConfigurationError, match="autocommit"):
        insert_once(connection, orders, {"id": "a"}, key=("id",))
    assert run(connection, f"SELECT * FROM {orders}") == ()
    connection.begin()
    assert insert_once(connection, orders, {"id": "a"}, key=("id",)).created


def test_on_mariadb_autocommit_through_mysqls_connector_is_refused(orders: str, mariadb_url: str) -> None:
    with transaction("connector", mariadb_url) as connection:
        connection.autocommit = True
        with pytest.raises(errors.ConfigurationError, match="autocommit"):
            insert_once(connection, orders, {"id": "a"}, key=("id",))
        connection.start_transaction()
        assert insert_once(connection, orders, {"id": "a"}, key=("id",)).created


def test_on_mariadb_a_transaction_that_a_deadlock_ended_is_refused(orders: str, connect: Connect) -> None:
    with contextlib.ExitStack() as ended:
        first, second = connect(autocommit=True), connect(autocommit=True)
        run(first, f"INSERT INTO {orders} (id, amount) VALUES ('a', 1), ('b', 1)")
        for connection, row in ((first, "a"), (second, "b")):
            connection.begin()
            run(connection, f"UPDATE {orders} SET amount = 2 WHERE id = '{row}'")
        # InnoDB ends the transaction that changed least, or the last to wait; make it the second.
        run(first, f"INSERT INTO {orders} (id) VALUES ('c'), ('d'), ('e')")
        waiting = threading.Thread(target=run, args=(first, f"UPDATE {orders} SET amount = 3 WHERE id = 'b'"))
        waiting.start()
        ended.callback(waiting.join, 30)
        with pytest.raises(pymysql.err.OperationalError, match="Deadlock"):
            run(second, f"UPDATE {orders} SET amount = 3 WHERE id = 'a'")
        with pytest.raises(errors.ConfigurationError, match="autocommit"):
            insert_once(second, orders, {"id": "f"}, key=("id",))


def test_on_mariadb_a_closed_connection_is_refused(orders: str, mariadb_url: str) -> None:
    connection = pymysql.connect(**address(mariadb_url))
    connection.close()
    with pytest.raises(errors.ConfigurationError, match="closed"):
        insert_once(connection, orders, {"id": "a"}, key=("id",))


def test_on_mariadb_a_savepoint_is_refused_where_the_library_knows_of_it(orders: str, mariadb_url: str) -> None:
    refused = pytest.raises(errors.ConfigurationError, match="savepoint")
    with transaction("sqlalchemy", mariadb_url) as connection, connection.begin_nested(), refused:
        insert_once(connection, orders, {"id": "a"}, key=("id",))


def test_on_mariadb_a_key_that_is_not_unique_is_found_out_with_its_second_row(orders: str, connect: Connect) -> None:
    connection = connect()
    insert_once(connection, orders, {"id": "a", "amount": 5}, key=("amount",))
    with pytest.raises(errors.ConfigurationError, match="must name a unique key"):
        insert_once(connection, orders, {"id": "b", "amount": 5}, key=("amount",))


def test_on_mariadb_a_key_that_was_cut_when_it_was_stored_is_an_error(orders: str, connect: Connect) -> None:
    connection = connect(sql_mode="")  # outside of strict mode values are cut to fit
    with pytest.raises(errors.ConfigurationError, match="another key than it was given"):
        insert_once(connection, orders, {"id": "a" * 21}, key=("id",))


def test_a_null_is_no_key(orders: str, connect: Connect) -> None:
    with pytest.raises(errors.ConfigurationError, match="columns that have a value"):
        insert_once(connect(), orders, {"id": "a", "reference": None}, key=("reference",))


def test_on_mariadb_any_unique_key_will_do(orders: str, connect: Connect) -> None:
    connection = connect()
    insert_once(connection, orders, {"id": "a", "reference": 7}, key=("reference",))
    answer = insert_once(connection, orders, {"id": "b", "reference": 7}, key=("reference",))
    assert (answer.created, answer.row["id"]) == (False, "a")
