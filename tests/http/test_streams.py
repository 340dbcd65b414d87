"""H10 and H14: what is sent when, message by message."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from retryproof.core.errors import OutcomeUnknown
from retryproof.core.policy import Policy
from retryproof.http.types import AsgiMessage, AsgiScope, Receive, Send
from tests.http.conftest import MakeLayer
from tests.http.harness import call, new_key, start
from tests.http.scripts import Script, head, part, sent, settled_code


@pytest.mark.needs("messages")
async def test_h10_a_stream_flows_as_it_is_produced(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a"), part(b"b"), part(b"c", more=False), paused=2)
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(2))
    app.go_on.set()
    answer = await conversation.end()
    assert answer.messages == list(app.messages)
    replay = await call(covered, key=key, body=b"")
    assert (replay.body, replay.replayed, app.runs) == (b"abc", True, 1)
    assert replay.values(b"content-length") == [b"3"]


async def test_h10_the_last_message_of_a_stream_is_held_until_it_is_stored(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a"), part(b"", more=False))
    covered, key = layer(app), new_key()
    replayed_at_end = []

    async def spying(scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def spy(message: AsgiMessage) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                replayed_at_end.append((await call(covered, key=key, body=b"")).replayed)
            await send(message)

        await covered(scope, receive, spy)

    await call(spying, key=key, body=b"")
    assert replayed_at_end == [True]


async def test_c4_a_single_message_is_held_until_it_is_stored(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a", more=False))
    covered, key = layer(app), new_key()
    replayed_at_head = []

    async def spying(scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def spy(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                replayed_at_head.append((await call(covered, key=key, body=b"")).replayed)
            await send(message)

        await covered(scope, receive, spy)

    await call(spying, key=key, body=b"")
    assert replayed_at_head == [True]


BODY_HEADERS = [(b"content-type", b"text/plain"), (b"content-length", b"2048"), (b"etag", b'"1"')]


@pytest.mark.parametrize(
    "parts", [[part(b"a" * 2048, more=False)], [part(b"a" * 1024), part(b"a" * 1024, more=False)]], ids=["one", "two"]
)
async def test_h10_over_the_limit_the_replay_says_that_it_was_omitted(
    layer: MakeLayer, parts: list[AsgiMessage]
) -> None:
    app = Script(head(*BODY_HEADERS, (b"location", b"/1"), status=201), *parts)
    covered, key = layer(app, policy=Policy(max_result=1024)), new_key()
    first = await call(covered, key=key, body=b"")
    assert first.body == b"a" * 2048
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.body, replay.replayed, app.runs) == (201, b"", True, 1)
    assert replay.headers == [
        (b"location", b"/1"),
        (b"content-length", b"0"),
        (b"idempotency-replayed", b"true"),
        (b"idempotency-replay", b"omitted"),
    ]


@pytest.mark.parametrize("limit", [30, 0])
async def test_h10_a_tombstone_fits_any_limit(layer: MakeLayer, limit: int) -> None:
    app = Script(head((b"x-long", b"a" * 100), status=201), part(b"a", more=False))
    covered, key = layer(app, policy=Policy(max_result=limit)), new_key()
    await call(covered, key=key, body=b"")
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.body, app.runs) == (201 if limit else 200, b"", 1)
    assert replay.values(b"idempotency-replay") == [b"omitted"]


async def test_h10_an_event_stream_is_never_kept(layer: MakeLayer) -> None:
    app = Script(
        head((b"content-type", b"text/event-stream; charset=utf-8")), part(b"data: 1\n\n"), part(b"", more=False)
    )
    covered, key = layer(app), new_key()
    assert (await call(covered, key=key, body=b"")).body == b"data: 1\n\n"
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.body, replay.values(b"idempotency-replay"), app.runs) == (200, b"", [b"omitted"], 1)


async def test_h8_a_stream_that_fails_is_released_and_cut(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a"), ZeroDivisionError())
    covered, key = layer(app), new_key()
    for _ in range(2):
        conversation = start(covered, key=key)
        conversation.give()
        with pytest.raises(ZeroDivisionError):
            await conversation.end()
        assert not conversation.answer.complete
    assert app.runs == 2


async def test_h8_a_streamed_refusal_is_released(layer: MakeLayer) -> None:
    app = Script(head(status=503), part(b"a"), part(b"b", more=False))
    covered, key = layer(app), new_key()
    for _ in range(2):
        assert (await call(covered, key=key, body=b"")).body == b"ab"
    assert app.runs == 2


async def test_h11_an_app_that_answers_nothing_leaves_its_outcome_unknown(layer: MakeLayer) -> None:
    app = Script()
    covered, key = layer(app), new_key()
    assert (await call(covered, key=key, body=b"")).messages == []
    assert (await call(covered, key=key, body=b"")).code == "in-progress"
    assert app.runs == 1


@pytest.mark.needs("unfinished responses")
@pytest.mark.parametrize("messages", [[], [part(b"a")]], ids=["head held", "streaming"])
async def test_h11_an_app_that_stops_half_way_is_cut_and_its_outcome_unknown(
    layer: MakeLayer, messages: list[AsgiMessage]
) -> None:
    app = Script(head(status=201), *messages)
    covered, key = layer(app, policy=Policy(lease=0.05, on_abandoned="refuse")), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    with pytest.raises(OutcomeUnknown, match="cut"):
        await conversation.end()
    assert conversation.sent == [*app.messages][: 2 * len(messages)]
    assert await settled_code(covered, key) == "outcome-unknown"
    assert app.runs == 1


async def test_work_after_the_response_goes_on_after_it_was_stored(layer: MakeLayer) -> None:
    events: list[str] = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send(head())
        await send(part(b"", more=False))
        events.append("background")

    async def watching(scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def watch(message: AsgiMessage) -> None:
            events.append(message["type"])
            await send(message)

        await covered(scope, receive, watch)

    covered, key = layer(app), new_key()
    await call(watching, key=key)
    assert events == ["http.response.start", "http.response.body", "background"]
    assert (await call(covered, key=key)).replayed


async def test_an_exception_after_the_response_leaves_it_stored(layer: MakeLayer) -> None:
    app = Script(head(), part(b"a", more=False), ZeroDivisionError())
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    with pytest.raises(ZeroDivisionError):
        await conversation.end()
    assert conversation.answer.body == b"a"
    assert (await call(covered, key=key, body=b"")).replayed
    assert app.runs == 1


# H14


@pytest.mark.needs("messages")
async def test_h14_trailers_arrive_and_leave_a_tombstone(layer: MakeLayer) -> None:
    trailers: AsgiMessage = {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False}
    app = Script(head(status=201, trailers=True), part(b"a", more=False), trailers)
    covered, key = layer(app), new_key()
    assert (await call(covered, key=key, body=b"")).messages == list(app.messages)
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.values(b"idempotency-replay"), app.runs) == (201, [b"omitted"], 1)


@pytest.mark.needs("messages")
async def test_h14_early_hints_and_pushes_go_out_at_once(layer: MakeLayer) -> None:
    hint: AsgiMessage = {"type": "http.response.early_hint", "links": [b"</a>"]}
    app = Script(hint, head(), part(b"a", more=False), paused=1)
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(1))
    assert conversation.sent == [hint]
    app.go_on.set()
    assert (await conversation.end()).messages == list(app.messages)
    assert (await call(covered, key=key, body=b"")).body == b"a"


@pytest.mark.needs("messages")
async def test_h14_ways_around_the_layer_are_not_offered(layer: MakeLayer) -> None:
    seen: dict[str, Any] = {}

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        seen.update(scope["extensions"])
        await send(head())
        await send(part(b"", more=False))

    extensions: dict[str, Any] = {"http.response.pathsend": {}, "http.response.zerocopysend": {}, "tls": {"a": 1}}
    await call(layer(app), key=new_key(), extensions=extensions)
    assert seen == {"tls": {"a": 1}}
    await call(layer(app), extensions=extensions)
    assert seen == extensions


@pytest.mark.needs("messages")
async def test_h14_a_file_sent_all_the_same_arrives_and_leaves_a_tombstone(layer: MakeLayer) -> None:
    app = Script(head(), {"type": "http.response.pathsend", "path": "/file"})
    covered, key = layer(app), new_key()
    assert (await call(covered, key=key, body=b"")).messages == list(app.messages)
    assert (await call(covered, key=key, body=b"")).values(b"idempotency-replay") == [b"omitted"]
    assert app.runs == 1


async def test_h14_a_compressed_response_is_undone_for_who_does_not_take_it(layer: MakeLayer) -> None:
    packed = gzip.compress(b"hello")
    headers = [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
    covered, key = layer(Script(head(*headers), part(packed, more=False))), new_key()
    await call(covered, key=key, body=b"", headers=[(b"accept-encoding", b"gzip")])
    same = await call(covered, key=key, body=b"", headers=[(b"accept-encoding", b"br, gzip;q=0.5")])
    assert (same.body, same.values(b"content-encoding")) == (packed, [b"gzip"])
    other = await call(covered, key=key, body=b"", headers=[(b"accept-encoding", b"gzip;q=0, identity")])
    assert (other.body, other.values(b"content-encoding"), other.values(b"vary")) == (
        b"hello",
        [],
        [b"accept-encoding"],
    )
    assert other.values(b"content-length") == [b"5"]


@pytest.mark.needs("messages")
async def test_h14_an_interim_response_goes_out_at_once_and_is_not_kept(layer: MakeLayer) -> None:
    hint = head((b"link", b"</a>"), status=103)
    app = Script(hint, head(status=201), part(b"a", more=False), paused=1)
    covered, key = layer(app), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    await conversation.until(sent(1))
    assert conversation.sent == [hint]
    app.go_on.set()
    await conversation.end()
    replay = await call(covered, key=key, body=b"")
    assert (replay.status, replay.body, replay.values(b"link")) == (201, b"a", [])
