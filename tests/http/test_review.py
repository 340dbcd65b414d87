"""Apps, callables and disks that misbehave: what the layer does must stay definite, and the effect single."""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from retryproof.core.errors import ConfigurationError, Unreadable
from retryproof.http import body as bodies
from retryproof.http import by_user
from retryproof.http.body import Body, Budget, OverBudget
from retryproof.http.key_source import json_field
from retryproof.http.types import AsgiScope, Receive, Send
from retryproof.stores.memory import MemoryStore
from tests.http.conftest import MakeLayer
from tests.http.harness import Counting, Events, call, new_key, read_body, start

JSON = (b"content-type", b"application/json")


def responding(*messages: dict[str, Any]) -> Any:
    """An app that reads the body and sends these messages."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        for message in messages:
            await send(message)

    return app


# Callables that are wrong


def raises(*_: object) -> bool:
    raise ZeroDivisionError


async def asynchronous(*_: object) -> bool:
    return False


@pytest.mark.parametrize("option", ["policy", "required", "endpoint", "fail_open", "store_when", "scope", "key"])
def test_a_coroutine_function_is_refused_where_a_plain_callable_is_wanted(layer: MakeLayer, option: str) -> None:
    """A coroutine is true: `fail_open=async def` would open every route."""
    with pytest.raises(ConfigurationError, match=option):
        layer(Counting(), **{option: asynchronous})


class AsyncCall:
    async def __call__(self, scope: AsgiScope) -> bool:
        return False


async def test_c10_an_answer_of_another_type_does_not_open_a_route(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, store=Unreachable(), fail_open=AsyncCall())
    with pytest.raises(ConfigurationError, match="fail_open"):
        await call(covered, key=new_key())
    assert app.effects == 0


@pytest.mark.parametrize("option", ["fail_open", "policy", "required", "endpoint", "scope", "fingerprint"])
async def test_a_callable_that_raises_does_so_before_anything_is_claimed(layer: MakeLayer, option: str) -> None:
    app, store, key, left = Counting(), MemoryStore(), new_key(), bodies.BUDGET._left
    conversation = start(layer(app, store=store, **{option: raises}), key=None if option == "required" else key)
    conversation.give(b"x" * (2 * bodies.SPOOL_FROM), more=True)
    conversation.give()
    with pytest.raises(ZeroDivisionError):
        await conversation.end()
    assert (app.effects, list(store.scan())) == (0, [])
    assert bodies.BUDGET._left == left


class Unreachable(MemoryStore):
    """A store that fails each claim."""

    error: Exception = OSError("down")

    def claim(self, claims: Any) -> Any:
        raise self.error


async def test_c21_a_record_that_cannot_be_read_is_never_run_even_where_the_route_fails_open(layer: MakeLayer) -> None:
    class Damaged(Unreachable):
        error = Unreadable("The record has version 9.")

    app = Counting()
    answer = await call(layer(app, store=Damaged(), fail_open=True), key=new_key())
    assert (answer.status, answer.code, app.effects) == (503, "record-unreadable", 0)


async def test_h8_a_store_when_that_raises_leaves_no_lease_that_is_renewed_for_good(layer: MakeLayer) -> None:
    """The handler has run: its answer is judged by the default rule, and a retry gets it."""
    app, key = Counting(), new_key()
    covered = layer(app, store_when=raises)
    first = await call(covered, key=key)
    again = await call(covered, key=key)
    assert (first.status, again.status, again.replayed, app.effects) == (201, 201, True, 1)
    assert covered._engine.opened().background.idle


async def test_h8_a_store_when_that_raises_lets_a_failure_be_tried_again(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        raise LookupError

    covered, key = layer(app, store_when=raises), new_key()
    for _ in range(2):
        with pytest.raises(LookupError):
            await call(covered, key=key)


class Exits(BaseException):
    """Like SystemExit, which pytest would take for itself."""


async def test_c5_what_is_no_exception_ends_the_renewal(layer: MakeLayer) -> None:
    """A handler that calls `sys.exit` in a server that survives it: the record waits for the end of its lease."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        raise Exits

    covered, key, events = layer(app, events=(events := Events(),)), new_key(), events
    with pytest.raises(Exits):
        await call(covered, key=key)
    assert covered._engine.opened().background.idle
    assert (await call(covered, key=key)).code == "in-progress"
    assert events.kinds == ["unknown", "in_progress"]


@pytest.mark.parametrize("who", ["method", "object"])
async def test_h5_by_user_refuses_an_identity_that_is_an_address_in_memory(who: str) -> None:
    class User:
        def identity(self) -> str:
            return "someone"

    class Holder:
        id = object()

    with pytest.raises(ConfigurationError, match="by_user"):
        by_user({"user": User() if who == "method" else Holder()})


# Apps that are odd


async def test_h9_headers_may_be_any_iterable(layer: MakeLayer) -> None:
    """ASGI calls them an iterable; one that can be read once is read once."""

    def headers() -> Iterator[tuple[bytes, bytes]]:
        yield b"x-one", b"1"

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": headers()})
        await send({"type": "http.response.body", "body": b"a"})

    covered, key = layer(app), new_key()
    assert (await call(covered, key=key)).values(b"x-one") == [b"1"]
    again = await call(covered, key=key)
    assert (again.replayed, again.values(b"x-one")) == (True, [b"1"])


async def test_h9_a_buffer_that_the_app_uses_again_does_not_change_what_was_kept(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        buffer = bytearray(2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"ab", b"cd"):
            buffer[:] = part
            await send({"type": "http.response.body", "body": memoryview(buffer), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    covered, key = layer(app), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).body == b"abcd"


@pytest.mark.needs("messages")
async def test_h14_a_second_start_does_not_overtake_the_first(layer: MakeLayer) -> None:
    """A server refuses it; so does the layer, before anything was sent."""
    app = responding(
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.start", "status": 500, "headers": []},
        {"type": "http.response.body", "body": b"a"},
    )
    conversation = start(layer(app), key=new_key())
    conversation.give()
    with pytest.raises(RuntimeError, match=r"http\.response\.start"):
        await conversation.end()
    assert conversation.sent == []


async def test_h9_the_mark_of_a_replay_is_the_layers_own(layer: MakeLayer) -> None:
    """An app may hand on the marked response of another protected service; a replay of it is not marked twice."""
    theirs = [(b"Idempotency-Replayed", b"true"), (b"x-one", b"1")]
    covered, key = layer(Counting(headers=theirs)), new_key()
    first, again = await call(covered, key=key), await call(covered, key=key)
    assert first.values(b"idempotency-replayed") == again.values(b"idempotency-replayed") == [b"true"]
    assert first.values(b"x-one") == again.values(b"x-one") == [b"1"]


async def test_h14_undoing_a_coding_drops_digests_of_the_coded_bytes(layer: MakeLayer) -> None:
    import gzip

    coded = gzip.compress(b"plain")
    headers = [(b"content-encoding", b"gzip"), (b"content-digest", b"sha-256=:x:"), (b"etag", b'"coded"')]
    app = responding(
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": coded},
    )
    covered, key = layer(app), new_key()
    await call(covered, key=key, headers=[(b"accept-encoding", b"gzip")])
    again = await call(covered, key=key, headers=[(b"accept-encoding", b"identity")])
    assert (again.body, again.values(b"content-digest"), again.values(b"etag")) == (b"plain", [], [])


# Bodies


async def test_h2_a_large_upload_that_is_no_json_passes_where_the_key_is_a_field(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, key=json_field("idempotency_key"))
    upload = b"--b\r\n" + b"x" * (2 * 1024 * 1024)
    answer = await call(covered, body=upload, headers=[(b"content-type", b"multipart/form-data; boundary=b")])
    assert (answer.status, app.bodies) == (201, [upload])
    large = b'{"a": "' + b"x" * (2 * 1024 * 1024) + b'"}'
    assert (await call(covered, body=large, headers=[JSON])).code == "key-invalid"


def test_h7_a_full_disk_gives_its_budget_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115  # as the real one
    budget = Budget(10 * bodies.SPOOL_FROM)
    body = Body(budget)
    with pytest.raises(OverBudget):
        body.append(b"x" * (bodies.SPOOL_FROM + 1))
    body.close()
    budget.take(10 * bodies.SPOOL_FROM)


@pytest.mark.needs("interrupted reading")
@pytest.mark.parametrize("end", ["leave", "too large", "fails", "cancelled"])
async def test_h7_every_early_end_gives_the_budget_back(layer: MakeLayer, end: str) -> None:
    left = bodies.BUDGET._left
    limit = 3 * bodies.SPOOL_FROM
    conversation = start(layer(Counting(), max_body=limit), key=new_key())
    conversation.give(b"x" * (2 * bodies.SPOOL_FROM), more=True)
    for _ in range(5):  # what was given is read in the first turns of the loop
        await asyncio.sleep(0)
    assert bodies.BUDGET._left < left
    match end:
        case "leave":
            conversation.leave()
            await asyncio.wait({conversation.task})
        case "too large":
            conversation.give(b"x" * (bodies.SPOOL_FROM + 1))
            assert (await conversation.end()).code == "body-too-large"
        case "fails":
            conversation.put({"type": "http.request", "body": None, "more_body": True})
            with pytest.raises(TypeError):
                await conversation.end()
        case _:
            conversation.task.cancel()
            await asyncio.wait({conversation.task})
    assert bodies.BUDGET._left == left


async def test_h7_a_body_of_exactly_the_limit_is_taken(layer: MakeLayer) -> None:
    covered = layer(Counting(), max_body=10)
    assert (await call(covered, key=new_key(), body=b"x" * 10)).status == 201
    assert (await call(covered, key=new_key(), body=b"x" * 11)).code == "body-too-large"


# Memory


async def test_nothing_is_left_of_requests_that_are_over(layer: MakeLayer) -> None:
    """New keys, replays, refusals and failures, with records that stay bounded."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        if b"fail" in await read_body(receive):
            raise LookupError
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-one", b"1")]})
        await send({"type": "http.response.body", "body": b"a"})

    covered = layer(app, events=())
    key = new_key()

    async def round_(times: int) -> None:
        for _ in range(times):
            await call(covered, key=key)
            await call(covered, key=key, body=b"other")
            await call(covered, key=b"a, b")
            with pytest.raises(LookupError):
                await call(covered, key=key + "f", body=b"fail")

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    await round_(50)
    before = objects()
    await round_(500)
    assert objects() - before < 1_000  # one an exchange would be 2 000; timers that were cancelled go in time
    assert not getattr(covered._engine, "running", ())  # tasks, where there are some


# Layers and mounts


async def test_h1_an_outer_layer_that_finds_no_key_leaves_the_request_to_an_inner_one(layer: MakeLayer) -> None:
    app, key = Counting(), new_key()
    outer = layer(layer(app), key=json_field("idempotency_key"))
    assert not (await call(outer, key=key)).replayed
    assert (await call(outer, key=key)).replayed
    assert app.effects == 1


async def test_h5_mounts_that_shorten_the_path_do_not_meet_where_raw_path_is_absent(layer: MakeLayer) -> None:
    app, key = Counting(), new_key()
    covered = layer(app)
    for root in ("/one", "/two"):
        assert not (await call(covered, key=key, raw_path=None, root_path=root)).replayed
    assert app.effects == 2
    whole = await call(covered, path="/one/charges", key=key, raw_path=None, root_path="/one")
    assert whole.replayed  # as newer mounts say the same


async def test_h5_a_path_that_is_no_unicode_is_a_path(layer: MakeLayer) -> None:
    assert (await call(layer(Counting()), key=new_key(), raw_path=None, path="/\udcff")).status == 201
