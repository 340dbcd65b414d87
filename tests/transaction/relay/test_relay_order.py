"""Strict order on PostgreSQL: sixteen writers, transactions that are held open, a restored cluster."""

import asyncio
import json
import random
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import BatchResult, Message
from retryproof.outbox.operator import Operator
from retryproof.sql.plan import Plan
from retryproof.sql.postgres.doctor import diagnose
from retryproof.sql.postgres.outbox import PostgresOutbox
from retryproof.sql.postgres.url import parse
from retryproof.stores.diagnosis import Verdict
from retryproof.transaction import Outbox, Relay
from tests.transaction.outboxes import QUICK, Database, Noting, sqlite_url, until_empty, until_published

STRICT = replace(QUICK, order="strict")


@pytest.fixture
def database(postgres_outbox: Database) -> Database:
    return postgres_outbox


async def test_t6_strict_order_skips_nothing_under_sixteen_writers(database: Database) -> None:
    """Messages go out in the order of transactions that did not overlap."""
    spans: list[tuple[float, float, list[UUID]]] = []

    def write() -> None:
        connection = database.connect()
        for _ in range(25):
            begun = time.monotonic()
            messages = [database.outbox.message("t", b"") for _ in range(random.randint(1, 3))]
            for message in messages:
                database.outbox.add_many(begin(connection), [message])
                time.sleep(random.uniform(0.0, 0.004))  # so that sequences do not commit in order
            connection.commit()
            spans.append((begun, time.monotonic(), [message.id for message in messages]))
        connection.close()

    publisher = Noting()
    relay = Relay(database.url, publisher, policy=STRICT)
    running = asyncio.create_task(relay.run())
    await asyncio.gather(*(asyncio.to_thread(write) for _ in range(16)))
    relay.stop()
    await running
    rest = Relay(database.url, publisher, policy=STRICT)
    await until_empty(rest)
    await rest.aclose()
    assert len(publisher.published) == sum(len(ids) for _, _, ids in spans)
    at = {message.id: place for place, message in enumerate(publisher.published)}
    assert set(at) == {id for _, _, ids in spans for id in ids}
    for _, committed, before in spans:
        for begun, _, after in spans:
            if committed < begun:
                assert max(at[id] for id in before) < min(at[id] for id in after)


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_t5_transactions_that_lock_a_row_in_turn_are_sent_in_their_turn(
    database: Database, order: Literal["key", "strict"]
) -> None:
    """A has its transaction id before B; B has the account before A, and so the lower number."""
    database.execute("CREATE TABLE account (balance int)")
    database.execute("INSERT INTO account VALUES (0)")
    a, b = database.connect(), database.connect()
    a.execute("CREATE TABLE an_order (id int)")
    b.execute("UPDATE account SET balance = balance + 1")
    database.outbox.add(b, topic="t", payload=b"b", key="account")
    b.commit()
    a.execute("UPDATE account SET balance = balance + 1")
    database.outbox.add(a, topic="t", payload=b"a", key="account")
    a.commit()
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=replace(QUICK, order=order))
    await until_empty(relay)
    await relay.aclose()
    assert publisher.payloads == ["b", "a"]
    a.close()
    b.close()


class Locking:
    """Sixteen writers that lock the rows of twenty keys in turn; what each saw committed before it added."""

    KEYS, WRITERS, TIMES = 20, 16, 60

    def __init__(self, database: Database) -> None:
        self._database = database
        database.execute("CREATE TABLE account (key int PRIMARY KEY, turn int NOT NULL DEFAULT 0)")
        database.execute(f"INSERT INTO account SELECT generate_series(0, {self.KEYS - 1})")
        database.execute("CREATE TABLE an_order (id int)")
        self.sent: set[UUID] = set()
        self.committed: list[tuple[float, UUID]] = []
        """When a commit was over, by this process's clock."""
        self.added: list[tuple[float, UUID]] = []
        """When an add began."""

    async def write(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(self._writer) for _ in range(self.WRITERS)))

    def _writer(self) -> None:
        connection = self._database.connect()
        for _ in range(self.TIMES):
            key = random.randrange(self.KEYS)
            if random.random() < 0.7:
                connection.execute("INSERT INTO an_order VALUES (1)")  # takes a transaction id
                time.sleep(random.uniform(0.0, 0.004))
            rows = connection.execute("UPDATE account SET turn = turn + 1 WHERE key = %s RETURNING turn", (key,))
            payload = f"{key}:{rows.fetchone()[0]}".encode()
            begun = time.monotonic()
            id = self._database.outbox.add(connection, topic="t", payload=payload, key=str(key))
            time.sleep(random.choice((0.0, 0.0, 0.002)))
            connection.commit()
            self.committed.append((time.monotonic(), id))
            self.added.append((begun, id))
            self.sent.add(id)
        connection.close()

    def inversions(self, published: Sequence[Message]) -> tuple[int, int]:
        """Messages sent before one of their key that had its turn earlier; and before any that was seen committed."""
        turns: dict[str, int] = {}
        by_key = 0
        for message in published:
            key, turn = message.payload.decode().split(":")
            by_key += int(turn) < turns.get(key, 0)
            turns[key] = max(int(turn), turns.get(key, 0))
        at = {message.id: place for place, message in enumerate(published)}
        overall, latest = 0, -1
        commits = sorted(self.committed)
        place = 0
        for begun, id in sorted(self.added):
            while place < len(commits) and commits[place][0] < begun:
                latest = max(latest, at[commits[place][1]])
                place += 1
            overall += at[id] < latest
        return by_key, overall


@pytest.mark.timeout(60)
@pytest.mark.parametrize("order", ["key", "strict"])
async def test_t6_nothing_is_out_of_order_under_writers_that_lock_rows_in_turn(
    database: Database, order: Literal["key", "strict"]
) -> None:
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=replace(QUICK, order=order))
    running = asyncio.create_task(relay.run())
    locking = Locking(database)
    await locking.write()
    await until_published(publisher, locking.sent)
    relay.stop()
    await running
    assert len(publisher.published) == len(locking.sent)
    by_key, overall = locking.inversions(publisher.published)
    assert by_key == 0
    if order == "strict":
        assert overall == 0


def begin(connection: psycopg.Connection[tuple[object, ...]]) -> psycopg.Connection[tuple[object, ...]]:
    """A transaction on the connection, as a caller's first statement opens it."""
    connection.execute("SELECT 1")
    return connection


async def test_t6_a_held_transaction_does_not_hold_strict_order_back_and_is_not_skipped(database: Database) -> None:
    """What it adds has the lower number and is sent when it is there; nobody who saw it can have been sent before."""
    relay = Relay(database.url, publisher := Noting(), policy=STRICT)
    before = database.send("z")
    await until_empty(relay)
    connection = begin(database.connect())
    held = database.outbox.add(connection, topic="t", payload=b"held")
    meanwhile = database.send("a", "b")
    await until_empty(relay)
    connection.commit()
    connection.close()
    await until_empty(relay)
    await relay.aclose()
    sent = [message.id for message in publisher.published]
    assert sent == [*(message.id for message in (*before, *meanwhile)), held]


async def test_t6_a_held_transaction_does_not_hold_order_by_key_back_and_is_not_skipped(database: Database) -> None:
    connection = begin(database.connect())
    held = database.outbox.add(connection, topic="t", payload=b"held", key="a")
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    for _ in range(5):
        database.send(*"ab" * 50)
        await until_empty(relay)
    assert len(publisher.published) == 500
    connection.commit()
    connection.close()
    await until_empty(relay)
    assert publisher.published[-1].id == held
    await relay.aclose()


async def test_t6_messages_of_a_restored_cluster_are_refused_until_adopted(database: Database) -> None:
    database.send("a", "b")
    publisher = Noting()
    connection = database.connect()
    connection.execute("UPDATE retryproof_outbox SET xid = xid + 1000000000")
    connection.commit()
    with pytest.raises(ConfigurationError, match="restored"):
        await Relay(database.url, publisher, policy=STRICT).run()
    connection.execute("UPDATE retryproof_outbox SET xid = 3")
    connection.execute("UPDATE retryproof_outbox_settings SET cluster = '1'")
    connection.commit()
    connection.close()
    with pytest.raises(ConfigurationError, match="outbox adopt"):
        await Relay(database.url, publisher, policy=STRICT).run()
    operator = Operator(database.url)
    assert await operator.adopt() == 2
    await operator.aclose()
    relay = Relay(database.url, publisher, policy=STRICT)
    await until_empty(relay)
    assert publisher.payloads == ["a:0", "b:1"]
    await relay.aclose()


SET_BACK = r"SELECT setval\('.*retryproof_outbox_sequence_seq', 2\)"


@pytest.mark.parametrize(
    ("broken", "mend"),
    [
        (
            "SELECT setval('retryproof_outbox_sequence_seq', 1)",
            SET_BACK,
        ),
        (
            "ALTER TABLE retryproof_outbox ALTER sequence RESTART",
            SET_BACK,
        ),
        ("ALTER TABLE retryproof_outbox ALTER sequence SET CACHE 20", "ALTER SEQUENCE .* CACHE 1"),
        ("ALTER TABLE retryproof_outbox ALTER sequence SET INCREMENT BY -1", "ALTER SEQUENCE .* INCREMENT BY 1"),
    ],
)
async def test_t6_numbers_that_do_not_order_messages_are_refused_and_the_doctor_says_so(
    database: Database, broken: str, mend: str
) -> None:
    database.send("a", "b")
    database.execute(broken)
    with pytest.raises(ConfigurationError, match=mend) as refused:
        await Relay(database.url, Noting(), policy=QUICK).run()
    (found,) = [one for one in diagnose(database.url) if one.check == "outbox order"]
    assert found.verdict is Verdict.FAIL
    sql = str(refused.value).rpartition("run: ")[2]
    assert found.advice.endswith(sql)
    database.execute(sql)
    assert Verdict.FAIL not in {one.verdict for one in diagnose(database.url)}
    relay = Relay(database.url, publisher := Noting(), policy=QUICK)
    database.send("c")
    await until_empty(relay)
    await relay.aclose()
    assert publisher.payloads == ["a:0", "b:1", "c:0"]


async def test_t6_a_transaction_has_its_id_before_it_draws_a_number(database: Database, unique: str) -> None:
    """What the floors rest on: columns are evaluated in their order, and xid is the first."""
    outbox = PostgresOutbox(f'"{unique}".')
    connection = await asyncpg.connect(
        database.url.partition("?")[0], server_settings=parse(database.url).settings(5.0)
    )
    row = database.outbox._row("t", b"", "k", None, None, None)
    for added in (outbox.add([row], 64), outbox.add([row, row], 64)):
        ((found,),) = await connection.fetch(f"EXPLAIN (VERBOSE, FORMAT JSON) {added.sql}", *added.parameters)
        (drawing, *_) = [
            output
            for node in _nodes(json.loads(found)[0]["Plan"])
            if "nextval" in (output := " ".join(node.get("Output", ())))
        ]
        assert drawing.index("txid_current()") < drawing.index("nextval")
    await connection.close()


async def test_o4_a_relay_of_the_release_before_finds_what_this_one_has_on_its_way(database: Database) -> None:
    """It buries by transaction id and number, both arrays in the same order."""
    relay = Relay(database.url, Noting(), policy=QUICK)
    member = await relay._joined()
    await member.balance()
    database.send("a")
    slow = list(await member.claim())
    await member.finish(BatchResult(slow=slow), all_done=False)
    database.send("b", "c")
    database.send("d")
    assert len(await member.claim(slow)) == 3
    both = "SELECT unnest(flight_xids) AS xid, unnest(flight) AS sequence FROM retryproof_outbox_relays"
    found = database.rows(f"SELECT o.key FROM ({both}) f JOIN retryproof_outbox o USING (xid, sequence)")
    assert sorted(key for (key,) in found) == ["a", "b", "c", "d"]
    await member.finish(BatchResult(slow=slow), all_done=None)
    assert database.rows(f"SELECT o.key FROM ({both}) f JOIN retryproof_outbox o USING (xid, sequence)") == [("a",)]
    await relay.aclose()


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_t6_on_sqlite_numbers_are_in_the_order_of_commits(
    tmp_path: Path, order: Literal["key", "strict"]
) -> None:
    """Writers that begin without the write lock, which they get one after another."""
    database = Database(sqlite_url(tmp_path))
    database.send("0", topic="t")
    committed: list[UUID] = []

    def write() -> None:
        connection = database.connect()
        connection.isolation_level = None
        for _ in range(15):
            connection.execute("BEGIN IMMEDIATE" if random.random() < 0.5 else "BEGIN")
            try:
                id = database.outbox.add(connection, topic="t", payload=b"", key="0")
            except sqlite3.OperationalError:  # somebody wrote since it began
                connection.execute("ROLLBACK")
                continue
            time.sleep(random.uniform(0.0, 0.002))
            committed.append(id)  # nobody else can be between this and the commit
            connection.execute("COMMIT")
        connection.close()

    relay = Relay(database.url, publisher := Noting(), policy=replace(QUICK, order=order))
    running = asyncio.create_task(relay.run())
    await asyncio.gather(*(asyncio.to_thread(write) for _ in range(6)))
    await until_published(publisher, set(committed))
    relay.stop()
    await running
    assert [message.id for message in publisher.published][1:] == committed


async def test_t5_on_an_event_loop_it_is_awaited(database: Database, unique: str) -> None:
    outbox = Outbox(schema=unique)
    connection = await asyncpg.connect(database.url.partition("?")[0])
    with pytest.raises(ConfigurationError, match="no transaction is open"):
        await outbox.aadd(connection, topic="t", payload=b"")
    with pytest.raises(ConfigurationError, match="retryproof migrate"):
        async with connection.transaction():
            await Outbox(schema="elsewhere").aadd(connection, topic="t", payload=b"")
    async with connection.transaction():
        with pytest.raises(ConfigurationError, match="aadd"):
            outbox.add(connection, topic="t", payload=b"")
        id = await outbox.aadd(connection, topic="t", payload=b"1", key="k")
        await outbox.aadd_many(connection, [outbox.message("t", b"2", key="k"), outbox.message("t", b"3", key="k")])
        await outbox.anotify(connection)
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.PostgresError):
        await connection.execute("SELECT 1 / 0")
    with pytest.raises(ConfigurationError, match="failed"):
        await outbox.aadd(connection, topic="t", payload=b"")
    await transaction.rollback()
    await connection.close()
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    assert publisher.published[0].id == id
    assert publisher.payloads == ["1", "2", "3"]
    await relay.aclose()


def test_t5_autocommit_is_refused(database: Database) -> None:
    connection = database.connect()
    connection.autocommit = True
    with pytest.raises(ConfigurationError, match="autocommit"):
        database.outbox.add(connection, topic="t", payload=b"")
    connection.close()


async def test_t6_a_claim_reads_what_it_takes_however_much_is_pending(database: Database, unique: str) -> None:
    """All of one key, so that 63 partitions are empty: none of them may be looked for in the whole table."""
    database.send(*["hot"] * 3_000)
    plans, relay = PostgresOutbox(f'"{unique}".'), uuid4()
    settings = parse(database.url).settings(5.0)
    connection = await asyncpg.connect(database.url.partition("?")[0], server_settings=settings)
    await connection.execute(f"ANALYZE {unique}.retryproof_outbox")
    await connection.fetch(*_call(plans.join(relay, 10_000_000, strict=False, routes="")))
    claim = plans.claim(
        relay, dict.fromkeys(range(64), 0), batch=100, quota=100, lease=10_000_000, alone=False, strict=False
    )
    sql, *parameters = _call(claim)
    ((found,),) = await connection.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", *parameters)
    await connection.close()
    removed = [node.get("Rows Removed by Filter", 0) for node in _nodes(json.loads(found)[0]["Plan"])]
    indexes = {node.get("Index Name") for node in _nodes(json.loads(found)[0]["Plan"])}
    assert max(removed) <= 100
    assert "retryproof_outbox_ready" in indexes


def _call(plan: Plan[Any]) -> tuple[Any, ...]:
    """A plan's first statement, as asyncpg takes it."""
    statement = next(plan)
    return (statement.sql, *statement.parameters)


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for below in node.get("Plans", ()):
        yield from _nodes(below)
