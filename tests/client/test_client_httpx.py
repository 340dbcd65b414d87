"""The httpx transports over real sockets: one suite, both colours."""

from __future__ import annotations

import asyncio
import gzip
import io
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any
from uuid import UUID

import httpx
import pytest

from retryproof.client import RetryBudget, RetryPolicy
from retryproof.client.httpx import AsyncRetryTransport, RetryTransport
from retryproof.core.errors import ConfigurationError
from retryproof.core.operation_key import operation_key
from retryproof.testing.link import FaultLink

POLICY = RetryPolicy(backoff=0.001, max_backoff=0.002)
PROBLEM = "application/problem+json"


@dataclass(frozen=True)
class Seen:
    """A request as the server got it."""

    method: str
    path: str
    key: str | None
    body: bytes


@dataclass(frozen=True)
class Answer:
    """A response for the server to give."""

    status: int = 200
    body: bytes = b"done"
    headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.note(Seen(self.command, self.path, self.headers.get("Idempotency-Key"), body))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


class Server(ThreadingHTTPServer):
    """Gives the answers of its script, then 200; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.seen: list[Seen] = []
        self._lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that the link cut is no news."""

    def note(self, seen: Seen) -> Answer:
        with self._lock:
            self.seen.append(seen)
            return self.script.pop(0) if self.script else Answer()

    @property
    def keys(self) -> list[str | None]:
        return [seen.key for seen in self.seen]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def link(server: Server) -> Iterator[FaultLink]:
    with FaultLink("127.0.0.1", server.server_address[1], random=Random(3)) as link:
        yield link


@dataclass
class Caller:
    """Sends through a transport of one colour; its pauses take no time and are noted."""

    colour: str
    url: str
    pauses: list[float] = field(default_factory=list)

    async def __call__(self, method: str, path: str = "/", **options: Any) -> httpx.Response:
        return (await self.many([(method, path, options)]))[0]

    async def many(self, requests: list[tuple[str, str, dict[str, Any]]], **transport: Any) -> list[httpx.Response]:
        """The responses to these, one after the other on one client."""
        transport = {"policy": POLICY, "wall_clock": lambda: 0.0} | transport
        if self.colour == "sync":
            return await asyncio.to_thread(self._sync, requests, transport)
        return await self._async(requests, transport)

    def _sync(self, requests: list[tuple[str, str, dict[str, Any]]], transport: dict[str, Any]) -> list[httpx.Response]:
        with httpx.Client(transport=RetryTransport(sleep=self.pauses.append, **transport), base_url=self.url) as client:
            return [client.request(method, path, **options) for method, path, options in requests]

    async def _async(
        self, requests: list[tuple[str, str, dict[str, Any]]], transport: dict[str, Any]
    ) -> list[httpx.Response]:
        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)

        async with httpx.AsyncClient(
            transport=AsyncRetryTransport(sleep=sleep, **transport), base_url=self.url
        ) as client:
            return [await client.request(method, path, **options) for method, path, options in requests]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, link: FaultLink) -> Caller:
    return Caller(request.param, link.url)


async def test_k1_makes_one_key_for_a_call_and_keeps_it(call: Caller, server: Server) -> None:
    server.script = [Answer(503), Answer(500)]
    response = await call("POST", content=b"x")
    assert (response.status_code, response.content) == (200, b"done")
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1
    assert UUID(server.keys[0] or "").version == 4
    assert response.extensions["retryproof"] == {"key": server.keys[0], "attempts": 3, "reason": "final"}
    assert {seen.body for seen in server.seen} == {b"x"}


async def test_k1_makes_another_key_for_another_call(call: Caller, server: Server) -> None:
    await call.many([("POST", "/", {}), ("PATCH", "/", {})])
    assert None not in server.keys
    assert len(set(server.keys)) == 2


async def test_k1_never_replaces_the_callers_key(call: Caller, server: Server) -> None:
    server.script = [Answer(503)]
    with operation_key("the-blocks"):
        await call("POST", headers={"idempotency-key": '"mine"'})
    assert server.keys == ['"mine"', '"mine"']


async def test_k1_puts_no_key_on_methods_that_are_not_covered(call: Caller, server: Server) -> None:
    await call.many([("GET", "/", {}), ("PUT", "/", {})])
    assert server.keys == [None, None]


async def test_k1_writes_the_key_in_the_header_and_form_asked_for(call: Caller, server: Server) -> None:
    policy = RetryPolicy(header="X-Key", quoted=True)
    with operation_key("k"):
        (response,) = await call.many([("POST", "/", {})], policy=policy)
    assert response.request.headers["x-key"] == '"k"'


async def test_k1_a_block_carries_one_key_over_an_outer_loop(call: Caller, server: Server) -> None:
    server.script = [Answer(503)] * 7
    with operation_key("order-1"):
        statuses = [(await call("POST", "/charges", json={"amount": 1})).status_code for _ in range(2)]
    assert statuses == [503, 200]
    assert server.keys == ["order-1"] * 8


@pytest.mark.parametrize("second", [("/refunds?token=secret", b"x"), ("/charges", b"y")])
async def test_k1_a_block_refuses_another_request_before_it_is_sent(
    call: Caller, server: Server, second: tuple[str, bytes]
) -> None:
    path, body = second
    with operation_key("order-1"):
        await call("POST", "/charges", content=b"x")
        with pytest.raises(ConfigurationError, match="order-1") as raised:
            await call("POST", path, content=body)
    assert "secret" not in str(raised.value)
    assert len(server.seen) == 1


async def test_k1_a_block_knows_a_form_again_under_another_boundary(call: Caller, server: Server) -> None:
    with operation_key("order-1"):
        for _ in range(2):
            await call("POST", files={"file": io.BytesIO(b"content")})
    assert server.keys == ["order-1"] * 2
    assert server.seen[0].body != server.seen[1].body


async def test_k1_names_the_key_in_the_last_exception(call: Caller, link: FaultLink) -> None:
    link.lose_reply()
    with operation_key("order-1"), pytest.raises(httpx.TransportError, match=r"Idempotency-Key: order-1") as raised:
        await call("POST")
    assert "attempts: 5" in str(raised.value)
    assert raised.value.__dict__["idempotency_key"] == "order-1"
    assert raised.value.request.method == "POST"


async def test_k1_names_the_key_in_a_status_error_by_its_request(call: Caller, server: Server) -> None:
    server.script = [Answer(422)]
    response = await call("POST")
    with pytest.raises(httpx.HTTPStatusError) as raised:
        response.raise_for_status()
    assert raised.value.request.headers["idempotency-key"] == server.keys[0]


async def test_k2_asks_again_after_a_lost_reply_under_the_same_key(
    call: Caller, server: Server, link: FaultLink
) -> None:
    link.lose_reply(times=2)
    assert (await call("POST")).status_code == 200
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1


@pytest.mark.parametrize("size", [0, 1, 20, 200])
async def test_k2_asks_again_after_a_cut_reply(call: Caller, server: Server, link: FaultLink, size: int) -> None:
    server.script = [Answer(body=b"z" * 5000)] * 2
    link.cut_after(size, times=1)
    assert (await call("POST")).content == b"z" * 5000
    assert len(server.keys) == 2
    assert len(set(server.keys)) == 1


async def test_k2_asks_again_after_a_cut_request(call: Caller, server: Server, link: FaultLink) -> None:
    link.cut_after(100, direction="request", times=1)
    assert (await call("POST", content=b"z" * 5000)).status_code == 200
    assert b"z" * 5000 in [seen.body for seen in server.seen]  # the cut one may be noted later


async def test_k2_asks_again_after_a_reset(call: Caller, server: Server, link: FaultLink) -> None:
    link.reset(times=1)
    assert (await call("POST")).status_code == 200
    assert len(server.seen) == 1


async def test_k2_asks_again_after_a_time_out(call: Caller, server: Server, link: FaultLink) -> None:
    link.black_hole(times=1)
    assert (await call("POST", timeout=httpx.Timeout(10, read=0.2))).status_code == 200
    assert len(server.seen) == 1


async def test_k2_does_not_repeat_a_post_without_a_key_after_sending(
    call: Caller, server: Server, link: FaultLink
) -> None:
    link.lose_reply()
    with pytest.raises(httpx.TransportError):
        await call.many([("POST", "/", {})], policy=RetryPolicy(methods=()))
    assert len(server.seen) == 1


async def test_k2_an_empty_key_of_the_caller_protects_nothing(call: Caller, server: Server) -> None:
    server.script = [Answer(503)]
    assert (await call("POST", headers={"Idempotency-Key": ""})).status_code == 503
    assert len(server.seen) == 1


async def test_k2_connects_again_even_without_a_key(call: Caller, server: Server, link: FaultLink) -> None:
    link.refuse()

    def heal(seconds: float) -> None:
        link.heal()

    async def heal_async(seconds: float) -> None:
        link.heal()

    policy = RetryPolicy(methods=())
    if call.colour == "sync":
        with httpx.Client(transport=RetryTransport(policy=policy, sleep=heal)) as client:
            response = await asyncio.to_thread(client.post, link.url)
    else:
        async with httpx.AsyncClient(transport=AsyncRetryTransport(policy=policy, sleep=heal_async)) as async_client:
            response = await async_client.post(link.url)
    assert response.extensions["retryproof"]["attempts"] == 2
    assert len(server.seen) == 1


@pytest.mark.parametrize("encoded", [False, True])
async def test_k2_waits_for_a_twin_that_is_running(call: Caller, server: Server, encoded: bool) -> None:
    body = b'{"code": "in-progress"}'
    headers = {"Content-Type": PROBLEM, "Retry-After": "2"}
    if encoded:
        body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
    server.script = [Answer(409, body, headers)]
    assert (await call("POST")).status_code == 200
    assert 2.0 <= call.pauses[0] < 2.1


async def test_k2_takes_an_unknown_outcome_as_final(call: Caller, server: Server) -> None:
    server.script = [Answer(409, b'{"code": "outcome-unknown"}', {"Content-Type": PROBLEM})]
    response = await call("POST")
    assert (response.status_code, response.json()) == (409, {"code": "outcome-unknown"})
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("value", "at_least"), [("3", 3.0), ("Thu, 01 Jan 1970 00:00:20 GMT", 20.0), ("86400", POLICY.max_retry_after)]
)
async def test_k3_obeys_retry_after(call: Caller, server: Server, value: str, at_least: float) -> None:
    server.script = [Answer(503, headers={"Retry-After": value})]
    assert (await call("POST")).status_code == 200
    assert at_least <= call.pauses[0] <= at_least + POLICY.max_backoff


async def test_k3_a_spent_budget_gives_back_the_last_answer(call: Caller, server: Server) -> None:
    server.script = [Answer(503, b"busy")] * 10
    responses = await call.many([("POST", "/", {})] * 3, budget=RetryBudget(ratio=0, per_second=0, burst=2))
    assert [response.status_code for response in responses] == [503] * 3
    assert responses[-1].content == b"busy"
    assert [response.extensions["retryproof"]["reason"] for response in responses] == ["budget"] * 3
    assert len(server.seen) == 5


async def test_k3_a_retry_is_given_the_time_that_is_left(call: Caller, link: FaultLink) -> None:
    now = iter([0.0, 59.9, 59.9] + [60.0] * 9)
    link.black_hole()
    with pytest.raises(httpx.ReadTimeout, match="attempts: 2"):
        await call.many([("POST", "/", {"timeout": httpx.Timeout(10, read=0.1)})], monotonic=lambda: next(now))


@pytest.mark.parametrize("covered", [True, False])
async def test_k4_refuses_a_stream_that_it_could_not_repeat(call: Caller, server: Server, covered: bool) -> None:
    def sync_body() -> Iterator[bytes]:
        yield b"a"

    async def async_body() -> AsyncIterator[bytes]:
        yield b"a"

    body: Callable[[], Any] = sync_body if call.colour == "sync" else async_body
    headers = {"Content-Length": "1"}
    if covered:
        with pytest.raises(ConfigurationError, match="nothing was sent"):
            await call("POST", content=body(), headers=headers)
        assert server.seen == []
        single = {"retry_policy": RetryPolicy(max_attempts=1)}
        assert (await call("POST", content=body(), headers=headers, extensions=single)).status_code == 200
    else:
        requests = [("POST", "/", {"content": body(), "headers": headers})]
        (response,) = await call.many(requests, policy=RetryPolicy(methods=()))
        assert response.status_code == 200
    assert [seen.body for seen in server.seen] == [b"a"]


async def test_k4_sends_a_form_with_a_file_again(call: Caller, server: Server) -> None:
    server.script = [Answer(503)]
    await call("POST", files={"file": io.BytesIO(b"content")}, data={"name": "value"})
    assert server.seen[0].body == server.seen[1].body
    assert b"content" in server.seen[0].body


async def test_k4_leaves_content_encoding_to_the_client(call: Caller, server: Server) -> None:
    server.script = [Answer(body=gzip.compress(b"plain"), headers={"Content-Encoding": "gzip", "X-A": "1"})]
    response = await call("POST")
    assert response.content == b"plain"
    assert (response.headers["content-encoding"], response.headers["x-a"]) == ("gzip", "1")


async def test_k4_refuses_a_policy_that_is_none(call: Caller, server: Server) -> None:
    with pytest.raises(ConfigurationError, match="retry_policy"):
        await call("POST", extensions={"retry_policy": 3})
    assert server.seen == []


def test_k4_streams_responses_by_choice(server: Server, link: FaultLink) -> None:
    server.script = [Answer(503), Answer(body=b"z" * 500_000)]
    transport = RetryTransport(policy=POLICY, stream_responses=True)
    link.delay(0)
    with httpx.Client(transport=transport) as client, client.stream("POST", link.url) as response:
        assert response.extensions["retryproof"]["attempts"] == 2
        assert response.num_bytes_downloaded == 0
        assert len(response.read()) == 500_000


async def test_k4_a_cancelled_call_gives_its_connection_back(server: Server, link: FaultLink) -> None:
    inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1))
    link.black_hole(times=1)
    async with httpx.AsyncClient(transport=AsyncRetryTransport(inner, policy=POLICY)) as client:
        task = asyncio.create_task(client.post(link.url))
        await asyncio.to_thread(link.wait_for, "black_hole")
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert "Idempotency-Key" in raised.value.__notes__[0]
        assert (await client.post(link.url)).status_code == 200


async def test_k2_every_charge_arrives_through_a_link_that_fails(call: Caller, server: Server, link: FaultLink) -> None:
    link.lose_reply(probability=0.2)
    link.reset(probability=0.1)
    link.cut_after(30, probability=0.1)
    link.duplicate(probability=0.2)
    policy = RetryPolicy(max_attempts=30, backoff=0.001, max_backoff=0.002, retry_burst=math.inf)
    responses = await call.many([("POST", "/", {"content": str(n).encode()}) for n in range(40)], policy=policy)
    assert [response.status_code for response in responses] == [200] * 40
    keys = {seen.body: {other.key for other in server.seen if other.body == seen.body} for seen in server.seen}
    assert len(keys) == 40
    assert {len(of_one) for of_one in keys.values()} == {1}
