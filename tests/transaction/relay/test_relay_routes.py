"""Routes of relays: which topics go where, who may share an outbox, and what has no route (T6)."""

import functools
import logging
from asyncio import Event, create_task, gather, sleep, wait_for
from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

import pytest

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.outbox.routes import EVERYTHING, Routes
from retryproof.publishers import DELIVERED, UNTRIED, Batch, Failed, Outcome
from retryproof.publishers.base import Progress
from retryproof.publishers.function import FunctionPublisher
from retryproof.publishers.httpx import HttpPublisher
from retryproof.publishers.redis import RedisStreamPublisher
from retryproof.publishers.smtp import SmtpPublisher
from retryproof.transaction import Relay
from tests.transaction.outboxes import QUICK, Database, Noting, until, until_empty


class Named(Noting):
    """A publisher that says where it sends."""

    def __init__(self, destination: str) -> None:
        super().__init__()
        self.destination = destination


class Blocking(Named):
    """One that takes a batch as a whole, in a thread, as SMTP does."""

    def publish(self, batch: Batch) -> Sequence[Outcome]:  # type: ignore[override] # of the other colour
        self.published += batch.messages
        return [DELIVERED] * len(batch.messages)


async def test_t6_relays_with_other_routes_do_not_share_an_outbox_and_take_over(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.send(*(f"k{number}" for number in range(40)))
    first, second = Named("here"), Named("there")
    old, new = Relay(database.url, first, policy=QUICK), Relay(database.url, second, policy=QUICK)
    await old._joined()
    for _ in range(3):
        assert await new.run_once() is None
    assert new.standing_by
    assert caplog.text.count("standing by") == 1
    await until_empty(old)
    assert (len(first.published), len(second.published)) == (40, 0)
    await old.aclose()
    database.send("later")
    await until_empty(new)
    assert not new.standing_by
    assert second.payloads == ["later:0"]
    await new.aclose()


async def test_t6_a_relay_that_stands_by_takes_over_from_one_that_died(database: Database) -> None:
    database.send("k")
    old = Relay(database.url, Named("here"), policy=replace(QUICK, lease=0.3))
    await old._joined()
    await old._opened().aclose()
    publisher = Named("there")
    new = Relay(database.url, publisher, policy=QUICK)
    task = create_task(new.run())
    await until(lambda: publisher.published)
    new.stop()
    await wait_for(task, 10.0)


async def test_t6_relays_of_an_earlier_release_have_routes_that_nobody_knows(database: Database) -> None:
    old = Relay(database.url, Named("here"), policy=QUICK)
    await old._joined()
    database.execute("UPDATE retryproof_outbox_relays SET routes = NULL")
    new = Relay(database.url, Named("here"), policy=QUICK)
    await new.run_once()
    assert new.standing_by
    await old.aclose()
    await new.run_once()
    assert not new.standing_by
    await new.aclose()


async def test_t6_of_relays_that_join_at_once_only_one_kind_stays(database: Database) -> None:
    for _ in range(10):
        relays = [Relay(database.url, Named(where), policy=QUICK) for where in ("here", "there", "here", "there")]
        members = await gather(*(relay._membership() for relay in relays))
        kinds = {place % 2 for place, member in enumerate(members) if member is not None}
        assert len(kinds) <= 1
        ((routes,),) = database.rows("SELECT count(DISTINCT routes) FROM retryproof_outbox_relays")
        assert routes == len(kinds)
        for relay in relays:
            await relay.aclose()


async def test_t6_relays_of_another_order_are_refused_whatever_their_routes(database: Database) -> None:
    old = Relay(database.url, Named("here"), policy=QUICK)
    await old._joined()
    for where in ("here", "there"):
        strict = Relay(database.url, Named(where), policy=replace(QUICK, order="strict"))
        with pytest.raises(ConfigurationError, match="another order"):
            await strict.run_once()
        await strict.aclose()
    await old.aclose()


@pytest.mark.parametrize("order", ["key", "strict"])
async def test_t6_each_topic_goes_where_its_route_says_and_a_key_keeps_its_order(
    database: Database, order: str
) -> None:
    outbox = database.outbox
    sent = [outbox.message("abc"[n % 3], str(n).encode(), key=f"k{n % 5}") for n in range(60)]
    with database.transaction() as connection:
        outbox.add_many(connection, sent)
    journal: list[Message] = []

    class Kept(Named):
        async def _send(self, message: Message) -> Outcome:
            await sleep(0.001 * (len(self.destination) % 3))
            journal.append(message)
            return await super()._send(message)

    one, two, rest = Kept("one"), Kept("number two"), Kept("the rest")
    relay = Relay(database.url, rest, routes={"a": one, "b": two}, policy=replace(QUICK, order=order))  # type: ignore[arg-type] # of the two
    await until_empty(relay)
    assert {m.topic for m in one.published} == {"a"}
    assert {m.topic for m in two.published} == {"b"}
    assert {m.topic for m in rest.published} == {"c"}
    for key in {m.key for m in sent}:
        assert [m.payload for m in journal if m.key == key] == [m.payload for m in sent if m.key == key]
    if order == "strict":
        assert [m.payload for m in journal] == [m.payload for m in sent]
    await relay.aclose()


async def test_t6_a_topic_without_a_route_is_loud_and_blocks_its_own_keys_alone(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = database.outbox
    with database.transaction() as connection:
        outbox.add(connection, topic="lost", payload=b"1", key="mixed")
        outbox.add(connection, topic="known", payload=b"2", key="mixed")
        outbox.add(connection, topic="known", payload=b"3", key="other")
    known = Named("known")
    relay = Relay(database.url, routes={"known": known}, policy=replace(QUICK, max_attempts=1, max_backoff=0.002))
    for _ in range(20):
        await relay.run_once()
        await sleep(0.005)
    assert known.payloads == ["3"]
    assert (relay.totals.dead, relay.totals.failed) == (0, 0)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["no route for the topic 'lost'" in record.getMessage() for record in errors] == [True]
    await relay.aclose()
    both = Relay(database.url, known, policy=QUICK)
    await until_empty(both)
    assert known.payloads == ["3", "1", "2"]
    await both.aclose()


async def test_t6_what_has_no_route_is_not_passed_over(database: Database) -> None:
    outbox = database.outbox
    with database.transaction() as connection:
        outbox.add(connection, topic="lost", payload=b"1", key="mixed")
        outbox.add(connection, topic="known", payload=b"2", key="mixed")
    known = Named("known")
    policy = replace(QUICK, on_failure="pass", max_backoff=0.002)
    relay = Relay(database.url, routes={"known": known}, policy=policy)
    for _ in range(10):
        await relay.run_once()
        await sleep(0.005)
    assert known.payloads == []
    await relay.aclose()
    both = Relay(database.url, known, policy=policy)
    await until_empty(both)
    assert known.payloads == ["1", "2"]
    await both.aclose()


async def test_c15_a_message_without_a_route_stays_to_be_tried_alone(database: Database) -> None:
    dying = Relay(database.url, routes={"known": Named("here")}, policy=QUICK)
    database.send("lost", topic="lost")
    member = await dying._joined()
    await member.balance()
    assert len(await member.claim()) == 1
    await dying._opened().aclose()
    database.execute("UPDATE retryproof_outbox_relays SET lease_until = 1")
    relay = Relay(database.url, routes={"known": Named("here")}, policy=replace(QUICK, max_backoff=0.002))
    for _ in range(10):
        await relay.run_once()
        await sleep(0.005)
    ((alone, deaths),) = database.rows("SELECT alone, deaths FROM retryproof_outbox")
    assert (bool(alone), deaths) == (True, 0)
    await relay.aclose()


async def test_t6_one_destination_that_is_down_does_not_hold_up_another(database: Database) -> None:
    outbox = database.outbox
    with database.transaction() as connection:
        outbox.add_many(connection, [outbox.message("ab"[n % 2], b"", key=f"k{n}") for n in range(400)])
    up, down = Named("up"), Named("down")
    down.fails = lambda message: Failed("refused", kind="unreachable")
    relay = Relay(database.url, routes={"a": up, "b": down}, policy=replace(QUICK, backoff=60.0, max_backoff=60.0))
    for _ in range(200):
        await relay.run_once()
        if len(up.published) == 200:
            break
    assert len(up.published) == 200
    assert len(down.tried) <= QUICK.batch
    await relay.aclose()


async def test_t6_publishers_that_do_not_say_how_far_they_are_work_beside_those_that_do() -> None:
    hanging = Event()

    async def hang(message: Message) -> None:
        await hanging.wait()

    blocking = Blocking("blocking")
    routes = Routes({"quick": blocking, "slow": hang})
    messages = [Message(uuid4(), topic, b"", queue=topic.encode()) for topic in ("quick", "slow")]
    progress = Progress()
    task = create_task(routes.publish(Batch(messages, progress=progress)))
    await until(lambda: 0 in progress.ended)
    assert progress.under_way == {1}
    hanging.set()
    assert await task == [DELIVERED, DELIVERED]


async def test_t6_what_changes_its_publisher_within_a_chain_is_left_for_the_next_batch() -> None:
    one, two = Named("one"), Named("two")
    routes = Routes({"a": one, "b": two})
    messages = [Message(uuid4(), topic, b"", queue=b"k") for topic in "aaba"]
    assert await routes.publish(Batch(messages)) == [DELIVERED, DELIVERED, UNTRIED, UNTRIED]
    assert two.tried == []


def digest(**routes: object) -> str:
    return Routes(routes).digest  # type: ignore[arg-type] # destinations


def test_t6_a_route_is_the_same_after_a_password_was_changed() -> None:
    http = "https://u:{}@Partner.example:443/hooks?tenant=a&access_token={}"
    assert HttpPublisher(http.format("a", "b")).destination == HttpPublisher(http.format("c", "d")).destination
    assert digest(t="smtp://u:one@mail.example:587") == digest(t="smtp://u:two@mail.example")
    assert digest(t="redis://:one@h/0/s") == digest(t="rediss://h/0/s".replace("rediss", "redis"))
    for text in (
        HttpPublisher(http.format("pass", "secret")).destination,
        RedisStreamPublisher("redis://:pw@h/0", "s").destination,
    ):
        assert not any(word in text for word in ("pass", "secret", "pw"))


def test_t6_other_destinations_and_topics_are_other_routes() -> None:
    found = [
        digest(t="https://h/a"),
        digest(t="https://h/b"),
        digest(t="https://h/a?tenant=1"),
        digest(t="https://h:8443/a"),
        digest(u="https://h/a"),
        digest(t="https://h/a", u="https://h/b"),
        digest(t="https://h/b", u="https://h/a"),
        digest(t="redis://h/0/a"),
        digest(t="redis://h/1/a"),
        digest(t="redis://h/0/b"),
        digest(t=SmtpPublisher("h")),
        digest(t=SmtpPublisher("g")),
        Routes({EVERYTHING: "https://h/a"}).digest,
    ]
    assert len(set(found)) == len(found)


def test_t6_a_function_s_route_is_its_qualified_name_or_the_one_it_was_given() -> None:
    async def send(message: Message) -> None: ...

    name = f"{__name__}:test_t6_a_function_s_route_is_its_qualified_name_or_the_one_it_was_given.<locals>.send"
    assert FunctionPublisher(send).destination == FunctionPublisher(functools.partial(send)).destination == name
    assert FunctionPublisher(send, "mine").destination == "mine"
    assert digest(t=send) == digest(t=FunctionPublisher(send))


def test_t6_a_relay_needs_somewhere_to_send() -> None:
    with pytest.raises(ConfigurationError, match="somewhere to send"):
        Relay("sqlite:///x.db")
