"""H9, H10: what is stored is what the app sent, whatever lies outside; and a wrong length is no response."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import pytest
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

from retryproof.core.errors import OutcomeUnknown
from retryproof.core.policy import Policy
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from tests.http.conftest import MakeLayer
from tests.http.harness import call, new_key, read_body, start
from tests.http.scripts import head, part, settled_code

TEXT = b"the same text " * 100
ORIGIN = (b"origin", b"https://one.example")


def answering(*parts: bytes) -> App:
    """An app that answers in these parts, from one message that it uses again."""
    first = head((b"content-type", b"text/plain"), (b"x-own", b"1"), status=201)

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(first)
        for body in parts[:-1]:
            await send(part(body))
        await send(part(parts[-1], more=False))

    return app


def turned_into_503(app: ASGIApp) -> App:
    """An outer layer that makes a failure of every response, in the message that it is given."""

    async def outer(scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def sending(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["status"] = 503
                message["headers"].clear()
            await send(message)

        await app(scope, receive, sending)

    return outer


def with_a_session(app: ASGIApp) -> App:
    """An outer layer that sets a cookie, in the way of Starlette's SessionMiddleware."""

    async def outer(scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def sending(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("set-cookie", "session=the first caller's")
            await send(message)

        await app(scope, receive, sending)

    return outer


OUTER: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda app: GZipMiddleware(app, minimum_size=10),
    "sessions": with_a_session,
    "cors": lambda app: CORSMiddleware(app, allow_origins=[ORIGIN[1].decode()], allow_credentials=True),
    "503": turned_into_503,
}


@pytest.mark.parametrize("parts", [(TEXT,), (TEXT[:100], TEXT[100:]), (TEXT, b"")], ids=["one", "stream", "empty end"])
@pytest.mark.parametrize("outer", list(OUTER))
async def test_h9_what_is_stored_is_what_the_app_sent(layer: MakeLayer, outer: str, parts: tuple[bytes, ...]) -> None:
    covered, key = layer(answering(*parts)), new_key()
    first = await call(OUTER[outer](covered), key=key, headers=[(b"accept-encoding", b"gzip"), ORIGIN])
    assert first.status == (503 if outer == "503" else 201)
    replay = await call(covered, key=key)
    assert (replay.status, replay.body, replay.replayed) == (201, TEXT, True)
    assert replay.headers == [
        (b"content-type", b"text/plain"),
        (b"x-own", b"1"),
        (b"content-length", b"%d" % len(TEXT)),
        (b"idempotency-replayed", b"true"),
    ]


async def test_h14_a_retry_through_an_outer_gzip_can_be_read(layer: MakeLayer) -> None:
    app, key = GZipMiddleware(layer(answering(TEXT[:100], TEXT[100:])), minimum_size=10), new_key()
    for _ in range(2):
        answer = await call(app, key=key, headers=[(b"accept-encoding", b"gzip")])
        assert (answer.values(b"content-encoding"), gzip.decompress(answer.body)) == ([b"gzip"], TEXT)


async def test_h9_an_app_that_changes_its_head_after_sending_it_changes_nothing(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        start_of_it = head((b"x-own", b"1"))
        await send(start_of_it)
        start_of_it["status"] = 500
        start_of_it["headers"].append((b"x-late", b"1"))
        await send(part(b"a", more=False))

    covered, key = layer(app), new_key()
    for _ in range(2):
        answer = await call(covered, key=key)
        assert (answer.status, answer.values(b"x-own"), answer.values(b"x-late")) == (200, [b"1"], [])


# H10: lengths

LENGTH_3 = (b"content-length", b"3")
WRONG: dict[str, list[AsgiMessage]] = {
    "short": [part(b"ab", more=False)],
    "long": [part(b"abcd", more=False)],
    "a short stream": [part(b"a"), part(b"b", more=False)],
    "a long stream": [part(b"ab"), part(b"cd"), part(b"", more=False)],
    "without its end": [part(b"ab")],
}


@pytest.mark.parametrize("how", list(WRONG))
async def test_h10_a_response_of_another_length_is_cut_and_its_outcome_unknown(layer: MakeLayer, how: str) -> None:
    ended = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(head(LENGTH_3))
        for message in WRONG[how]:
            await send(message)
        ended.append(how)

    covered, key = layer(app, policy=Policy(lease=0.05, on_abandoned="refuse")), new_key()
    conversation = start(covered, key=key)
    conversation.give()
    with pytest.raises(OutcomeUnknown, match="cut"):
        await conversation.end()
    assert not conversation.answer.complete
    assert len(conversation.answer.body) < 3
    assert await settled_code(covered, key) == "outcome-unknown"
    assert ended == [how]


async def test_h8_an_app_that_raises_after_a_wrong_length_has_raised(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(head(LENGTH_3))
        await send(part(b"abcd"))
        raise ZeroDivisionError

    covered, key = layer(app), new_key()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await call(covered, key=key)


@pytest.mark.parametrize("status", [204, 304])
async def test_h10_a_length_without_a_body_is_no_mismatch_where_there_is_none(layer: MakeLayer, status: int) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send(head(LENGTH_3, status=status))
        await send(part(b"", more=False))

    covered, key = layer(app), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).replayed
