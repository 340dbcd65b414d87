"""H1: what the layer does not cover is byte for byte as without it; on Litestar, under Hypercorn and under Granian."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retryproof.http.types import App, AsgiMessage, AsgiScope
from tests.http import passthrough_app
from tests.http.harness import Conversation, new_key, request_scope, start
from tests.http.passthrough_app import layered_app, litestar_app
from tests.http.servers import connected, exchange, read_all, request_bytes, split

ROOT = Path(__file__).parents[2]

# Litestar, message by message


async def messages_of(app: App, scope: AsgiScope, *given: AsgiMessage) -> list[AsgiMessage]:
    """What an app sends when it is given these messages."""
    conversation = Conversation(app, scope)
    for message in given:
        conversation.put(message)
    await conversation.end()
    return conversation.sent


REQUESTS: dict[str, tuple[AsgiScope, list[AsgiMessage]]] = {
    "get": (request_scope("GET", "/plain", key="k"), [{"type": "http.request"}]),
    "streaming": (request_scope("GET", "/stream", key="k"), [{"type": "http.request"}]),
    "server-sent events": (request_scope("GET", "/events", key="k"), [{"type": "http.request"}]),
    "head of nothing": (request_scope("HEAD", "/nowhere", key="k"), [{"type": "http.request"}]),
    "post without a key": (
        request_scope("POST", "/nowhere"),
        [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}],
    ),
    "streaming post without a key": (request_scope("POST", "/stream"), [{"type": "http.request"}]),
    "websocket": (
        {**request_scope("GET", "/socket", key="k"), "type": "websocket", "scheme": "ws", "subprotocols": []},
        [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "abc"}],
    ),
    "lifespan": (
        {"type": "lifespan", "asgi": {"version": "3.0"}},
        [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}],
    ),
}


@pytest.mark.parametrize("name", list(REQUESTS))
async def test_h1_litestar_sends_the_same_messages_as_without_the_layer(name: str) -> None:
    def asked() -> tuple[AsgiScope, list[AsgiMessage]]:
        scope, given = REQUESTS[name]
        return dict(scope), [dict(message) for message in given]

    without = await _in(litestar_app(), *asked())
    within = await _in(layered_app(litestar_app()), *asked())
    assert within == without
    assert within


async def _in(app: App, scope: AsgiScope, given: list[AsgiMessage]) -> list[AsgiMessage]:
    return await messages_of(app, scope, *given)


async def test_h9_litestar_answers_are_replayed() -> None:
    passthrough_app.effects.clear()
    app, key = layered_app(litestar_app()), new_key()
    answers = []
    for path, body in (("/echo", b"hello"), ("/echo", b"hello"), ("/stream", b""), ("/stream", b"")):
        conversation = start(app, "POST", path, key=key)
        conversation.give(body)
        answers.append(await conversation.end())
    assert [answer.replayed for answer in answers] == [False, True, False, True]
    assert answers[0].body == answers[1].body
    assert answers[2].body == answers[3].body == b"a" + b"b" * 1000 + b"c"
    assert passthrough_app.effects == {"echo": 1, "stream": 1}


async def test_h11_litestar_streams_are_not_run_again_when_the_client_leaves() -> None:
    passthrough_app.effects.clear()
    app, key = layered_app(litestar_app()), new_key()
    conversation = start(app, "POST", "/stream", key=key)
    conversation.give(b"")
    conversation.leave()
    await conversation.end()
    again = start(app, "POST", "/stream", key=key)
    again.give(b"")
    assert (await again.end()).replayed
    assert passthrough_app.effects == {"stream": 1}


# Other servers, over sockets


def _hypercorn(port: int) -> list[str]:
    return ["-m", "hypercorn", "--bind", f"127.0.0.1:{port}", "--error-logfile", "-", "tests.http.passthrough_app:app"]


def _granian(port: int) -> list[str]:
    options = ["--interface", "asgi", "--host", "127.0.0.1", "--port", str(port), "--no-log"]
    return ["-m", "granian", *options, "tests.http.passthrough_app:app"]


Arguments = Callable[[int], list[str]]


@contextmanager
def server(arguments: Arguments, *, layer: bool) -> Iterator[int]:
    """The port of a server process that serves the plain app."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "RETRYPROOF_TEST_LAYER": "1" if layer else "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
    }
    process = subprocess.Popen(
        [sys.executable, *arguments(port)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server does not listen"
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.05)


@pytest.fixture(scope="module", params=[_hypercorn, _granian], ids=["hypercorn", "granian"])
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """The ports of one app, without the layer and with it."""
    with server(request.param, layer=False) as without, server(request.param, layer=True) as within:
        yield without, within


def undated(answer: bytes) -> bytes:
    """An answer without its date."""
    return re.sub(rb"(?i)date: [^\r]*\r\n", b"", answer)


def get_bytes(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: test\r\nidempotency-key: k\r\nconnection: close\r\n\r\n".encode()


@pytest.mark.parametrize("path", ["/plain", "/stream", "/events"])
def test_h1_other_servers_send_the_same_bytes_as_without_the_layer(servers: tuple[int, int], path: str) -> None:
    requests = [get_bytes(path), request_bytes(path), request_bytes(path, body=b"a" * 200_000)]
    without, within = ([undated(exchange(port, request)) for request in requests] for port in servers)
    assert [split(answer)[0] for answer in within] == [200, 200, 200]
    assert [split(answer) for answer in within] == [split(answer) for answer in without]


@pytest.mark.parametrize("path", ["/plain", "/stream"])
def test_h9_other_servers_replay_the_first_response(servers: tuple[int, int], path: str) -> None:
    key = new_key()
    body = b"a" * 200_000
    first, second = (split(exchange(servers[1], request_bytes(path, key=key, body=body))) for _ in range(2))
    assert (first[0], first[2]) == (second[0], second[2])
    assert (first[1].get(b"idempotency-replayed"), second[1][b"idempotency-replayed"]) == (None, [b"true"])


def test_other_servers_a_body_that_is_cut_half_way_claims_nothing(servers: tuple[int, int]) -> None:
    key = new_key()
    with connected(servers[1]) as connection:
        connection.sendall(request_bytes("/plain", key=key, body=b"abc", headers=("content-length: 100",)))
    status, headers, _ = split(exchange(servers[1], request_bytes("/plain", key=key, body=b"other")))
    assert (status, headers.get(b"idempotency-replayed")) == (200, None)


def test_h10_other_servers_mark_what_was_omitted(servers: tuple[int, int]) -> None:
    key = new_key()
    first, second = (split(exchange(servers[1], request_bytes("/events", key=key))) for _ in range(2))
    assert (first[0], second[0], second[2]) == (200, 200, b"")
    assert second[1][b"idempotency-replay"] == [b"omitted"]


def test_h11_other_servers_let_a_request_end_whose_client_left(servers: tuple[int, int]) -> None:
    key = new_key()
    with connected(servers[1]) as connection:
        connection.sendall(request_bytes("/stream", key=key))
        connection.recv(1)
    deadline = time.monotonic() + 10
    while True:
        status, headers, body = split(exchange(servers[1], request_bytes("/stream", key=key)))
        if b"idempotency-replayed" in headers:
            break
        assert (status, time.monotonic() < deadline) == (409, True)
    assert (status, body) == (200, b"a" + b"b" * 1000 + b"c")


def test_h11_other_servers_do_not_stop_a_handler_whose_client_left(servers: tuple[int, int]) -> None:
    key = new_key()
    with connected(servers[1]) as connection:
        connection.sendall(request_bytes("/slow", key=key))
        time.sleep(0.1)  # until the handler waits
    deadline = time.monotonic() + 10
    while True:
        status, headers, body = split(exchange(servers[1], request_bytes("/slow", key=key)))
        if b"idempotency-replayed" in headers:
            break
        assert (status, time.monotonic() < deadline) == (409, True)
    assert (status, body) == (200, b"1:{}")


def test_h7_other_servers_answer_a_body_over_the_limit(servers: tuple[int, int]) -> None:
    with connected(servers[1]) as connection:
        head = request_bytes("/plain", key=new_key(), body=b"", headers=(f"content-length: {10**9}",))
        connection.sendall(head)
        assert split(read_all(connection))[0] == 413
