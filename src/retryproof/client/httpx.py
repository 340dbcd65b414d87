"""Transports for httpx that retry (K1 to K4). The code that uses the client does not change.

    client = httpx.Client(transport=RetryTransport())
    client.post("https://api.example/charges", json=charge)     # one key, up to five attempts, one charge

Three things to know:

- The server must support the key. Mount the transport on the APIs that do (`httpx.Client(mounts=…)`).
- An attempt succeeds only when its whole response has arrived. So the body is read before the response is returned,
  still encoded as it came. With `stream_responses=True`, bodies of responses below 400 are streamed, and the caller
  handles cut ones.
- `httpx.Client` passes `verify`, `proxy`, `http2`, … only to its own transport: give them to the wrapped transport.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random as random_module
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Self
from uuid import uuid4

try:
    import httpx
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("RetryTransport needs httpx: pip install 'retryproof[httpx]'", name="httpx") from missing

from retryproof.client.budget import RetryBudget
from retryproof.client.flow import (
    Answered,
    Broken,
    ClientCall,
    ClientCommand,
    Resumed,
    Send,
    Stop,
    Wait,
    problem_code,
    retrying,
)
from retryproof.client.policy import RetryPolicy
from retryproof.core.errors import ConfigurationError
from retryproof.core.operation_key import current_operation_key

__all__ = ["AsyncRetryTransport", "RetryTransport"]

# Raised before any byte of the request can have been sent.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
# The request itself is wrong, so another attempt would fail too.
_HOPELESS = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)

_TIMEOUTS = ("connect", "read", "write", "pool")

ResponseOrError = httpx.Response | httpx.TransportError


class _Exchange:
    """One call, without its I/O."""

    def __init__(self, request: httpx.Request, transport: _Retrying) -> None:
        policy = _policy_of(request, transport.policy)
        key = _key_of(request, policy)
        self.call = ClientCall(request.method, key, transport.monotonic())
        if not isinstance(request.stream, httpx.ByteStream):
            policy = self._once(policy)
        self._request = request
        self._transport = transport
        self._policy = policy
        self._attempt = 1
        self._outcome: ResponseOrError
        self._flow = retrying(self.call, policy, transport.budget, transport.random)

    def _once(self, policy: RetryPolicy) -> RetryPolicy:
        """The policy for a body that can be read only once, if it may be sent at all."""
        if self.call.repeatable and policy.max_attempts > 1:
            raise ConfigurationError(
                f"this {self.call.method} may have to be sent again, and its body is a stream that can be read only "
                "once; nothing was sent. Give the body as bytes, or allow a single attempt with "
                "extensions={'retry_policy': RetryPolicy(max_attempts=1)}"
            )
        return replace(policy, max_attempts=1)

    def begin(self) -> ClientCommand:
        return next(self._flow)

    def tell(self, outcome: ResponseOrError) -> ClientCommand:
        self._outcome = outcome
        now = self._transport.monotonic()
        if isinstance(outcome, httpx.Response):
            headers = {name.lower(): value for name, value in outcome.headers.items()}
            return self._flow.send(
                Answered(outcome.status_code, headers, now, self._transport.wall_clock(), _code_of(outcome))
            )
        return self._flow.send(Broken(sent=not isinstance(outcome, _UNSENT), now=now))

    def resume(self) -> ClientCommand:
        return self._flow.send(Resumed(self._transport.monotonic()))

    def request_for(self, send: Send) -> httpx.Request:
        """The request itself; for a retry, a copy whose time-outs fit into the time left."""
        self._attempt = send.attempt
        if send.time_left is None or send.time_left == math.inf:
            return self._request
        own = self._request.extensions.get("timeout", {})
        timeout = {name: min(_or_infinite(own.get(name)), send.time_left) for name in _TIMEOUTS}
        return httpx.Request(
            self._request.method,
            self._request.url,
            headers=self._request.headers,
            stream=self._request.stream,
            extensions={**self._request.extensions, "timeout": timeout},
        )

    def reads(self, response: httpx.Response) -> bool:
        """Whether the body belongs to the attempt.

        The body of an error does, also with `stream_responses`: it is small, and a retry releases the connection.
        """
        if not self.call.repeatable or response.status_code == 101:
            return False
        return response.status_code >= 400 or not self._transport.stream_responses

    def finish(self, stop: Stop) -> httpx.Response:
        """Return the last outcome, or raise it."""
        outcome = self._outcome
        if isinstance(outcome, httpx.TransportError):
            raise outcome
        outcome.extensions["retryproof"] = {
            "key": self.call.key,
            "attempts": stop.attempts,
            "reason": stop.reason,
        }
        return outcome

    def name_key(self, error: BaseException) -> None:
        """Add the key to an exception: the caller needs it to retry the same operation."""
        if self.call.key is None:
            return
        text = f"{self._policy.header}: {self.call.key}, attempts: {self._attempt}"
        error.__dict__["idempotency_key"] = self.call.key
        if isinstance(error, httpx.TransportError):
            error.args = (f"{error} [{text}]" if str(error) else f"[{text}]",)
        else:
            error.add_note(f"[{text}]")


class _Retrying:
    """The options of both transports."""

    def __init__(
        self,
        policy: RetryPolicy,
        budget: RetryBudget | None,
        stream_responses: bool,
        random: Callable[[], float],
        monotonic: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.policy = policy
        self.budget = RetryBudget.of(policy) if budget is None else budget
        self.stream_responses = stream_responses
        self.random = random
        self.monotonic = monotonic
        self.wall_clock = wall_clock


class RetryTransport(httpx.BaseTransport):
    """Retries over any sync transport (default: a new `httpx.HTTPTransport`), which it closes with itself.

    Transports may share a `budget`; by default each has its own, made from the policy. A request may have its own
    policy in `extensions={"retry_policy": …}`. The response's `extensions["retryproof"]` has `key`, `attempts` and
    `reason`. Exceptions keep their type; their message names the key, and `idempotency_key` has it.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        budget: RetryBudget | None = None,
        stream_responses: bool = False,
        sleep: Callable[[float], object] = time.sleep,
        random: Callable[[], float] = random_module.random,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._transport = httpx.HTTPTransport() if transport is None else transport
        self._retrying = _Retrying(policy, budget, stream_responses, random, monotonic, wall_clock)
        self._sleep = sleep

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if _is_multipart(request):
            request.read()
        exchange = _Exchange(request, self._retrying)
        try:
            command = exchange.begin()
            while True:
                match command:
                    case Send():
                        command = exchange.tell(self._send(exchange, command))
                    case Wait(seconds):
                        self._sleep(seconds)
                        command = exchange.resume()
                    case Stop():
                        return exchange.finish(command)
        except BaseException as error:
            exchange.name_key(error)
            raise

    def _send(self, exchange: _Exchange, command: Send) -> ResponseOrError:
        try:
            response = self._transport.handle_request(exchange.request_for(command))
            if not exchange.reads(response):
                return response
            try:
                return _whole(response, b"".join(_sync(response)))
            finally:
                response.close()
        except _HOPELESS:
            raise
        except httpx.TransportError as error:
            return error

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        self._transport.close()


class AsyncRetryTransport(httpx.AsyncBaseTransport):
    """Retries over any async transport (default: a new `httpx.AsyncHTTPTransport`); options as RetryTransport's.

    Under trio, give `sleep=trio.sleep`.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        budget: RetryBudget | None = None,
        stream_responses: bool = False,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        random: Callable[[], float] = random_module.random,
        monotonic: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._transport = httpx.AsyncHTTPTransport() if transport is None else transport
        self._retrying = _Retrying(policy, budget, stream_responses, random, monotonic, wall_clock)
        self._sleep = sleep

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if _is_multipart(request):
            await request.aread()
        exchange = _Exchange(request, self._retrying)
        try:
            command = exchange.begin()
            while True:
                match command:
                    case Send():
                        command = exchange.tell(await self._send(exchange, command))
                    case Wait(seconds):
                        await self._sleep(seconds)
                        command = exchange.resume()
                    case Stop():
                        return exchange.finish(command)
        except BaseException as error:
            exchange.name_key(error)
            raise

    async def _send(self, exchange: _Exchange, command: Send) -> ResponseOrError:
        try:
            response = await self._transport.handle_async_request(exchange.request_for(command))
            if not exchange.reads(response):
                return response
            try:
                return _whole(response, b"".join([chunk async for chunk in _async(response)]))
            finally:
                await response.aclose()
        except _HOPELESS:
            raise
        except httpx.TransportError as error:
            return error

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        await self._transport.aclose()


def _policy_of(request: httpx.Request, default: RetryPolicy) -> RetryPolicy:
    policy = request.extensions.get("retry_policy", default)
    if not isinstance(policy, RetryPolicy):
        raise ConfigurationError("extensions['retry_policy'] must be a RetryPolicy")
    return policy


def _key_of(request: httpx.Request, policy: RetryPolicy) -> str | None:
    """The call's key. It is set on the request itself, so that redirects, authentication and resends have it too."""
    given = request.headers.get(policy.header)
    if given is not None:
        # An empty key protects nothing, but it is the caller's, so it is not replaced.
        return given.strip() or None
    if request.method not in policy.methods:
        return None
    block = current_operation_key()
    if block is None:
        key = str(uuid4())
    else:
        block.bind(_target(request), _digest(request))
        key = block.key
    request.headers[policy.header] = f'"{key}"' if policy.quoted else key
    return key


def _target(request: httpx.Request) -> str:
    """Method and URL for people, without parts that may contain a secret."""
    return f"{request.method} {request.url.copy_with(userinfo=b'', query=None, fragment=None)}"


def _digest(request: httpx.Request) -> bytes:
    """SHA-256 over method, URL and body. If a body can be read only once, the server has to compare it."""
    body = request.read() if isinstance(request.stream, httpx.ByteStream) else b""
    if _is_multipart(request):
        # A form that is built again has a different boundary.
        boundary = request.headers["content-type"].partition("boundary=")[2].partition(";")[0].strip(' "')
        body = body.replace(boundary.encode(), b"") if boundary else body
    digest = hashlib.sha256()
    for part in (request.method.encode(), str(request.url).encode(), body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _is_multipart(request: httpx.Request) -> bool:
    """Read a form into memory once: a second time its files may be unreadable, or different."""
    content_type: str = request.headers.get("content-type", "")
    return content_type.lower().startswith("multipart/")


def _code_of(response: httpx.Response) -> str | None:
    if response.status_code < 400 or not isinstance(response.stream, httpx.ByteStream):
        return None
    try:
        body = httpx.Response(response.status_code, headers=response.headers, content=b"".join(response.stream)).content
    except httpx.DecodingError:
        return None
    return problem_code(response.headers.get("content-type"), body)


def _whole(response: httpx.Response, raw: bytes) -> httpx.Response:
    """The same response with its complete body, still with its content encoding."""
    return httpx.Response(
        response.status_code,
        headers=response.headers,
        stream=httpx.ByteStream(raw),
        extensions=response.extensions,
    )


def _sync(response: httpx.Response) -> httpx.SyncByteStream:
    if not isinstance(response.stream, httpx.SyncByteStream):
        raise TypeError("an async transport under RetryTransport; use AsyncRetryTransport")
    return response.stream


def _async(response: httpx.Response) -> httpx.AsyncByteStream:
    if not isinstance(response.stream, httpx.AsyncByteStream):
        raise TypeError("a sync transport under AsyncRetryTransport; use RetryTransport")
    return response.stream


def _or_infinite(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
