"""put_once on an emulator of DynamoDB: created or already there, with the item (T8)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiobotocore.session
import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ConnectionClosedError

from retryproof import Idempotency, current_operation, errors
from retryproof.testing.link import FaultLink
from retryproof.transaction import Put, aput_once, put_once
from retryproof.upserts.dynamodb import NONCE

if TYPE_CHECKING:
    from types_aiobotocore_dynamodb.client import DynamoDBClient as LoopClient
    from types_boto3_dynamodb.client import DynamoDBClient

pytestmark = pytest.mark.timeout(60)

REGION, NAME, SECRET = "eu-central-1", "tests", "tests"
SESSION = boto3.Session(region_name=REGION, aws_access_key_id=NAME, aws_secret_access_key=SECRET)
ATTEMPTS = Config(retries={"mode": "standard", "max_attempts": 3}, max_pool_connections=50)
ONCE = Config(retries={"mode": "standard", "total_max_attempts": 1})


def client_of(url: str, config: Config = ATTEMPTS) -> DynamoDBClient:
    return SESSION.client("dynamodb", endpoint_url=url, config=config)


@contextlib.asynccontextmanager
async def loop_client_of(url: str) -> AsyncIterator[LoopClient]:
    async with aiobotocore.session.get_session().create_client(
        "dynamodb", REGION, endpoint_url=url, aws_access_key_id=NAME, aws_secret_access_key=SECRET
    ) as client:
        yield client


@pytest.fixture(scope="module")
def client(dynamodb_url: str) -> Iterator[DynamoDBClient]:
    found = client_of(dynamodb_url)
    yield found
    found.close()


@pytest.fixture
def orders(client: DynamoDBClient, unique: str) -> Iterator[str]:
    """A table of this test's own, whose key is `id` and `line`."""
    client.create_table(
        TableName=unique,
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}, {"AttributeName": "line", "KeyType": "RANGE"}],
        AttributeDefinitions=[
            {"AttributeName": "id", "AttributeType": "S"},
            {"AttributeName": "line", "AttributeType": "N"},
        ],
        BillingMode="PAY_PER_REQUEST",
    )
    client.get_waiter("table_exists").wait(TableName=unique)
    yield unique
    client.delete_table(TableName=unique)


@pytest.fixture
def link(dynamodb_url: str) -> Iterator[FaultLink]:
    """Between the client and the server."""
    parts = urlsplit(dynamodb_url)
    with FaultLink(parts.hostname or "127.0.0.1", parts.port or 8000) as found:
        yield found


def stored(client: DynamoDBClient, table: str) -> list[dict[str, Any]]:
    return [dict(item) for item in client.scan(TableName=table, ConsistentRead=True)["Items"]]


def test_t8_created_or_already_there_with_the_item(client: DynamoDBClient, orders: str) -> None:
    answers = [put_once(client, orders, {"id": "a", "line": 1, "amount": amount}) for amount in (5, 6)]
    item = {"id": "a", "line": 1, "amount": 5}
    assert answers == [Put(True, item), Put(False, item)]


def test_t8_both_answers_take_one_round_trip(orders: str, link: FaultLink) -> None:
    through = client_of(link.url)
    assert [put_once(through, orders, {"id": "a", "line": 1}).created for _ in range(2)] == [True, False]
    assert link.stats["exchanges"] == 2


def test_t8_the_whole_primary_key_counts(client: DynamoDBClient, orders: str) -> None:
    answers = [put_once(client, orders, {"id": "a", "line": line}).created for line in (1, 2, 1)]
    assert answers == [True, True, False]


def test_t8_an_item_that_has_nothing_but_the_key_is_not_replaced(client: DynamoDBClient, orders: str) -> None:
    client.put_item(TableName=orders, Item={"id": {"S": "a"}, "line": {"N": "1"}})
    answer = put_once(client, orders, {"amount": 5, "email": "a@example.org", "id": "a", "line": 1})
    assert answer == Put(False, {"id": "a", "line": 1})


def test_t8_of_fifty_at_once_one_creates_and_all_have_its_item(client: DynamoDBClient, orders: str) -> None:
    answers: list[Put] = []
    together = threading.Barrier(50)

    def create(amount: int) -> None:
        together.wait(30)
        answers.append(put_once(client, orders, {"id": "a", "line": 1, "amount": amount}))

    threads = [threading.Thread(target=create, args=(amount,)) for amount in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (creator,) = [answer for answer in answers if answer.created]
    assert [answer.item for answer in answers] == [creator.item] * 50


async def test_t8_of_fifty_on_an_event_loop_one_creates(dynamodb_url: str, orders: str) -> None:
    async with loop_client_of(dynamodb_url) as client:
        putting = [aput_once(client, orders, {"id": "a", "line": 1, "amount": amount}) for amount in range(50)]
        answers = await asyncio.gather(*putting)
    (creator,) = [answer for answer in answers if answer.created]
    assert [answer.item for answer in answers] == [creator.item] * 50


def test_t8_a_lost_reply_does_not_make_the_creator_a_latecomer(
    client: DynamoDBClient, orders: str, link: FaultLink
) -> None:
    through = client_of(link.url)
    link.lose_reply(times=1)
    first = put_once(through, orders, {"id": "a", "line": 1, "amount": 5})
    assert link.stats["exchanges"] == 2  # botocore sent it again
    same = put_once(through, orders, {"id": "a", "line": 1, "amount": 5})
    assert (first.created, same.created, len(stored(client, orders))) == (True, False, 1)


async def test_t8_a_lost_reply_on_an_event_loop(orders: str, link: FaultLink) -> None:
    async with loop_client_of(link.url) as client:
        link.lose_reply(times=1)
        answers = [await aput_once(client, orders, {"id": "a", "line": 1}) for _ in range(2)]
    assert [answer.created for answer in answers] == [True, False]


def test_t8_a_lost_reply_of_a_latecomer_is_still_a_latecomers(
    client: DynamoDBClient, orders: str, link: FaultLink
) -> None:
    put_once(client, orders, {"id": "a", "line": 1, "amount": 5})
    link.lose_reply(times=1)
    assert put_once(client_of(link.url), orders, {"id": "a", "line": 1, "amount": 5}).created is False


def test_t8_attempts_that_share_a_nonce_are_all_the_creator(
    client: DynamoDBClient, orders: str, link: FaultLink
) -> None:
    nonce = uuid4()
    link.lose_reply(times=1)
    with pytest.raises(ConnectionClosedError):  # no answer, and botocore does not try again
        put_once(client_of(link.url, ONCE), orders, {"id": "a", "line": 1}, nonce=nonce)
    assert put_once(client, orders, {"id": "a", "line": 1}, nonce=nonce).created is True
    assert put_once(client, orders, {"id": "a", "line": 1}).created is False


def test_t8_over_a_bad_link_one_of_twenty_creates_and_knows_it(
    client: DynamoDBClient, orders: str, link: FaultLink
) -> None:
    link.lose_reply(probability=0.3)
    link.duplicate(probability=0.2)
    through = client_of(link.url)
    answers: list[Put] = []

    def create(amount: int) -> None:
        nonce = uuid4()
        while True:
            try:
                return answers.append(put_once(through, orders, {"id": "a", "line": 1, "amount": amount}, nonce=nonce))
            except BotoCoreError:  # no answer after four tries
                pass

    threads = [threading.Thread(target=create, args=(amount,)) for amount in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    (creator,) = [answer for answer in answers if answer.created]
    assert [answer.item for answer in answers] == [creator.item] * 20
    assert link.stats["lose_reply"] > 0


def test_t8_attempts_of_one_operation_share_the_nonce_that_it_derives(client: DynamoDBClient, orders: str) -> None:
    answers: list[bool] = []

    def place() -> None:
        nonce = current_operation().derive("order")
        answers.append(put_once(client, orders, {"id": "a", "line": 1}, nonce=nonce).created)
        if len(answers) == 1:
            raise ZeroDivisionError

    engine = Idempotency("memory://")
    with contextlib.suppress(ZeroDivisionError):
        engine.run("k", place, scope="s")
    engine.run("k", place, scope="s")
    engine.close()
    assert answers == [True, True]


def test_values_come_back_as_they_were_put(client: DynamoDBClient, orders: str) -> None:
    item = {
        "id": "a",
        "line": -1,
        "text": "",
        "bytes": b"\0\xff",
        "flag": False,
        "nothing": None,
        "price": Decimal("12.30"),
        "large": 10**37 + 1,
        "list": [1, "b", [None], {"deep": Decimal("1e-10")}],
        "map": {"a": {"b": True}},
        "texts": {"a", "b"},
        "numbers": {1, Decimal("2.5")},
        "binaries": {b"a", b"b"},
    }
    answers = [put_once(client, orders, item) for _ in range(2)]
    assert answers == [Put(True, item), Put(False, item)]
    assert isinstance(answers[0].item["line"], Decimal)  # as the later ones have it


def test_the_nonce_is_kept_beside_the_item_and_left_out_of_the_answer(client: DynamoDBClient, orders: str) -> None:
    nonce = uuid4()
    answers = [put_once(client, orders, {"id": "a", "line": 1}, nonce=nonce, attribute="by") for _ in range(2)]
    assert [answer.item for answer in answers] == [{"id": "a", "line": 1}] * 2
    assert stored(client, orders) == [{"id": {"S": "a"}, "line": {"N": "1"}, "by": {"S": str(nonce)}}]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (1.5, "amount is a float, which is not exact; give a Decimal"),
        ({"deep": [1, 0.1]}, r"amount\.deep\[1\] is a float"),
        (set(), "amount is an empty set"),
        ({1, "a"}, "other than strings alone"),
        ({True}, "other than strings alone"),
        (10**38 + 1, "more than 38 digits"),
        (Decimal("NaN"), "no number to DynamoDB"),
        (Decimal("Infinity"), "no number to DynamoDB"),
        (object(), "is of the type object, which DynamoDB does not have"),
        ({1: "a"}, "is of the type dict, which"),
    ],
)
def test_a_value_that_dynamodb_cannot_keep_is_refused_with_its_place(value: Any, why: str, link: FaultLink) -> None:
    with pytest.raises(errors.ConfigurationError, match=why):
        put_once(client_of(link.url), "orders", {"id": "a", "line": 1, "amount": value})
    assert link.stats["exchanges"] == 0


@pytest.mark.parametrize("size", [400 * 1024, 2 * 1024 * 1024])
def test_an_item_over_the_limit_is_refused(client: DynamoDBClient, orders: str, size: int) -> None:
    with pytest.raises(errors.ConfigurationError, match="over DynamoDB's limit of 400 KB"):
        put_once(client, orders, {"id": "a", "line": 1, "text": "x" * size})
    assert stored(client, orders) == []


def test_a_missing_table_is_named(client: DynamoDBClient, unique: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"There is no table '{unique}'"):
        put_once(client, unique, {"id": "a"})


@pytest.mark.parametrize("item", [{"id": "a"}, {"line": 1}, {"id": 1, "line": 1}, {"id": "", "line": 1}], ids=str)
def test_an_item_without_the_tables_key_is_refused(client: DynamoDBClient, orders: str, item: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="does not take this item") as caught:
        put_once(client, orders, item)
    assert caught.value.__cause__ is not None
    assert stored(client, orders) == []


def test_an_item_with_too_many_or_no_scalars_is_refused(client: DynamoDBClient, orders: str) -> None:
    many = {f"a{number}": number for number in range(98)}
    assert put_once(client, orders, {"id": "a", "line": 1, **many}).created
    refused: list[dict[str, Any]] = [{"id": "a", "line": 2, "more": 1, **many}, {}, {"list": []}]
    for item in refused:
        with pytest.raises(errors.ConfigurationError, match="can have 1 to 100"):
            put_once(client, orders, item)
    assert put_once(client, orders, {"id": "a", "line": 3, "map": {**many, "more": 1}}).created


def test_an_attribute_of_the_items_own_is_not_taken_for_the_nonce(client: DynamoDBClient, orders: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="name another attribute="):
        put_once(client, orders, {"id": "a", "line": 1, NONCE: "mine"})


def test_a_table_and_a_resources_client_are_refused(dynamodb_url: str, client: DynamoDBClient, orders: str) -> None:
    table: Any = SESSION.resource("dynamodb", endpoint_url=dynamodb_url).Table(orders)
    with pytest.raises(errors.ConfigurationError, match="not a resource or a table"):
        put_once(table, orders, {"id": "a", "line": 1})
    with pytest.raises(errors.ConfigurationError, match="the client is a resource's"):
        put_once(table.meta.client, orders, {"id": "a", "line": 1})
    assert stored(client, orders) == []


async def test_a_client_of_the_other_colour_is_refused(client: DynamoDBClient, dynamodb_url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="use put_once"):
        await aput_once(client, "orders", {"id": "a"})
    async with loop_client_of(dynamodb_url) as loop_client:
        with pytest.raises(errors.ConfigurationError, match="use aput_once"):
            put_once(loop_client, "orders", {"id": "a"})
