"""The layer for WSGI behind the interface of the one for ASGI, so that one suite holds for both.

    test client (ASGI) -> WsgiLayer -> IdempotencyMiddleware of WSGI -> as_wsgi(the test's app)

A thread is the server, another's loop is the test's: what the test's app sends goes through the WSGI layer as the parts
of an iterable. What WSGI cannot express is declared in `CAPABILITIES`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from retryproof.http import single_tenant
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send
from retryproof.http.wsgi import IdempotencyMiddleware

T = TypeVar("T")
SECONDS = 20.0
SERVERS = ThreadPoolExecutor(96, "wsgi-server")

CAPABILITIES = {
    "asgi": {
        "messages",  # exact ones: trailers, pushes, files by path, what is not covered passes as it is
        "unfinished responses",  # an app that returns in the middle of a response that announced no length
        "departures at once",  # the layer hears of a client that left without sending to it
        "cancellation",  # a server, a time-out or a lost lease can stop what runs
        "apart header lines",  # several lines of one name
        "interrupted reading",  # a body that stalls or is cut is given up at once
        "loop",  # async callables, async stores, and turns of the event loop
    },
    "wsgi": set[str](),
}
"""What a server interface can do. A test that needs one says so: `pytest.mark.needs("messages")`."""


class WsgiLayer:
    """An app behind the WSGI layer, to be called as an ASGI app."""

    def __init__(self, app: App, **options: Any) -> None:
        self.middleware = IdempotencyMiddleware(as_wsgi(app), **options)
        self._engine = self.middleware._engine

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(SERVERS, _serve, self.middleware, scope, receive, send, loop)

    async def aclose(self, drain: float = 10.0) -> None:
        await asyncio.to_thread(self.middleware.close, drain)


def layered_by_wsgi(app: App, **options: Any) -> WsgiLayer:
    """The app behind the middleware, by default with a memory store and a single tenant."""
    return WsgiLayer(app, **{"store": "memory://", "scope": single_tenant, **options})


def _serve(
    app: WSGIApplication, scope: AsgiScope, receive: Receive, send: Send, loop: asyncio.AbstractEventLoop
) -> None:
    """One request, as a server with a thread a request serves it."""

    def on_loop(work: Awaitable[T]) -> T:
        return asyncio.run_coroutine_threadsafe(_awaited(work), loop).result(SECONDS)

    source = _Input(lambda: on_loop(receive()))
    environ = environ_of(scope, source, loop)
    head: list[AsgiMessage] = []
    left: list[Future[AsgiMessage]] = []

    def tell(message: AsgiMessage) -> None:
        if left and left[0].done():
            raise BrokenPipeError("The client has left.")
        on_loop(send(message))

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Callable[[bytes], None]:
        assert not head
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        head.append({"type": "http.response.start", "status": int(status[:3]), "headers": pairs})
        return write

    begun = False

    def write(data: bytes, *, more: bool = True) -> None:
        nonlocal begun
        if not left and source.is_read:
            left.append(asyncio.run_coroutine_threadsafe(_awaited(receive()), loop))
        if not begun:
            begun = True
            tell(head[0])
        if data or not more:
            tell({"type": "http.response.body", "body": data, "more_body": more})

    given: Any = app(environ, start_response)
    try:
        if isinstance(given, list) and len(given) == 1:
            write(given[0], more=False)
        else:
            for data in given:
                if head and (data or begun):
                    write(data)
            if head:
                write(b"", more=False)
    except OSError:  # a server says so in its log
        pass
    finally:
        for watch in left:
            watch.cancel()
        if hasattr(given, "close"):
            given.close()


async def _awaited(work: Awaitable[T]) -> T:
    return await work


class _Input:
    """`wsgi.input` over ASGI's `receive`."""

    def __init__(self, receive: Callable[[], AsgiMessage]) -> None:
        self._receive = receive
        self._there = b""
        self.is_read = False

    def read(self, size: int = -1) -> bytes:
        while not self.is_read and (size < 0 or len(self._there) < size):
            message = self._receive()
            self._there += message.get("body", b"")
            self.is_read = not message.get("more_body", False)
        given, self._there = (self._there, b"") if size < 0 else (self._there[:size], self._there[size:])
        return given


def environ_of(scope: AsgiScope, source: Any, loop: asyncio.AbstractEventLoop) -> WSGIEnvironment:
    """The environ that a server makes of such a request."""
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": scope["root_path"],
        "PATH_INFO": scope["path"]
        .removeprefix(scope["root_path"])
        .encode("utf-8", "surrogateescape")
        .decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "wsgi.url_scheme": "http",
        "wsgi.input": source,
        "wsgi.input_terminated": True,
        "test.scope": scope,
        "test.loop": loop,
        **{name: value for name, value in scope.items() if name.startswith("retryproof.")},
    }
    if scope.get("raw_path") is not None:
        raw = quote(scope["raw_path"], safe="/%:") if max(scope["raw_path"], default=0) > 127 else scope["raw_path"]
        environ["RAW_URI"] = raw if isinstance(raw, str) else raw.decode("ascii")
    for name, value in scope["headers"]:
        cgi = name.decode().upper().replace("-", "_")
        cgi = cgi if cgi in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{cgi}"
        text = value.decode("latin-1")
        environ[cgi] = f"{environ[cgi]},{text}" if cgi in environ else text
    if "user" in scope:
        environ["user"] = scope["user"]
    return environ


def as_wsgi(app: App) -> WSGIApplication:
    """A test's app under WSGI: one message is a list, several are a generator."""

    def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        running = _Running(app, environ)
        message = running.next()
        if message is None:
            return running.ending([])
        _start(message, start_response)
        message = running.next()
        if message is None:
            return running.ending([])
        if message.get("more_body"):
            return running.parts(message)
        return running.ending([bytes(message.get("body", b""))])

    return wsgi_app


def _start(message: AsgiMessage, start_response: StartResponse) -> None:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
    start_response(f"{message['status']} As Sent", headers)


class _Running:
    """A test's app on its loop, message by message."""

    def __init__(self, app: App, environ: WSGIEnvironment) -> None:
        self._loop: asyncio.AbstractEventLoop = environ["test.loop"]
        body = environ["wsgi.input"].read()
        requests: list[AsgiMessage] = [{"type": "http.request", "body": body, "more_body": False}]
        self._messages: asyncio.Queue[AsgiMessage | None] = asyncio.Queue()
        self._taken = asyncio.Semaphore(0)

        async def receive() -> AsgiMessage:
            if not requests:
                await asyncio.Event().wait()
            return requests.pop()

        async def send(message: AsgiMessage) -> None:
            self._messages.put_nowait(message)
            await self._taken.acquire()

        async def run() -> None:
            try:
                marks = {name: value for name, value in environ.items() if name.startswith("retryproof.")}
                await app({**environ["test.scope"], **marks}, receive, send)
            finally:
                self._messages.put_nowait(None)

        self._first = True
        self.over = asyncio.run_coroutine_threadsafe(run(), self._loop)

    def next(self) -> AsgiMessage | None:
        """What the app sends next; None: it has returned. Raises what it raised."""
        if not self._first:
            self._loop.call_soon_threadsafe(self._taken.release)
        self._first = False
        message = asyncio.run_coroutine_threadsafe(self._messages.get(), self._loop).result(SECONDS)
        if message is None:
            self.over.result(SECONDS)
        return message

    def ending(self, parts: list[bytes]) -> Iterable[bytes]:
        """A whole response, after which the app runs on until it returns."""
        return _Whole(parts, self)

    def parts(self, message: AsgiMessage) -> Iterable[bytes]:
        """A stream, of which this is the first part."""
        return _Parts(message, self)

    def stop(self) -> None:
        """Cancel the app in the middle of its response."""
        self.over.cancel()
        with contextlib.suppress(BaseException):
            self.over.result(SECONDS)

    def close(self) -> None:
        """The app is done with its response."""
        if not self.over.done():
            self.next()


class _Whole(list[bytes]):
    """All parts at once, and work that goes on at `close`."""

    def __init__(self, parts: list[bytes], running: _Running) -> None:
        super().__init__(parts)
        self._running = running

    def close(self) -> None:
        self._running.close()


class _Parts:
    """The parts of a stream, and work that goes on at `close`; closed early, it is stopped."""

    def __init__(self, message: AsgiMessage, running: _Running) -> None:
        self._message: AsgiMessage | None = message
        self._running = running
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        message = self._message or self._running.next()
        self._message = None
        if message is None:
            self._ended = True
            raise StopIteration
        self._ended = not message.get("more_body")
        return bytes(message.get("body", b""))

    def close(self) -> None:
        if self._ended:
            self._running.close()
        else:
            self._running.stop()
