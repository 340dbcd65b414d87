"""The outbox and its relay on both databases: order, failures, dead letters, ownership."""

from asyncio import Event, create_task, sleep
from dataclasses import replace

import psycopg
import pytest

from retryproof.core.errors import ConfigurationError, LeaseLost
from retryproof.core.message import BatchResult, Message
from retryproof.outbox.operator import Operator
from retryproof.publishers import Failed
from retryproof.transaction import Outbox, Relay
from tests.transaction.outboxes import QUICK, Database, Noting, until_empty


async def test_t5_a_message_keeps_what_it_was_given(database: Database) -> None:
    with database.transaction() as connection:
        id = database.outbox.add(
            connection,
            topic="receipts",
            payload=b"\x00\xff",
            key="k",
            headers={"a": "ä"},
            content_type="text/plain",
            trace="00-1-2-01",
        )
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await relay.run_once()
    (message,) = publisher.published
    assert (message.id, message.topic, message.payload, message.key) == (id, "receipts", b"\x00\xff", "k")
    assert (message.headers, message.content_type, message.trace) == ({"a": "ä"}, "text/plain", "00-1-2-01")
    assert id.version == 7
    assert database.pending == 0
    await relay.aclose()


async def test_t6_messages_of_a_key_are_published_in_order(database: Database) -> None:
    sent = [m.payload.decode() for _ in range(5) for m in database.send(*"abcabcabc")]
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    for key in "abc":
        assert [p for p in publisher.payloads if p[0] == key] == [p for p in sent if p[0] == key]
    await relay.aclose()


async def test_t6_a_failing_message_blocks_its_own_key_alone(database: Database) -> None:
    database.send("bad", "bad", "good", None, "bad", "good")
    refuse = True
    publisher = Noting(lambda message: "no" if refuse and message.key == "bad" else None)
    relay = Relay(database.url, publisher, policy=QUICK)
    for _ in range(4):
        await relay.run_once()
    assert sorted(publisher.payloads) == ["None:3", "good:2", "good:5"]
    assert {m.payload for m in publisher.tried if m.key == "bad"} == {b"bad:0"}
    refuse = False
    await until_empty(relay)
    assert publisher.payloads[3:] == ["bad:0", "bad:1", "bad:4"]
    assert (await relay.stats()).blocked == 0
    await relay.aclose()


async def test_t6_after_n_attempts_a_message_is_a_dead_letter_with_its_reason(database: Database) -> None:
    bad, _, after = database.send("bad", "good", "bad")
    publisher = Noting(lambda message: "always" if message.id == bad.id else None)
    relay = Relay(database.url, publisher, policy=replace(QUICK, max_attempts=3))
    await until_empty(relay)
    assert [message.id for message in publisher.tried].count(bad.id) == 3
    assert publisher.published[-1].id == after.id
    operator = Operator(database.url)
    (letter,) = await operator.dead()
    assert (letter.message.id, letter.message.payload, letter.reason) == (bad.id, b"bad:0", "always")
    assert letter.message.attempts == 3
    await operator.aclose()
    await relay.aclose()


async def test_t6_what_can_never_be_sent_is_a_dead_letter_at_once(database: Database) -> None:
    database.send("gone", "large")
    publisher = Noting(lambda message: Failed("410", permanent=True) if message.key == "gone" else None)
    publisher.max_payload = 6
    relay = Relay(database.url, publisher, policy=QUICK)
    await relay.run_once()
    operator = Operator(database.url)
    reasons = {letter.message.key: letter.reason for letter in await operator.dead()}
    assert reasons == {"gone": "410", "large": "the payload has 7 bytes, and the publisher takes 6"}
    assert publisher.published == []
    await operator.aclose()
    await relay.aclose()


async def test_t6_by_choice_a_failing_message_is_passed_over(database: Database) -> None:
    bad, *others = database.send("k", "k", "k")
    publisher = Noting(lambda message: "no" if message.id == bad.id and message.attempts < 2 else None)
    policy = replace(QUICK, on_failure="pass")
    relay = Relay(database.url, publisher, policy=policy)
    await until_empty(relay)
    ids = [message.id for message in publisher.published]
    assert sorted(ids, key=str) == sorted([bad.id, *(message.id for message in others)], key=str)
    assert ids[-1] == bad.id
    assert (await relay.stats()).blocked == 0
    await relay.aclose()


async def test_c15_what_a_dead_relay_had_is_tried_alone_and_counts_only_then(database: Database) -> None:
    sent = database.send("a", "a", "b", None)
    dying = Relay(database.url, Noting(), policy=replace(QUICK, lease=0.3))
    member = await dying._joined()
    await member.balance()
    assert len(await member.claim()) == 4
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=QUICK)
    await until_empty(relay)
    assert [len(batch) for batch in publisher.batches] == [1, 1, 1, 1]
    assert [m.attempts for m in publisher.published] == [0, 0, 0, 0]
    assert sorted(m.payload for m in publisher.published) == sorted(m.payload for m in sent)
    assert [m.payload for m in publisher.published if m.key == "a"] == [b"a:0", b"a:1"]
    with pytest.raises(LeaseLost):
        await member.finish(BatchResult(done=sent), all_done=True)
    await dying._opened().aclose()
    assert (await relay.stats()).blocked == 0
    await relay.aclose()


async def test_c15_a_message_that_kills_its_relay_again_and_again_is_a_dead_letter(database: Database) -> None:
    poison, _ = database.send("poison", "good")
    policy = replace(QUICK, lease=1.0, max_deaths=2)
    for _ in range(3):  # beside the other one, then twice alone
        dying = Relay(database.url, Noting(), policy=policy)
        while True:
            member = await dying._joined()
            await member.balance()
            claimed = await member.claim()
            if poison.id in {message.id for message in claimed}:
                break
            if claimed:
                await member.finish(BatchResult(done=claimed, freed=[m.queue_id for m in claimed]), all_done=True)
            await sleep(0.01)
        await dying._opened().aclose()
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=replace(QUICK, max_deaths=2))
    await until_empty(relay)
    operator = Operator(database.url)
    (letter,) = await operator.dead()
    assert (letter.message.id, letter.message.attempts) == (poison.id, 3)
    assert "the relay's death" in letter.reason
    assert poison.id not in {message.id for message in publisher.tried}
    await operator.aclose()
    await relay.aclose()


async def test_t6_partitions_are_shared_among_live_relays_and_come_back(database: Database) -> None:
    policy = replace(QUICK, lease=2.0)
    relays = [Relay(database.url, Noting(), policy=policy) for _ in range(3)]

    async def owned(relay: Relay) -> int:
        member = await relay._joined()
        member._balance_at = 0.0
        await member.balance()
        return len(member._floors.at)

    shares: list[int] = []
    for _ in range(3):
        shares = [await owned(relay) for relay in relays]
    assert sum(shares) == 64
    assert max(shares) == 22
    database.send(*(f"k{number}" for number in range(200)))
    for relay in relays:
        while await relay.run_once() is not None:
            pass
    published = [message.payload for relay in relays for message in relay._routes.one.published]  # type: ignore[union-attr] # Noting
    assert len(published) == len(set(published)) == 200
    for relay in relays[1:]:
        await relay.aclose()
    assert await owned(relays[0]) == 64
    await relays[0].aclose()


async def test_t6_another_number_of_partitions_is_refused(database: Database) -> None:
    database.send("a")
    with database.transaction() as connection, pytest.raises(ConfigurationError, match="partitions=8"):
        Outbox(partitions=8).add(connection, topic="t", payload=b"")
    relay = Relay(database.url, Noting(), policy=replace(QUICK, partitions=8))
    with pytest.raises(ConfigurationError, match="partitions=8"):
        await relay.run_once()
    await relay.aclose()
    assert database.pending == 1


async def test_t6_relays_of_two_orders_do_not_work_on_one_outbox(database: Database) -> None:
    keyed = Relay(database.url, Noting(), policy=QUICK)
    await keyed.run_once()
    strict = Relay(database.url, Noting(), policy=replace(QUICK, order="strict"))
    with pytest.raises(ConfigurationError, match="another order"):
        await strict.run_once()
    await strict.aclose()
    await keyed.aclose()


async def test_t6_strict_order_keeps_all_messages_in_order_and_waits_for_one_that_fails(database: Database) -> None:
    first = database.send(*"abcab")
    second = database.send(*"cba")
    publisher = Noting(lambda message: "no" if message.payload == b"c:2" and message.attempts < 2 else None)
    relay = Relay(database.url, publisher, policy=replace(QUICK, order="strict"))
    await until_empty(relay)
    assert publisher.payloads == [message.payload.decode() for message in (*first, *second)]
    standby = Relay(database.url, Noting(), policy=replace(QUICK, order="strict"))
    database.send("z")
    assert await standby.run_once() is None
    await standby.aclose()
    await relay.aclose()


async def test_c15_strict_order_tries_what_a_dead_relay_had_alone(database: Database) -> None:
    sent = database.send(*"abc")
    policy = replace(QUICK, order="strict")
    dying = Relay(database.url, Noting(), policy=replace(policy, lease=0.3))
    member = await dying._joined()
    await member.balance()
    assert len(await member.claim()) == 3
    sent += database.send(*"de")
    publisher = Noting()
    relay = Relay(database.url, publisher, policy=policy)
    await until_empty(relay)
    assert [len(batch) for batch in publisher.batches] == [1, 1, 1, 2]
    await dying._opened().aclose()
    assert [message.id for message in publisher.published] == [message.id for message in sent]
    await relay.aclose()


async def test_t6_a_relay_drains_when_it_is_told_to_stop(database: Database) -> None:
    database.send(*(f"k{number}" for number in range(30)))
    started = Event()

    async def slow(message: Message) -> None:
        started.set()
        await sleep(0.01)

    relay = Relay(database.url, slow, policy=QUICK)
    running = create_task(relay.run())
    await started.wait()
    relay.stop()
    totals = await running
    assert totals.delivered == 30
    assert database.rows("SELECT count(*) FROM retryproof_outbox_relays") == [(0,)]


async def test_o1_dead_letters_are_listed_requeued_dropped_and_purged(database: Database) -> None:
    sent = database.send("a", "b", "c")
    relay = Relay(database.url, Noting(lambda message: Failed("no", permanent=True)), policy=QUICK)
    await relay.run_once()
    await relay.aclose()
    operator = Operator(database.url)
    assert (await operator.stats()).dead == 3
    assert await operator.requeue([sent[0].id]) == 1
    assert await operator.drop([sent[1].id]) == 1
    assert [letter.message.id for letter in await operator.dead()] == [sent[2].id]
    assert await operator.purge(older_than=3600.0) == 0
    assert await operator.purge(older_than=0.0) == 1
    publisher = Noting()
    again = Relay(database.url, publisher, policy=QUICK)
    await until_empty(again)
    assert [(message.id, message.attempts) for message in publisher.published] == [(sent[0].id, 0)]
    await operator.aclose()
    await again.aclose()


def test_t5_what_could_not_be_sent_is_refused_before_anything_is_written(database: Database) -> None:
    outbox = Outbox(topics=["receipts"], max_payload=4)
    with database.transaction() as connection:
        with pytest.raises(ConfigurationError, match="unknown"):
            outbox.add(connection, topic="recipts", payload=b"")
        with pytest.raises(ConfigurationError, match="5 bytes"):
            outbox.add(connection, topic="receipts", payload=b"12345")
        with pytest.raises(ConfigurationError, match="must be bytes"):
            outbox.add(connection, topic="receipts", payload="text")  # type: ignore[arg-type] # what the test is about
        outbox.add(connection, topic="receipts", payload=b"1234")
    assert database.pending == 1


def test_t5_a_pipeline_is_refused_and_adds_nothing(postgres_database: str) -> None:
    with psycopg.connect(postgres_database) as connection:
        with connection.pipeline(), pytest.raises(ConfigurationError, match="pipeline"):
            Outbox().add(connection, topic="t", payload=b"")
        connection.commit()
        assert connection.execute("SELECT count(*) FROM retryproof_outbox").fetchone() == (0,)


def test_t5_a_rolled_back_transaction_sends_nothing(database: Database) -> None:
    database.send("a")
    connection = database.connect()
    connection.execute("BEGIN" if database.url.startswith("sqlite") else "SELECT 1")
    database.outbox.add(connection, topic="t", payload=b"never")
    connection.rollback()
    connection.close()
    assert database.pending == 1
