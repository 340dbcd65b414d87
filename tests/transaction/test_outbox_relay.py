"""The outbox and its relay on both databases: order, failures, dead letters, ownership."""

from pathlib import Path

import pytest

from retryproof.transaction import Relay
from tests.transaction.outboxes import QUICK, Database, Noting, sqlite_url, until_empty


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Database:
    if request.param == "sqlite":
        return Database(sqlite_url(tmp_path))
    from retryproof.stores.sql.migrate import migrate

    url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
    migrate(url)
    return Database(url)


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
