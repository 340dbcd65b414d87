"""H1 to H9 and H12, message by message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retryproof.core import fingerprint
from retryproof.core.commands import Acquired, Claim, Complete
from retryproof.core.errors import ConfigurationError, OutcomeUnknown
from retryproof.core.policy import Policy
from retryproof.http import by_header, by_host, by_user, single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.body import BUDGET, LIMIT
from retryproof.http.key_source import json_field
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from retryproof.stores.memory import MemoryStore
from tests.http.conftest import MakeLayer
from tests.http.harness import (
    Answer,
    Counting,
    Events,
    call,
    closing,
    layered,
    new_key,
    read_body,
    request_scope,
    start,
)

# H1


@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_h1_covers_post_and_patch_by_default(layer: MakeLayer, method: str) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    first = await call(covered, method, key=key)
    second = await call(covered, method, key=key)
    assert (first.body, second.body, app.effects) == (b'{"n": 1}', b'{"n": 1}', 1)
    assert (first.replayed, second.replayed) == (False, True)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "PUT", "DELETE"])
async def test_h1_leaves_other_methods_alone(layer: MakeLayer, method: str) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    for _ in range(2):
        assert not (await call(covered, method, key=key)).replayed
    assert app.effects == 2


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_h1_covers_put_and_delete_by_choice(layer: MakeLayer, method: str) -> None:
    app = Counting()
    covered, key = layer(app, methods=("POST", method)), new_key()
    await call(covered, method, key=key)
    assert (await call(covered, method, key=key)).replayed


@pytest.mark.needs("messages")
@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(request_scope("GET", key="k"), id="another method"),
        pytest.param(request_scope("POST"), id="no key"),
        pytest.param({"type": "websocket", "path": "/", "headers": []}, id="websocket"),
        pytest.param({"type": "something.new"}, id="unknown type"),
    ],
)
async def test_h1_hands_what_is_not_covered_on_as_it_is(layer: MakeLayer, scope: AsgiScope) -> None:
    seen: list[Any] = []

    async def app(*received: Any) -> None:
        seen.extend(received)

    async def receive() -> AsgiMessage:
        raise AssertionError("the layer read from a request that it does not cover")

    async def send(message: AsgiMessage) -> None:
        raise AssertionError("the layer sent something")

    before = dict(scope)
    await layer(app)(scope, receive, send)
    assert (seen[0] is scope, seen[1] is receive, seen[2] is send) == (True, True, True)
    assert scope == before


async def test_h1_a_policy_of_none_means_not_covered(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, policy=lambda scope: None if scope["path"] == "/free" else Policy())
    key = new_key()
    for _ in range(2):
        assert not (await call(covered, path="/free", key=key)).replayed
    await call(covered, path="/paid", key=key)
    assert (await call(covered, path="/paid", key=key)).replayed


async def test_h1_a_second_layer_further_in_lets_a_covered_request_pass(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(layer(app, store="memory://inner"), store="memory://inner")
    key = new_key()
    assert (await call(covered, key=key)).status == 201
    assert (await call(covered, key=key)).replayed


# H2, H3


async def test_h2_quoted_and_bare_spellings_name_the_same_key(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=f'"{key}"')).replayed
    assert (await call(covered, key=f'"{key}"; version=1')).replayed


async def test_h2_strict_takes_the_quoted_form_alone(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), strict=True), new_key()
    assert (await call(covered, key=key)).code == "key-invalid"
    assert (await call(covered, key=f'"{key}"')).status == 201


async def test_h2_another_header_can_hold_the_key(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, key="PayPal-Request-Id")
    headers = [(b"paypal-request-id", b"order-1")]
    await call(covered, headers=headers)
    assert (await call(covered, headers=headers)).replayed
    assert not (await call(covered, key="order-1")).replayed


async def test_h2_a_field_of_the_body_can_hold_the_key(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, key=json_field("idempotency_key"))
    body = json.dumps({"idempotency_key": new_key(), "amount": 1}).encode()
    await call(covered, body=body)
    assert (await call(covered, body=body)).replayed
    for without in (b"{}", b"[]", b"no json", b""):
        assert not (await call(covered, body=without)).replayed
    assert app.bodies == [body, b"{}", b"[]", b"no json", b""]


@pytest.mark.parametrize(
    "body", [b'{"k": ""}', b'{"k": 1}', b'{"k": "\\n"}', b'{"k": "a", "k": "b"}', b'{"k": "%b"}' % (b"a" * 256)]
)
async def test_h3_rejects_a_bad_key_in_the_body(layer: MakeLayer, body: bytes) -> None:
    app = Counting()
    assert (await call(layer(app, key=json_field("k")), body=body)).code == "key-invalid"
    assert app.effects == 0


async def test_h2_a_callable_can_find_the_key(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, key=lambda scope: scope["query_string"].decode() or None)
    await call(covered, query=b"abc")
    assert (await call(covered, query=b"abc")).replayed
    assert not (await call(covered, body=b"without")).replayed
    assert app.bodies == [b"{}", b"without"]


@pytest.mark.parametrize(
    "key",
    [b"", b" ", b'""', b"a" * 256, b"a\x00b", b"a\x7f", "é".encode(), b'"abc', b'abc"', b'"a" "b"', b"a, b", b'"a\\b"'],
)
async def test_h3_rejects_a_malformed_key_without_an_effect(layer: MakeLayer, key: bytes) -> None:
    app = Counting()
    answer = await call(layer(app), key=key)
    assert (answer.status, answer.code, app.effects) == (400, "key-invalid", 0)


async def test_h3_rejects_several_key_lines(layer: MakeLayer) -> None:
    app = Counting()
    answer = await call(layer(app), key="a", headers=[(b"idempotency-key", b"a")])
    assert (answer.code, app.effects) == ("key-invalid", 0)


async def test_h3_accepts_255_characters(layer: MakeLayer) -> None:
    assert (await call(layer(Counting()), key="a" * 255)).status == 201


@pytest.mark.parametrize(
    "key", ["1732419600", "order-1", "2026-11-24T03:21:17Z", "12345678-1234-1234-8234-123456789012"]
)
async def test_h3_strong_keys_refuse_what_can_be_guessed(layer: MakeLayer, key: str) -> None:
    app = Counting()
    answer = await call(layer(app, keys="strong"), key=key)
    assert (answer.code, app.effects) == ("key-invalid", 0)


async def test_h3_a_weak_key_is_an_event_and_a_malformed_one_is_not(layer: MakeLayer) -> None:
    events = Events()
    covered = layer(Counting(), keys="strong", events=(events,))
    await call(covered, key=b"\x00")
    assert events.kinds == []
    await call(covered, key="order-1")
    assert events.kinds == ["weak_key"]
    assert "order-1" not in repr(events)


async def test_h3_strong_keys_accept_a_random_uuid(layer: MakeLayer) -> None:
    assert (await call(layer(Counting(), keys="strong"), key=new_key())).status == 201


async def test_c11_no_problem_document_repeats_the_key(layer: MakeLayer) -> None:
    answer = await call(layer(Counting(), keys="strong"), key="my-secret-key")
    assert b"my-secret-key" not in answer.body
    assert b"my-secret-key" not in repr(answer.headers).encode()


# H4


async def test_h4_without_a_key_it_passes_through(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app)
    assert [(await call(covered)).body for _ in range(2)] == [b'{"n": 1}', b'{"n": 2}']


async def test_h4_a_required_key_is_asked_for(layer: MakeLayer) -> None:
    app = Counting()
    answer = await call(layer(app, required=True))
    assert (answer.status, answer.code, app.effects) == (400, "key-missing", 0)


async def test_h4_whether_a_key_is_required_can_depend_on_the_request(layer: MakeLayer) -> None:
    covered = layer(Counting(), required=lambda scope: scope["path"] == "/charges")
    assert (await call(covered)).code == "key-missing"
    assert (await call(covered, path="/notes")).status == 201


async def test_h4_a_required_field_of_the_body_is_asked_for(layer: MakeLayer) -> None:
    assert (await call(layer(Counting(), key=json_field("k"), required=True))).code == "key-missing"


# H5, H12


async def test_h12_another_callers_key_is_an_unseen_key(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app, scope=by_header("x-api-key")), new_key()
    first = await call(covered, key=key, headers=[(b"x-api-key", b"alice")])
    other = await call(covered, key=key, headers=[(b"x-api-key", b"bob")], body=b"other")
    assert (first.body, other.body, other.replayed) == (b'{"n": 1}', b'{"n": 2}', False)


@pytest.mark.parametrize("change", [{"path": "/refunds"}, {"method": "PATCH"}])
async def test_h5_method_and_path_belong_to_the_scope(layer: MakeLayer, change: dict[str, str]) -> None:
    covered, key = layer(Counting()), new_key()
    await call(covered, key=key)
    assert not (await call(covered, key=key, **change)).replayed  # type: ignore[arg-type]  # two strings by name


async def test_h5_a_pinned_endpoint_stands_for_method_and_path(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), endpoint="charge"), new_key()
    await call(covered, key=key, path="/v1/charges")
    # The path is part of the fingerprint: the record is found, and it is another request.
    assert (await call(covered, key=key, path="/v2/charges")).code == "key-reused"


async def test_h5_an_anonymous_caller_is_apart_from_all_others(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), scope=by_header("x-api-key")), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).replayed
    assert not (await call(covered, key=key, headers=[(b"x-api-key", b"alice")])).replayed


async def test_h5_an_anonymous_caller_needs_a_strong_key(layer: MakeLayer) -> None:
    app = Counting()
    covered = layer(app, scope=by_user)
    answer = await call(covered, key="order-1", user=None)
    assert (answer.code, app.effects) == ("key-invalid", 0)
    assert b"anonymous" in answer.body
    assert (await call(covered, key="order-1", user="alice")).status == 201


@pytest.mark.parametrize("choice", [by_user, by_user(absent="error"), by_host(by_user)], ids=["bare", "error", "host"])
async def test_h5_by_user_where_nothing_set_a_user_runs_nothing(layer: MakeLayer, choice: Any) -> None:
    """Without it everybody is one caller: another user with the same key got the first one's answer."""
    app = Counting()
    with pytest.raises(ConfigurationError, match="absent="):
        await call(layer(app, scope=choice), key=new_key())
    assert app.effects == 0


async def test_h5_by_user_may_say_that_who_has_no_user_is_anonymous(layer: MakeLayer) -> None:
    covered = layer(Counting(), scope=by_user(absent="anonymous"))
    assert (await call(covered, key="order-1")).code == "key-invalid"
    key = new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).replayed
    assert not (await call(covered, key=key, user="alice")).replayed
    with pytest.raises(ConfigurationError, match="absent"):
        by_user(absent="nobody")  # type: ignore[call-overload]  # what is tested


def at_host(covered: App) -> Callable[[bytes], App]:
    """The app, asked under a host's name."""

    def of(host: bytes) -> App:
        async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
            others = [header for header in scope["headers"] if header[0] != b"host"]
            await covered({**scope, "headers": [(b"host", host), *others]}, receive, send)

        return app

    return of


@pytest.mark.parametrize("inner", [single_tenant, by_header("x-api-key"), by_user], ids=["one", "header", "anonymous"])
async def test_h5_hosts_of_one_app_are_apart(layer: MakeLayer, inner: Any) -> None:
    app = Counting()
    covered_at, key = at_host(layer(app, scope=by_host(inner))), new_key()
    for host in (b"one.example", b"two.example"):
        assert not (await call(covered_at(host), key=key, user=None)).replayed
    for host in (b"ONE.example", b"one.example.", b"one.example:80", b"two.example.:80"):
        assert (await call(covered_at(host), key=key, user=None)).replayed
    assert not (await call(covered_at(b"one.example:8080"), key=key, user=None)).replayed
    assert app.effects == 3


async def test_h5_no_host_and_caller_read_like_another_pair(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = at_host(layer(app, scope=by_host(by_header("x-api-key")))), new_key()
    for host, name in ((b"a b", b"c"), (b"a", b"b c"), (b"a%20b", b"c")):
        assert not (await call(covered(host), key=key, headers=[(b"x-api-key", name)])).replayed


async def test_h5_an_anonymous_caller_at_a_host_needs_a_strong_key(layer: MakeLayer) -> None:
    answer = await call(layer(Counting(), scope=by_host(by_header("x-api-key"))), key="order-1")
    assert (answer.code, b"anonymous" in answer.body) == ("key-invalid", True)


def test_h5_by_host_goes_around_another_choice(layer: MakeLayer) -> None:
    with pytest.raises(ConfigurationError, match="by_host"):
        layer(Counting(), scope=by_host)
    for wrong in (None, by_host):
        with pytest.raises(ConfigurationError, match="by_host"):
            by_host(wrong)  # type: ignore[arg-type]  # what is tested


async def test_h5_apps_with_names_of_their_own_can_share_a_store(layer: MakeLayer) -> None:
    key = new_key()
    one, two = layer(Counting(), name="one"), layer(Counting(), name="two")
    await call(one, key=key)
    assert not (await call(two, key=key)).replayed


async def test_h5_the_path_is_taken_from_path_where_raw_path_is_absent(layer: MakeLayer) -> None:
    covered, key = layer(Counting()), new_key()
    await call(covered, path="/a b", key=key, raw_path=None)
    assert (await call(covered, path="/a b", key=key, raw_path=b"/a%20b")).replayed


# H6, H7


@pytest.mark.parametrize(
    "change",
    [
        {"body": b'{"a": 2}'},
        {"query": b"a=1"},
        {"headers": [(b"content-type", b"text/plain")]},
    ],
    ids=["body", "query", "media type"],
)
async def test_h7_another_payload_under_a_used_key_is_refused(layer: MakeLayer, change: dict[str, Any]) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    request: dict[str, Any] = {"key": key, "body": b'{"a": 1}', "headers": [(b"content-type", b"application/json")]}
    await call(covered, **request)
    answer = await call(covered, **{**request, **change})
    assert (answer.status, answer.code, app.effects) == (422, "key-reused", 1)
    assert not answer.values(b"retry-after")


async def test_h7_a_running_twin_is_told_to_ask_again(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app), new_key()
    first = start(covered, key=key)
    first.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    twin = await call(covered, key=key)
    assert (twin.status, twin.code, twin.values(b"retry-after")) == (409, "in-progress", [b"1"])
    assert app.gate is not None
    app.gate.set()
    assert (await first.end()).body == b'{"n": 1}'
    assert (await call(covered, key=key)).replayed
    assert app.effects == 1


async def test_h7_an_abandoned_operation_is_unknown_and_has_no_retry_after(layer: MakeLayer) -> None:
    effects = 0

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        nonlocal effects
        effects += 1
        raise OutcomeUnknown("The bank did not answer.")

    covered = layer(app, policy=Policy(lease=0.05, on_abandoned="refuse"))
    key = new_key()
    first = await call(covered, key=key)
    assert (first.status, first.code, first.values(b"retry-after")) == (409, "outcome-unknown", [])
    second = await call(covered, key=key)
    while second.code == "in-progress":
        second = await call(covered, key=key)
    assert (second.status, second.code, second.values(b"retry-after"), effects) == (409, "outcome-unknown", [], 1)


async def test_h7_a_body_over_the_limit_is_refused_before_it_is_read(layer: MakeLayer) -> None:
    app = Counting()
    conversation = start(layer(app, max_body=10), key=new_key(), headers=[(b"content-length", b"11")])
    answer = await conversation.end()
    assert (answer.status, answer.code, app.effects) == (413, "body-too-large", 0)


@pytest.mark.needs("interrupted reading")
async def test_h7_a_chunked_body_over_the_limit_is_refused_when_it_passes_it(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app, max_body=10), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"123456", more=True)
    conversation.give(b"123456", more=True)
    assert (await conversation.end()).code == "body-too-large"
    assert (await call(covered, key=key, body=b"1234567890")).status == 201
    assert app.effects == 1


@pytest.mark.needs("messages")
@pytest.mark.parametrize("announced", [b"1", b"3"])
async def test_h7_a_wrong_content_length_is_refused(layer: MakeLayer, announced: bytes) -> None:
    app = Counting()
    answer = await call(layer(app), key=new_key(), body=b"{}", headers=[(b"content-length", announced)])
    assert (answer.status, answer.code, app.effects) == (400, "body-length-mismatch", 0)


@pytest.mark.needs("interrupted reading")
async def test_a_body_that_is_cut_half_way_claims_and_runs_nothing(layer: MakeLayer) -> None:
    app, events = Counting(), Events()
    covered, key = layer(app, events=(events,)), new_key()
    conversation = start(covered, key=key)
    conversation.give(b"{", more=True)
    conversation.leave()
    assert (await conversation.end()).messages == []
    assert (app.effects, events) == (0, [])
    assert (await call(covered, key=key, body=b"another body")).status == 201


# H8


@pytest.mark.parametrize("status", [200, 201, 204, 302, 303, 400, 404, 410, 422])
async def test_h8_stores_what_is_final(layer: MakeLayer, status: int) -> None:
    covered, key = layer(Counting(status)), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).replayed


@pytest.mark.parametrize("status", [401, 403, 408, 409, 425, 429, 500, 502, 503])
async def test_h8_releases_what_may_succeed_later(layer: MakeLayer, status: int) -> None:
    app = Counting(status)
    covered, key = layer(app), new_key()
    answers = [await call(covered, key=key) for _ in range(2)]
    assert [(answer.status, answer.replayed) for answer in answers] == [(status, False)] * 2
    assert app.effects == 2


async def failing(scope: AsgiScope, receive: Receive, send: Send) -> None:
    await read_body(receive)
    raise ZeroDivisionError("the handler failed")


async def test_h8_an_exception_releases_and_goes_on_to_those_outside(layer: MakeLayer) -> None:
    events = Events()
    covered, key = layer(failing, events=(events,)), new_key()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await call(covered, key=key)
    assert events.kinds == ["failed", "failed"]


async def test_h8_stripe_stores_failures_too(layer: MakeLayer) -> None:
    app = Counting(503)
    covered, key = layer(app, store_when="stripe"), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).replayed
    assert app.effects == 1


async def test_h8_stripe_gives_a_retry_the_same_failure_as_the_first_caller(layer: MakeLayer) -> None:
    covered, key = layer(failing, store_when="stripe"), new_key()
    first = start(covered, key=key)
    first.give(b"{}")
    with pytest.raises(ZeroDivisionError):
        await first.end()
    second = await call(covered, key=key)
    assert (first.answer.code, second.code, second.status) == ("handler-failed", "handler-failed", 500)
    assert (first.answer.body, second.replayed) == (second.body, True)


async def test_h8_success_only_releases_refusals(layer: MakeLayer) -> None:
    app = Counting(422)
    covered, key = layer(app, store_when="success-only"), new_key()
    await call(covered, key=key)
    app.status = 201
    assert (await call(covered, key=key)).body == b'{"n": 2}'
    assert (await call(covered, key=key)).replayed


async def test_h8_a_callable_decides(layer: MakeLayer) -> None:
    app = Counting(200, [(b"x-final", b"no")])
    covered = layer(app, store_when=lambda status, headers: (b"x-final", b"no") not in headers)
    key = new_key()
    await call(covered, key=key)
    assert not (await call(covered, key=key)).replayed


# H9


async def test_h9_the_replay_is_the_stored_response(layer: MakeLayer) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"set-cookie", b"a=1"),
        (b"x-custom", b"one"),
        (b"set-cookie", b"b=2"),
        (b"x-custom", b"two"),
        (b"x-bytes", b"\xe9"),
    ]
    covered, key = layer(Counting(201, headers)), new_key()
    first = await call(covered, key=key)
    replay = await call(covered, key=key)
    assert first.headers == headers
    assert replay.headers == [*headers, (b"content-length", b"8"), (b"idempotency-replayed", b"true")]
    assert (replay.status, replay.body) == (201, first.body)


async def test_h9_drops_what_is_true_of_one_exchange_alone(layer: MakeLayer) -> None:
    headers = [
        (b"Date", b"Tue, 24 Nov 2026 03:21:17 GMT"),
        (b"server", b"x"),
        (b"connection", b"close, x-hop"),
        (b"x-hop", b"1"),
        (b"content-length", b"8"),
        (b"x-ratelimit-remaining", b"1"),
        (b"ratelimit-policy", b"1"),
        (b"x-request-id", b"1"),
        (b"traceparent", b"1"),
        (b"location", b"/charges/1"),
    ]
    covered, key = layer(Counting(201, headers)), new_key()
    first = await call(covered, key=key)
    replay = await call(covered, key=key)
    assert first.headers == headers
    assert replay.headers == [
        (b"location", b"/charges/1"),
        (b"content-length", b"8"),
        (b"idempotency-replayed", b"true"),
    ]


async def test_h9_cookies_are_left_out_by_choice(layer: MakeLayer) -> None:
    covered, key = layer(Counting(201, [(b"set-cookie", b"a=1")]), keep_set_cookie=False), new_key()
    assert (await call(covered, key=key)).values(b"set-cookie") == [b"a=1"]
    assert (await call(covered, key=key)).values(b"set-cookie") == []


async def test_h9_the_mark_of_a_replay_can_be_named(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), replay_header="Idempotent-Replayed"), new_key()
    await call(covered, key=key)
    assert (await call(covered, key=key)).values(b"idempotent-replayed") == [b"true"]


async def test_h9_a_204_is_replayed_without_a_length(layer: MakeLayer) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    covered, key = layer(app), new_key()
    await call(covered, key=key)
    replay = await call(covered, key=key)
    assert (replay.status, replay.headers, replay.body) == (204, [(b"idempotency-replayed", b"true")], b"")


# H13


def is_allowed(scope: AsgiScope) -> bool:
    return (b"x-allowed", b"yes") in scope["headers"]


async def is_allowed_later(scope: AsgiScope) -> bool:
    return is_allowed(scope)


async def test_h13_authorize_is_asked_before_each_replay(layer: MakeLayer) -> None:
    await check_authorize(layer, is_allowed)


@pytest.mark.needs("loop")
async def test_h13_authorize_may_be_awaited(layer: MakeLayer) -> None:
    await check_authorize(layer, is_allowed_later)


async def check_authorize(layer: MakeLayer, authorize: Any) -> None:
    covered, key = layer(Counting(), authorize=authorize), new_key()
    assert (await call(covered, key=key)).status == 201
    denied: Answer = await call(covered, key=key)
    assert (denied.status, denied.code) == (403, "replay-denied")
    assert (await call(covered, key=key, headers=[(b"x-allowed", b"yes")])).replayed


# C18


async def test_c18_a_duplicate_waits_and_is_given_the_replay(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=Policy(wait=10.0, poll=0.01)), new_key()
    first, twin = start(covered, key=key), start(covered, key=key)
    first.give(b"{}")
    twin.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    assert app.gate is not None
    app.gate.set()
    answers = [await first.end(), await twin.end()]
    assert sorted(answer.replayed for answer in answers) == [False, True]
    assert app.effects == 1


@pytest.mark.needs("departures at once")
async def test_c18_a_waiting_duplicate_leaves_with_its_client(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=Policy(wait=600.0, poll=600.0)), new_key()
    first, twin = start(covered, key=key), start(covered, key=key)
    first.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    twin.give(b"{}")
    twin.leave()
    await twin.end()
    assert app.gate is not None
    app.gate.set()
    assert (await first.end()).status == 201


async def test_c18_waiters_are_bounded(layer: MakeLayer) -> None:
    app = Counting(gate=asyncio.Event())
    covered, key = layer(app, policy=Policy(wait=600.0, poll=600.0, max_waiters=0)), new_key()
    first = start(covered, key=key)
    first.give(b"{}")
    await asyncio.wait_for(app.began.wait(), 10)
    assert (await call(covered, key=key)).code == "in-progress"
    assert app.gate is not None
    app.gate.set()
    await first.end()


async def test_fifty_twins_at_once_take_effect_once(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    answers = await asyncio.gather(*(call(covered, key=key) for _ in range(50)))
    assert app.effects == 1
    assert {answer.status for answer in answers} <= {201, 409}
    assert {answer.body for answer in answers if answer.status == 201} == {b'{"n": 1}'}


# C21


async def test_c21_a_changed_fingerprint_option_still_knows_what_an_earlier_one_stored(tmp_path: Path) -> None:
    key, url = new_key(), f"sqlite:///{tmp_path / 'shared.db'}"
    request: dict[str, Any] = {"key": key, "headers": [(b"content-type", b"application/json")]}
    async with (
        closing(layered(Counting(), store=url)) as before,
        closing(layered(Counting(), store=url, fingerprint=fingerprint.json)) as after,
    ):
        await call(before, **request, body=b'{"a": 1}')
        assert (await call(after, **request, body=b'{"a": 1}')).replayed
        assert (await call(after, **request, body=b'{"a": 2}')).code == "key-reused"


async def test_h6_canonical_json_takes_two_spellings_for_one_request(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), fingerprint=fingerprint.json), new_key()
    request: dict[str, Any] = {"key": key, "headers": [(b"content-type", b"application/json")]}
    await call(covered, **request, body=b'{"a": 1, "b": 2}')
    assert (await call(covered, **request, body=b'{"b":2,"a":1}')).replayed


async def test_h6_only_selected_fields_count(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), fingerprint=fingerprint.fields("/amount")), new_key()
    request: dict[str, Any] = {"key": key, "headers": [(b"content-type", b"application/json")]}
    await call(covered, **request, body=b'{"amount": 1, "at": 1}')
    assert (await call(covered, **request, body=b'{"amount": 1, "at": 2}')).replayed
    assert (await call(covered, **request, body=b'{"amount": 2, "at": 1}')).code == "key-reused"


async def test_h6_a_callable_decides_what_counts(layer: MakeLayer) -> None:
    covered, key = layer(Counting(), fingerprint=lambda request: request.body[:1]), new_key()
    await call(covered, key=key, body=b"a1")
    assert (await call(covered, key=key, body=b"a2")).replayed
    assert (await call(covered, key=key, body=b"b1")).code == "key-reused"


async def test_h6_a_multipart_retry_draws_a_new_boundary(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app), new_key()
    for boundary in (b"first", b"second"):
        body = b'--%b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--%b--\r\n' % (boundary, boundary)
        headers = [(b"content-type", b"multipart/form-data; boundary=" + boundary)]
        assert (await call(covered, key=key, body=body, headers=headers)).status == 201
    assert app.effects == 1


async def settled_by_hand(covered: IdempotencyMiddleware, store: MemoryStore, key: str, result: bytes | None) -> Answer:
    """What a retry gets of an operation that was settled with this result, as an operator may do."""
    await call(covered, key=key)
    [record] = store.scan()
    store.evict([record.id])
    claim = Claim(
        id=record.id,
        fingerprint=record.fingerprint,
        nonce=b"n" * 16,
        lease=10.0,
        retention=60.0,
        unsettled_retention=60.0,
    )
    [held] = store.claim([claim])
    assert isinstance(held, Acquired)
    store.complete([Complete(record.id, claim.nonce, held.token, result)])
    return await call(covered, key=key)


async def test_c21_a_result_that_cannot_be_read_is_an_error_and_never_a_run(layer: MakeLayer) -> None:
    app, store, events = Counting(), MemoryStore(), Events()
    covered = layer(app, store=store, events=(events,))
    answer = await settled_by_hand(covered, store, new_key(), b"\xff unheard of")
    assert (answer.status, answer.code, app.effects) == (503, "record-unreadable", 1)
    assert "unreadable" in events.kinds


async def test_o1_an_operation_that_an_operator_settled_without_a_result_is_done(layer: MakeLayer) -> None:
    app, store = Counting(), MemoryStore()
    answer = await settled_by_hand(layer(app, store=store), store, new_key(), None)
    assert (answer.status, answer.body, answer.replayed, app.effects) == (200, b"", True, 1)
    assert answer.values(b"idempotency-replay") == [b"omitted"]


async def test_h7_large_bodies_past_the_budget_of_the_process_are_asked_to_come_again(layer: MakeLayer) -> None:
    app = Counting()
    covered, key = layer(app), new_key()

    async def upload() -> Answer:
        conversation = start(covered, key=key)
        for _ in range(3):
            conversation.give(b"a" * 1_000_000, more=True)
        conversation.give(b"")
        return await conversation.end()

    taken = LIMIT - 2_500_000
    BUDGET.take(taken)
    try:
        busy = await upload()
    finally:
        BUDGET.give(taken)
    assert (busy.status, busy.code, busy.values(b"retry-after"), app.effects) == (503, "too-busy", [b"1"], 0)
    assert (await upload()).status == 201
    BUDGET.take(LIMIT)  # every byte was given back
    BUDGET.give(LIMIT)


@pytest.mark.parametrize(
    ("header", "recorded"),
    [
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        (b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", True),
        (b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\x9b31m", False),
        (b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-\x1b[2J", False),
        (b"anything", False),
        (b"", False),
    ],
)
async def test_o3_only_a_trace_context_is_recorded_as_one(layer: MakeLayer, header: bytes, recorded: bool) -> None:
    store = MemoryStore()
    await call(layer(Counting(), store=store), key=new_key(), headers=[(b"traceparent", header)])
    (record,) = store.scan()
    assert record.trace == (header.decode() if recorded else "")
