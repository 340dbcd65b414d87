"""What one client can make a process hold or compute has a limit (H6, H7, H14)."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Iterator
from time import perf_counter

import pytest

from retryproof.core import fingerprint
from retryproof.core.errors import ConfigurationError
from retryproof.core.fingerprint import MAX_JSON, Method, raw
from retryproof.core.multipart import MAX_PARTS
from retryproof.http import single_tenant
from retryproof.http.body import BUDGET, SHARE, SLOWEST, Body, Budget, OverBudget, deadline
from retryproof.http.semantics import UNDO_LIMIT, undone
from retryproof.http.types import App, AsgiScope, Receive, Send
from tests.http.conftest import MakeLayer
from tests.http.harness import Answer, Conversation, Counting, call, new_key, start

MIB = 1024 * 1024
JSON = (b"content-type", b"application/json")


def answering(headers: list[tuple[bytes, bytes]], body: bytes) -> App:
    """An app that gives this answer to everybody."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


# Content codings of a stored response


async def replay(layer: MakeLayer, coding: bytes, body: bytes) -> Answer:
    """What a caller without any coding is replayed."""
    covered, key = layer(answering([(b"content-encoding", coding), (b"x-kept", b"1")], body)), new_key()
    await call(covered, key=key, headers=[(b"accept-encoding", coding)])
    return await call(covered, key=key, headers=[(b"accept-encoding", b"identity")])


def assert_omitted(answer: Answer) -> None:
    assert (answer.status, answer.body) == (200, b"")
    assert answer.values(b"idempotency-replay") == [b"omitted"]
    assert answer.values(b"content-encoding") == []
    assert answer.values(b"x-kept") == [b"1"]


async def test_h14_a_gzip_bomb_is_replayed_as_omitted(layer: MakeLayer) -> None:
    bomb = gzip.compress(b"\0" * (200 * MIB), compresslevel=9)
    assert len(bomb) < MIB
    covered, key = layer(answering([(b"content-encoding", b"gzip"), (b"x-kept", b"1")], bomb)), new_key()
    await call(covered, key=key, headers=[(b"accept-encoding", b"gzip")])
    tracemalloc.start()
    answer = await call(covered, key=key, headers=[(b"accept-encoding", b"identity")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_omitted(answer)
    assert peak < 4 * UNDO_LIMIT


@pytest.mark.needs("loop")
async def test_h14_undoing_a_coding_leaves_the_loop_to_others(layer: MakeLayer) -> None:
    covered, key = (
        layer(answering([(b"content-encoding", b"gzip")], gzip.compress(b"\0" * (UNDO_LIMIT - 1)))),
        new_key(),
    )
    await call(covered, key=key, headers=[(b"accept-encoding", b"gzip")])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.ensure_future(others())
    answer = await call(covered, key=key, headers=[(b"accept-encoding", b"identity")])
    other.cancel()
    assert answer.body == b"\0" * (UNDO_LIMIT - 1)
    assert turns > 20


async def test_h14_every_member_of_a_gzip_body_is_undone(layer: MakeLayer) -> None:
    answer = await replay(layer, b"gzip", gzip.compress(b"one ") + gzip.compress(b"two ") + gzip.compress(b"three"))
    assert answer.body == b"one two three"
    assert answer.values(b"idempotency-replay") == []


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        (b"gzip", gzip.compress(b"cut short")[:-3]),
        (b"gzip", gzip.compress(b"and then") + b"something else"),
        (b"gzip", b"not gzip at all"),
        (b"deflate", zlib.compress(b"one") + zlib.compress(b"two")[:-1]),
        (b"br", b"\x0b\x02\x80plain\x03"),
        (b"gzip, br", gzip.compress(b"twice coded")),
    ],
    ids=["cut", "trailing", "wrong", "deflate", "unknown", "two"],
)
async def test_h14_what_cannot_be_undone_in_whole_is_replayed_as_omitted(
    layer: MakeLayer, coding: bytes, body: bytes
) -> None:
    assert_omitted(await replay(layer, coding, body))


def test_h14_several_small_members_count_together() -> None:
    member = gzip.compress(b"\0" * (UNDO_LIMIT // 4))
    assert undone([b"gzip"], member * 4) == b"\0" * UNDO_LIMIT
    assert undone([b"gzip"], member * 4 + gzip.compress(b"\0")) is None


# Fingerprints


def test_h6_long_media_types_and_paths_do_not_stay_in_memory() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(200):
        long = b"%d" % number + b"x" * MIB
        for request in ((b"/", b"", long), (long, b"", b""), (b"/", long, b"")):
            raw.begin("POST", *request).digest()
            fingerprint.json.begin("POST", *request).digest()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept < 2 * MIB


def multipart(parts: int) -> bytes:
    return b"".join(b"--b\r\nA: b\r\n\r\nx\r\n" for _ in range(parts)) + b"--b--"


def method_of(body: bytes, content_type: bytes, strategy: fingerprint.Strategy = raw) -> int:
    hasher = strategy.begin("POST", b"/", b"", content_type)
    for start_ in range(0, len(body), 65_536):
        hasher.update(body[start_ : start_ + 65_536])
    return hasher.digest()[1]


def test_h6_a_multipart_body_of_very_many_parts_is_taken_byte_for_byte() -> None:
    content_type = b"multipart/form-data; boundary=b"
    assert method_of(multipart(MAX_PARTS), content_type) == Method.MULTIPART
    assert method_of(multipart(MAX_PARTS + 1), content_type) == Method.RAW


@pytest.mark.parametrize("strategy", [fingerprint.json, fingerprint.fields("/0")], ids=["json", "fields"])
def test_h6_a_json_body_past_the_limit_is_taken_byte_for_byte(strategy: fingerprint.Strategy) -> None:
    largest = b"[" + b" " * (MAX_JSON - 2) + b"]"
    assert method_of(largest, JSON[1], strategy) in (Method.JSON, Method.FIELDS)
    assert method_of(largest + b" ", JSON[1], strategy) == Method.RAW
    begun = strategy.begin("POST", b"/", b"", JSON[1])
    begun.update(largest + b" ")
    plain = raw.begin("POST", b"/", b"", JSON[1])
    plain.update(largest + b" ")
    assert begun.digest() == plain.digest()


@pytest.mark.needs("loop")
@pytest.mark.quiet
async def test_h6_a_large_json_body_is_parsed_beside_the_loop(layer: MakeLayer) -> None:
    covered = layer(Counting(), fingerprint=fingerprint.json)
    body = b"[" + b"1.5," * (MAX_JSON // 4 - 1) + b"1]"
    longest, last, done = 0.0, perf_counter(), False

    async def others() -> None:
        nonlocal longest, last
        while not done:
            await asyncio.sleep(0.001)
            longest, last = max(longest, perf_counter() - last), perf_counter()

    began = perf_counter()
    other = asyncio.ensure_future(others())
    answer = await call(covered, key=new_key(), body=body, headers=[JSON])
    done = True
    await other
    assert answer.status == 201
    assert longest < max(0.1, (perf_counter() - began) / 2)


# Bodies that are on their way


def test_h7_small_bodies_in_several_messages_count_towards_the_budget() -> None:
    budget = Budget(100)
    body = Body(budget)
    body.append(b"x" * 100)
    with pytest.raises(OverBudget):
        Body(budget).append(b"x")
    body.close()
    body.close()
    budget.take(100)


def test_h7_a_caller_holds_its_share_and_no_more() -> None:
    budget = Budget(100)
    mine, others = Body(budget, "me", 40), Body(budget, "you", 40)
    mine.append(b"x" * 40)
    with pytest.raises(OverBudget):
        Body(budget, "me", 40).append(b"x")
    others.append(b"x" * 40)
    mine.close()
    Body(budget, "me", 40).append(b"x" * 40)


def test_h7_nobody_is_remembered_for_nothing() -> None:
    budget = Budget(100)
    body = Body(budget, "me", 40)
    body.append(b"")
    body.close()
    assert not budget._held


@pytest.mark.parametrize(
    ("now", "size", "expected"),
    [
        (0.0, 0, 30.0),
        (20.0, 0, 30.0),  # nothing has come: it drips
        (20.0, 100 * SLOWEST, 50.0),  # it came at a good rate, and may stall for as long as any
        (20.0, 10 * SLOWEST, 40.0),
    ],
)
def test_h7_a_body_may_neither_stall_nor_drip(now: float, size: int, expected: float) -> None:
    assert deadline(0.0, now, size, 30.0) == expected


async def stalled(app: App) -> Conversation:
    """An upload of which 2 MiB have come."""
    conversation = start(app, key=new_key(), headers=[(b"x-api-key", b"mallory")])
    for _ in range(2):
        conversation.give(b"x" * MIB, more=True)
    for _ in range(5):
        await asyncio.sleep(0)
    return conversation


@pytest.mark.needs("interrupted reading")
async def test_h7_a_stalled_body_is_given_up_and_its_bytes_are_given_back(layer: MakeLayer) -> None:
    app, left = Counting(), BUDGET._left
    answer = await (await stalled(layer(app, body_timeout=0.05))).end()
    assert (answer.status, answer.code, app.effects) == (408, "body-timeout", 0)
    assert BUDGET._left == left


def by_key(scope: AsgiScope) -> str | None:
    """The caller's name, in a header."""
    return dict(scope["headers"]).get(b"x-api-key", b"").decode() or None


@pytest.fixture
def mallory_holds() -> Iterator[int]:
    """Another route's uploads of the same caller: all of its share but 4 MiB."""
    held = SHARE - 4 * MIB
    BUDGET.take(held, "mallory", SHARE)
    yield held
    BUDGET.give(held, "mallory")
    assert not BUDGET._held


async def upload(app: App, name: bytes) -> Answer:
    conversation = start(app, key=new_key(), headers=[(b"x-api-key", name)])
    conversation.give(b"x", more=True)
    conversation.give(b"y")
    return await conversation.end()


@pytest.mark.needs("interrupted reading")
@pytest.mark.usefixtures("mallory_holds")
async def test_h7_one_callers_uploads_leave_room_for_the_others(layer: MakeLayer) -> None:
    covered = layer(Counting(), scope=by_key, max_body=3 * MIB)
    uploads = [await stalled(covered) for _ in range(2)]
    refused = await upload(covered, b"mallory")
    assert (refused.status, refused.code) == (503, "too-busy")
    assert (await upload(covered, b"alice")).status == 201
    for conversation in uploads:
        conversation.leave()
        await conversation.end()
    assert (await upload(covered, b"mallory")).status == 201


@pytest.mark.needs("interrupted reading")
@pytest.mark.usefixtures("mallory_holds")
async def test_h7_a_single_tenant_has_the_whole_budget(layer: MakeLayer) -> None:
    covered = layer(Counting(), scope=single_tenant, max_body=3 * MIB)
    uploads = [await stalled(covered) for _ in range(3)]
    assert (await upload(covered, b"mallory")).status == 201
    for conversation in uploads:
        conversation.leave()
        await conversation.end()


@pytest.mark.parametrize("value", [0, -1, "30", float("nan"), float("inf"), True, None])
def test_body_timeout_is_checked(layer: MakeLayer, value: object) -> None:
    with pytest.raises(ConfigurationError, match="body_timeout"):
        layer(Counting(), body_timeout=value)
