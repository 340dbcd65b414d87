"""The ceiling for HTTP: a pure ASGI middleware on the coalesced Redis scripts, written for this app alone."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from benchmarks.ceilings.redis import CoalescedRedis

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Response = tuple[int, list[tuple[bytes, bytes]], bytes]
Store = Callable[[Response], Awaitable[bool]]
"""Stores a response, fenced; False where the lease was lost."""
LEASE_LOST: Response = (409, [], b"lease lost")


class HandWrittenMiddleware:
    """Scope from the x-user header, fingerprint of method, path and body, exact headers and body replayed."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], url: str) -> None:
        self._app = app
        self._url = url
        self._redis: CoalescedRedis | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PATCH"):
            return await self._app(scope, receive, send)
        user = key = b""
        for name, value in scope["headers"]:
            if name == b"idempotency-key":
                key = value
            elif name == b"x-user":
                user = value
        if not key:
            return await self._app(scope, receive, send)
        return await self._once(scope, receive, send, user, key)

    async def _once(self, scope: Scope, receive: Receive, send: Send, user: bytes, key: bytes) -> None:
        redis = self._redis or await self._open()
        body = await read_body(receive)
        record, fingerprint = identify(scope, user, key, body)
        nonce = os.urandom(16)
        reply = await redis.claims.submit((record, fingerprint, nonce))
        if reply[:1] != b"A":
            return await answer(send, reply)

        async def store(response: Response) -> bool:
            return bool(await redis.completions.submit((record, nonce, reply[1:], encode(response))))

        return await self._run(scope, receiving_again(body, receive), send, store)

    async def _open(self) -> CoalescedRedis:
        redis = CoalescedRedis(self._url)
        await redis.open()
        self._redis = redis
        return redis

    async def _run(self, scope: Scope, receive: Receive, send: Send, store: Store) -> None:
        """Run the app and answer, once the response is stored."""
        messages: list[Message] = []

        async def capture(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, capture)
        response = as_response(messages)
        await respond(send, response if await store(response) else LEASE_LOST)


class HandWrittenInLastSend(HandWrittenMiddleware):
    """The same with the endings of ours.

    The app runs in a task of its own, so that it outlives a server that leaves, and its response is stored inside of
    its last `send`, so that background tasks run after it and do not delay it.
    """

    async def _run(self, scope: Scope, receive: Receive, send: Send, store: Store) -> None:
        messages: list[Message] = []

        async def settle_and_send(message: Message) -> None:
            messages.append(message)
            if message["type"] == "http.response.start" or message.get("more_body"):
                return None
            if not await store(as_response(messages)):
                return await respond(send, LEASE_LOST)
            for held in messages:
                await send(held)

        await asyncio.shield(asyncio.create_task(self._app(scope, receive, settle_and_send)))


async def read_body(receive: Receive) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return message.get("body", b"")
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


def identify(scope: Scope, user: bytes, key: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The record and the fingerprint of a request."""
    endpoint = b"%b %b" % (scope["method"].encode(), scope["raw_path"])
    record = hashlib.sha256(b"%d:%b%d:%b%d:%b" % (len(user), user, len(endpoint), endpoint, len(key), key)).digest()
    return record, hashlib.sha256(b"%b\n%b" % (endpoint, body)).digest()


def receiving_again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what the server has to say."""
    delivered = False

    async def receive_again() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def as_response(messages: list[Message]) -> Response:
    """What the app sent."""
    head, *parts = messages
    content = parts[0].get("body", b"") if len(parts) == 1 else b"".join(part.get("body", b"") for part in parts)
    return head["status"], head["headers"], content


async def answer(send: Send, reply: bytes) -> None:
    """What a claim that was not acquired is answered."""
    match reply[:1]:
        case b"C":
            status, headers, body = decode(reply[1:])
            await respond(send, (status, [*headers, (b"idempotency-replayed", b"true")], body))
        case b"R":
            await respond(send, (409, [(b"retry-after", b"1")], b"in progress"))
        case _:
            await respond(send, (422, [], b"key reused"))


async def respond(send: Send, response: Response) -> None:
    status, headers, body = response
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def encode(response: Response) -> bytes:
    """Status, header lines and body as HTTP/1.1 would write them: exact, since header lines hold no CR LF."""
    status, headers, body = response
    return b"%d\r\n%b\r\n%b" % (status, b"".join([b"%b:%b\r\n" % (name, value) for name, value in headers]), body)


def decode(stored: bytes) -> Response:
    head, _, body = stored.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name, value))
    return int(status), headers, body
