"""The ceiling for HTTP: a pure ASGI middleware on the coalesced Redis scripts, written for this app alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from benchmarks.ceilings.redis import CoalescedRedis

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
        endpoint = b"%b %b" % (scope["method"].encode(), scope["raw_path"])
        record = hashlib.sha256(b"%d:%b%d:%b%d:%b" % (len(user), user, len(endpoint), endpoint, len(key), key)).digest()
        fingerprint = hashlib.sha256(b"%b\n%b" % (endpoint, body)).digest()
        nonce = os.urandom(16)
        reply = await redis.claims.submit((record, fingerprint, nonce))
        match reply[:1]:
            case b"A":
                response = await self._run(scope, receive, body)
                if not await redis.completions.submit((record, nonce, reply[1:], encode(response))):
                    return await respond(send, (409, [], b"lease lost"))
                return await respond(send, response)
            case b"C":
                status, headers, body = decode(reply[1:])
                return await respond(send, (status, [*headers, (b"idempotency-replayed", b"true")], body))
            case b"R":
                return await respond(send, (409, [(b"retry-after", b"1")], b"in progress"))
            case _:
                return await respond(send, (422, [], b"key reused"))

    async def _open(self) -> CoalescedRedis:
        redis = CoalescedRedis(self._url)
        await redis.open()
        self._redis = redis
        return redis

    async def _run(self, scope: Scope, receive: Receive, body: bytes) -> Response:
        messages: list[Message] = []
        delivered = False

        async def receive_again() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def capture(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive_again, capture)
        head, *parts = messages
        content = parts[0].get("body", b"") if len(parts) == 1 else b"".join(p.get("body", b"") for p in parts)
        return head["status"], head["headers"], content


Response = tuple[int, list[tuple[bytes, bytes]], bytes]


async def read_body(receive: Receive) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return message.get("body", b"")
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


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
