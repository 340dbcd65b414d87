"""An app of many kinds of responses in Litestar and in plain ASGI, with the layer or without, for servers to import.

RETRYPROOF_TEST_LAYER: "1" puts the layer around it. RETRYPROOF_TEST_APP: "litestar" or "plain".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from litestar import Litestar, Request, WebSocket, get, post, websocket
from litestar.response import ServerSentEvent, Stream

from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import App, AsgiScope, Receive, Send

lifespan: list[str] = []
effects: dict[str, int] = {}


def effect(name: str) -> int:
    """Count an effect."""
    effects[name] = effects.get(name, 0) + 1
    return effects[name]


async def parts() -> AsyncIterator[bytes]:
    """A body in pieces."""
    for piece in (b"a", b"b" * 1000, b"c"):
        yield piece
        await asyncio.sleep(0)


async def events() -> AsyncIterator[str]:
    """Three events."""
    for number in range(3):
        yield str(number)


@get("/plain", sync_to_thread=False)
def plain() -> dict[str, str]:
    return {"hello": "world"}


@get("/stream", sync_to_thread=False)
def stream() -> Stream:
    return Stream(parts())


@get("/events", sync_to_thread=False)
def sse() -> ServerSentEvent:
    return ServerSentEvent(events())


@post("/echo")
async def echo(request: Request[Any, Any, Any]) -> dict[str, Any]:
    return {"body": (await request.body()).decode(), "n": effect("echo")}


@post("/stream")
async def post_stream() -> Stream:
    effect("stream")
    return Stream(parts())


@websocket("/socket")
async def socket(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    await socket.send_text((await socket.receive_text())[::-1])
    await socket.close()


async def start() -> None:
    lifespan.append("startup")


async def stop() -> None:
    lifespan.append("shutdown")


def litestar_app() -> App:
    """The app in Litestar."""
    handlers = [plain, stream, sse, echo, post_stream, socket]
    return Litestar(handlers, on_startup=[start], on_shutdown=[stop])  # type: ignore[return-value]  # Litestar's own types of scope and messages


async def plain_app(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """The same in plain ASGI, as far as the servers' suite needs it."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    path = scope["path"]
    if path == "/slow":
        await asyncio.sleep(0.3)  # in which the client leaves
    number = effect(path)
    kind = b"text/event-stream" if path == "/events" else b"text/plain"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if path in ("/plain", "/slow"):
        await send({"type": "http.response.body", "body": b"%d:%b" % (number, body)})
        return
    async for piece in parts():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def layered_app(app: App) -> App:
    """The app behind the layer."""
    return IdempotencyMiddleware(app, store="memory://", scope=single_tenant)


app = litestar_app() if os.environ.get("RETRYPROOF_TEST_APP") == "litestar" else plain_app
if os.environ.get("RETRYPROOF_TEST_LAYER") == "1":
    app = layered_app(app)
