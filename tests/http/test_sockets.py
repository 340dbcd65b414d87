"""Over real sockets, under uvicorn with both of its parsers: what no message sequence can show."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request

from retryproof.core.policy import Policy
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.options import Departure
from tests.http.harness import new_key
from tests.http.servers import (
    connected,
    ended_cleanly,
    eventually,
    exchange,
    read_all,
    replay,
    request_bytes,
    split,
    uvicorn_server,
)

QUICK = Policy(lease=0.2, on_abandoned="refuse")


class Service:
    """A small API behind the layer, and the switches that tests turn.

    effects: by path. held: /held waits for it. began: a handler has had its effect.
    """

    def __init__(self, store: str) -> None:
        self.effects: dict[str, int] = {}
        self.began = threading.Event()
        self.held = threading.Event()
        self.app = FastAPI()
        for path, endpoint in (
            ("/charges", self.charge),
            ("/held", self.hold),
            ("/stream", self.stream),
            ("/events", self.events),
            ("/endless", self.endless),
            ("/broken", self.broken),
            ("/upload", self.upload),
        ):
            self.app.post(path)(endpoint)
        self.app.add_middleware(
            IdempotencyMiddleware,
            store=store,
            scope=single_tenant,
            max_body=8 * 1024 * 1024,
            policy=lambda scope: QUICK if scope["path"] == "/endless" else Policy(lease=5.0, max_result=100_000),
            on_departure=self.on_departure,
        )

    def on_departure(self, scope: Any) -> Departure:
        return "stop" if scope["path"] == "/endless" else "finish"

    def effect(self, path: str) -> int:
        self.effects[path] = self.effects.get(path, 0) + 1
        self.began.set()
        return self.effects[path]

    async def charge(self) -> JSONResponse:
        response = JSONResponse({"n": self.effect("/charges")}, 201)
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def hold(self) -> dict[str, int]:
        number = self.effect("/held")
        await asyncio.to_thread(self.held.wait)
        return {"n": number}

    async def stream(self) -> StreamingResponse:
        number = self.effect("/stream")

        async def parts() -> AsyncIterator[bytes]:
            yield b"%d:a" % number
            await asyncio.to_thread(self.held.wait)
            yield b"b"

        return StreamingResponse(parts())

    async def events(self) -> StreamingResponse:
        self.effect("/events")

        async def parts() -> AsyncIterator[bytes]:
            while not self.held.is_set():
                yield b"data: 1\n\n"
                await asyncio.sleep(0.01)
            self.effect("/events to the end")

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def endless(self) -> StreamingResponse:
        self.effect("/endless")

        async def parts() -> AsyncIterator[bytes]:
            while True:
                yield b"data: 1\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def broken(self) -> StreamingResponse:
        self.effect("/broken")

        async def parts() -> AsyncIterator[bytes]:
            yield b"a"
            raise ZeroDivisionError

        return StreamingResponse(parts())

    async def upload(self, request: Request) -> Response:
        self.effect("/upload")
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        return Response(str(size))


@pytest.fixture(params=["memory", "sqlite"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    return Service("memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'keys.db'}")


@pytest.fixture(params=["h11", "httptools"])
def port(request: pytest.FixtureRequest, service: Service) -> Iterator[int]:
    with uvicorn_server(service.app, http=request.param) as port:
        yield port
        service.held.set()


def test_h9_a_replay_is_the_first_response_byte_for_byte(port: int) -> None:
    key = new_key()
    first, second = (split(exchange(port, request_bytes(key=key))) for _ in range(2))
    assert (first[0], first[2]) == (second[0], second[2]) == (201, b'{"n":1}')
    assert second[1][b"set-cookie"] == first[1][b"set-cookie"]
    assert len(second[1][b"set-cookie"]) == 2
    assert (second[1][b"idempotency-replayed"], len(second[1][b"date"])) == ([b"true"], 1)
    assert second[1][b"content-length"] == [b"7"]


def test_fifty_twins_at_once_take_effect_once(port: int, service: Service) -> None:
    key = new_key()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: split(exchange(port, request_bytes(key=key))), range(50)))
    assert service.effects == {"/charges": 1}
    assert {answer[0] for answer in answers} <= {201, 409}
    assert {answer[2] for answer in answers if answer[0] == 201} == {b'{"n":1}'}
    assert all(json.loads(answer[2])["code"] == "in-progress" for answer in answers if answer[0] == 409)


def test_a_chunked_request_is_the_same_as_one_with_a_length(port: int) -> None:
    key = new_key()
    chunked = b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    exchange(port, request_bytes(key=key, body=chunked, headers=("transfer-encoding: chunked",)))
    assert b"idempotency-replayed" in split(exchange(port, request_bytes(key=key)))[1]


def test_a_client_that_expects_100_continue_gets_it_when_the_body_is_read(port: int) -> None:
    with connected(port) as connection:
        head = request_bytes(key=new_key(), body=b"", headers=("expect: 100-continue", "content-length: 2"))
        connection.sendall(head)
        assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert b"HTTP/1.1 201 " in read_all(connection)


@pytest.mark.parametrize("reset", [False, True])
def test_a_body_that_is_cut_half_way_claims_and_runs_nothing(port: int, service: Service, reset: bool) -> None:
    key = new_key()
    with connected(port) as connection:
        connection.sendall(request_bytes(key=key, body=b'{"a":', headers=("content-length: 100",)))
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert split(exchange(port, request_bytes(key=key, body=b"another")))[0] == 201
    assert service.effects == {"/charges": 1}


def test_h11_a_client_that_leaves_does_not_stop_the_operation(port: int, service: Service) -> None:
    key = new_key()
    with connected(port) as connection:
        connection.sendall(request_bytes("/held", key=key))
        assert service.began.wait(10)
    service.held.set()
    status, _, body = replay(port, "/held", key)
    assert (status, body, service.effects) == (200, b'{"n":1}', {"/held": 1})


def test_h11_a_stream_whose_client_left_is_stored_whole(port: int, service: Service) -> None:
    key = new_key()
    with connected(port) as connection:
        connection.sendall(request_bytes("/stream", key=key))
        while b"1:a" not in connection.recv(65_536, socket.MSG_PEEK):
            pass
    service.held.set()
    status, _, body = replay(port, "/stream", key)
    assert (status, body, service.effects) == (200, b"1:ab", {"/stream": 1})


def test_h10_a_stream_flows_as_it_is_produced(port: int, service: Service) -> None:
    key = new_key()
    with connected(port) as connection:
        connection.sendall(request_bytes("/stream", key=key))
        received = b""
        while b"1:a" not in received:
            received += connection.recv(65_536)
        assert not ended_cleanly(received)
        service.held.set()
        received += read_all(connection)
    assert ended_cleanly(received)
    assert split(received)[2] == b"1:ab"
    assert replay(port, "/stream", key)[2] == b"1:ab"


def leave_during(port: int, path: str, key: str) -> None:
    """Take a few parts of a stream, and go."""
    with connected(port) as connection:
        connection.sendall(request_bytes(path, key=key))
        received = b""
        while received.count(b"data: 1") < 3:
            received += connection.recv(65_536)


def test_h11_server_sent_events_flow_run_to_their_end_and_leave_a_tombstone(port: int, service: Service) -> None:
    key = new_key()
    leave_during(port, "/events", key)
    service.held.set()
    status, headers, body = replay(port, "/events", key)
    assert (status, body, headers[b"idempotency-replay"]) == (200, b"", [b"omitted"])
    assert service.effects == {"/events": 1, "/events to the end": 1}


def test_h11_a_stream_that_is_to_stop_is_no_success(port: int, service: Service) -> None:
    key, codes = new_key(), []
    leave_during(port, "/endless", key)

    def is_refused() -> bool:
        codes.append(json.loads(split(exchange(port, request_bytes("/endless", key=key)))[2])["code"])
        return bool(codes[-1] != "in-progress")

    eventually(is_refused)
    assert (codes[-1], service.effects) == ("outcome-unknown", {"/endless": 1})


def test_h8_a_stream_that_fails_is_cut_and_released(port: int, service: Service) -> None:
    key = new_key()
    for _ in range(2):
        assert not ended_cleanly(exchange(port, request_bytes("/broken", key=key)))
    assert service.effects == {"/broken": 2}


def test_h7_a_large_upload_arrives_whole_and_one_over_the_limit_is_refused(port: int, service: Service) -> None:
    key, body = new_key(), b"a" * 5_000_000
    assert split(exchange(port, request_bytes("/upload", key=key, body=body)))[2] == b"5000000"
    assert replay(port, "/upload", key, body=body)[2] == b"5000000"
    with connected(port) as connection:
        connection.sendall(request_bytes("/upload", key=new_key(), body=b"", headers=("content-length: 9000000",)))
        status, _, problem = split(read_all(connection))
    assert (status, json.loads(problem)["code"], service.effects) == (413, "body-too-large", {"/upload": 1})


def test_two_lines_with_a_key_are_refused(port: int, service: Service) -> None:
    answer = split(exchange(port, request_bytes(key="a", headers=("idempotency-key: b",))))
    assert (answer[0], json.loads(answer[2])["code"], service.effects) == (400, "key-invalid", {})


def test_h11_a_server_that_shuts_down_lets_the_operation_end(tmp_path: Path) -> None:
    service, key = Service(f"sqlite:///{tmp_path / 'keys.db'}"), new_key()
    with uvicorn_server(service.app, timeout_graceful_shutdown=1) as port, connected(port) as connection:
        connection.sendall(request_bytes("/held", key=key))
        assert service.began.wait(10)
        threading.Timer(1.2, service.held.set).start()  # after the server has cancelled what runs
    with uvicorn_server(service.app) as port:
        assert replay(port, "/held", key)[2] == b'{"n":1}'
    assert service.effects == {"/held": 1}
