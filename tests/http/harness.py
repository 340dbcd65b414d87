"""A client of ASGI apps without a server: exact messages in, exact messages out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from retryproof.observe import Event

SECONDS = 10.0
Header = tuple[bytes, bytes]


class Conversation:
    """One request that the test leads message by message.

    sent: what the app sent so far.
    """

    def __init__(self, app: App, scope: AsgiScope) -> None:
        self.scope = scope
        self.sent: list[AsgiMessage] = []
        self.fail_sends_with: Exception | None = None
        self._incoming: asyncio.Queue[AsgiMessage] = asyncio.Queue()
        self._news = asyncio.Event()
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))
        self.task.add_done_callback(lambda _: self._news.set())

    def give(self, body: bytes = b"", *, more: bool = False) -> None:
        """Send the app a part of the body."""
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def put(self, message: AsgiMessage) -> None:
        """Send the app any message."""
        self._incoming.put_nowait(message)

    def leave(self) -> None:
        """Disconnect, for good."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def until(self, condition: Callable[[Conversation], bool]) -> None:
        """Wait until the messages sent so far fulfil a condition."""
        async with asyncio.timeout(SECONDS):
            while not condition(self):
                assert not self.task.done(), self.sent
                self._news.clear()
                await self._news.wait()

    async def end(self) -> Answer:
        """Wait for the app to return; raises what it raised."""
        async with asyncio.timeout(SECONDS):
            await asyncio.wait({self.task})
        self.task.result()
        return self.answer

    @property
    def answer(self) -> Answer:
        """What was sent so far, as a response."""
        return Answer(self.sent)

    async def _receive(self) -> AsgiMessage:
        message = await self._incoming.get()
        if message["type"] == "http.disconnect":
            self._incoming.put_nowait(message)
        return message

    async def _send(self, message: AsgiMessage) -> None:
        if self.fail_sends_with is not None:
            raise self.fail_sends_with
        self.sent.append(message)
        self._news.set()
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ends and not self.sent[0].get("trailers"):
            self.leave()  # servers say so to whoever receives after the end of the response


class Answer:
    """A response, complete or not."""

    def __init__(self, messages: Sequence[AsgiMessage]) -> None:
        self.messages = list(messages)
        heads = [message for message in messages if message["type"] == "http.response.start"]
        bodies = [message for message in messages if message["type"] == "http.response.body"]
        self.status: int = heads[0]["status"] if heads else 0
        self.headers: list[Header] = [tuple(header) for header in heads[0].get("headers", ())] if heads else []
        self.body = b"".join(message.get("body", b"") for message in bodies)
        self.complete = bool(bodies) and not bodies[-1].get("more_body", False)

    def values(self, name: bytes) -> list[bytes]:
        """The values of a header, in order."""
        return [value for found, value in self.headers if found.lower() == name]

    @property
    def replayed(self) -> bool:
        """Whether it is marked as a replay."""
        return self.values(b"idempotency-replayed") == [b"true"]

    @property
    def code(self) -> str:
        """The code of a problem document; checks its form (H7)."""
        assert self.values(b"content-type") == [b"application/problem+json"], (self.status, self.body)
        document = json.loads(self.body)
        assert document["status"] == self.status
        assert set(document) >= {"type", "title", "status", "code", "detail"}
        [link] = self.values(b"link")
        assert link.endswith(b'; rel="describedby"')
        assert document["type"].startswith("http")
        code: str = document["code"]
        return code


def request_scope(
    method: str = "POST",
    path: str = "/charges",
    *,
    key: str | bytes | None = None,
    headers: Iterable[Header] = (),
    query: bytes = b"",
    **more: Any,
) -> AsgiScope:
    """The scope of a request as a server makes it."""
    key_lines = [] if key is None else [(b"idempotency-key", key.encode() if isinstance(key, str) else key)]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query,
        "root_path": "",
        "headers": [(b"host", b"test"), *headers, *key_lines],
        **more,
    }


def start(app: App, method: str = "POST", path: str = "/charges", **options: Any) -> Conversation:
    """Begin a request; the test gives its body."""
    return Conversation(app, request_scope(method, path, **options))


async def call(
    app: App, method: str = "POST", path: str = "/charges", *, body: bytes = b"{}", **options: Any
) -> Answer:
    """A whole request and its answer."""
    conversation = start(app, method, path, **options)
    conversation.give(body)
    return await conversation.end()


def new_key() -> str:
    """A strong key that no other test uses."""
    return str(uuid4())


class Counting:
    """An app that counts its effects and answers 201 with their number.

    gate: when given, each run waits for it after its effect; `began` says that one runs.
    """

    def __init__(self, status: int = 201, headers: Sequence[Header] = (), gate: asyncio.Event | None = None) -> None:
        self.effects = 0
        self.status = status
        self.headers = list(headers)
        self.bodies: list[bytes] = []
        self.gate = gate
        self.began = asyncio.Event()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        self.bodies.append(await read_body(receive))
        self.effects += 1
        body = b'{"n": %d}' % self.effects
        self.began.set()
        if self.gate is not None:
            await self.gate.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


async def read_body(receive: Receive) -> bytes:
    """All of a request's body."""
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


class Events(list[Event]):
    """A listener that remembers."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[str]:
        """What happened, in order."""
        return [str(event.kind) for event in self]


def layered(app: App, **options: Any) -> IdempotencyMiddleware:
    """The app behind the middleware, by default with a memory store and a single tenant."""
    return IdempotencyMiddleware(app, **{"store": "memory://", "scope": single_tenant, **options})


@asynccontextmanager
async def closing(layer: IdempotencyMiddleware) -> AsyncIterator[IdempotencyMiddleware]:
    """The layer, its store closed at the end."""
    try:
        yield layer
    finally:
        await layer.aclose(drain=1.0)


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[App]:
    """The app between its startup and its shutdown, as a server runs it."""
    lifespan = Conversation(app, {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}})
    lifespan.put({"type": "lifespan.startup"})
    await lifespan.until(lambda conversation: len(conversation.sent) == 1)
    try:
        yield app
    finally:
        lifespan.put({"type": "lifespan.shutdown"})
        await lifespan.end()
    assert [message["type"] for message in lifespan.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
