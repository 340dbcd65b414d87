"""H11: frameworks that stop a handler when its client leaves have no reason to, under a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import django  # type: ignore[import-untyped]  # Django has no types of its own
import litestar
import pytest
from django.conf import settings  # type: ignore[import-untyped]  # as above
from django.core.asgi import get_asgi_application  # type: ignore[import-untyped]  # as above
from django.http import HttpResponse, StreamingHttpResponse  # type: ignore[import-untyped]  # as above
from django.test import override_settings  # type: ignore[import-untyped]  # as above
from django.urls import path  # type: ignore[import-untyped]  # as above
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from litestar.response import Stream
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from tests.http.harness import new_key
from tests.http.servers import connected, ended_cleanly, exchange, replay, request_bytes, split, uvicorn_server

pytestmark = pytest.mark.timeout(60)


class Bank:
    """What handlers do: a charge in two halves, with the time in between in which a client may leave.

    began: the first half is done. go_on: the second may be. charges: whole ones. stops: halves without the other.
    """

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.charges = 0
        self.stops = 0

    def charge(self) -> str:
        self.began.set()
        self.go_on.wait(20)
        self.charges += 1
        return "charged"

    async def acharge(self) -> str:
        self.began.set()
        try:
            await asyncio.to_thread(self.go_on.wait, 20)
        except asyncio.CancelledError:
            self.stops += 1
            raise
        self.charges += 1
        return "charged"

    async def parts(self) -> AsyncIterator[str]:
        yield "one,"
        yield await self.acharge()


def of_django(bank: Bank) -> Any:
    if not settings.configured:
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup(set_prefix=False)

    async def view(request: Any) -> Any:
        return HttpResponse(await bank.acharge())

    def blocking(request: Any) -> Any:
        return HttpResponse(bank.charge())

    async def stream(request: Any) -> Any:
        return StreamingHttpResponse(bank.parts())

    class Urls:
        urlpatterns: ClassVar[list[Any]] = [path("view", view), path("blocking", blocking), path("stream", stream)]

    return get_asgi_application(), override_settings(ROOT_URLCONF=Urls, ALLOWED_HOSTS=["*"], MIDDLEWARE=[])


def of_starlette(bank: Bank) -> Any:
    async def view(request: Request) -> Response:
        return PlainTextResponse(await bank.acharge())

    def blocking(request: Request) -> Response:
        return PlainTextResponse(bank.charge())

    async def stream(request: Request) -> Response:
        return StreamingResponse(bank.parts())

    endpoints = {"/view": view, "/blocking": blocking, "/stream": stream}
    return Starlette(routes=[Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()])


def of_fastapi(bank: Bank) -> Any:
    app = FastAPI()

    @app.post("/view", response_class=PlainTextResponse)
    async def view() -> str:
        return await bank.acharge()

    @app.post("/blocking", response_class=PlainTextResponse)
    def blocking() -> str:
        return bank.charge()

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(bank.parts())

    return app


def of_litestar(bank: Bank) -> Any:
    @litestar.post("/view", status_code=200)
    async def view() -> str:
        return await bank.acharge()

    @litestar.post("/blocking", status_code=200, sync_to_thread=True)
    def blocking() -> str:
        return bank.charge()

    @litestar.post("/stream", status_code=200)
    async def stream() -> Stream:
        return Stream(bank.parts())

    return litestar.Litestar(route_handlers=[view, blocking, stream])


FRAMEWORKS: dict[str, Callable[[Bank], Any]] = {
    "django": of_django,
    "starlette": of_starlette,
    "fastapi": of_fastapi,
    "litestar": of_litestar,
}


def started(app: Any) -> Any:
    """An app for servers that start one: Django's knows no lifespan."""

    async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    return with_lifespan


@contextmanager
def serving(framework: str, bank: Bank, **options: Any) -> Iterator[int]:
    made = FRAMEWORKS[framework](bank)
    app, settled = made if isinstance(made, tuple) else (made, nullcontext())
    layer = IdempotencyMiddleware(started(app), store="memory://", scope=single_tenant, **options)
    with settled, uvicorn_server(layer) as port:
        try:
            yield port
        finally:
            bank.go_on.set()


@pytest.mark.parametrize("path", ["/view", "/blocking", "/stream"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_h11_a_client_that_leaves_stops_no_handler(framework: str, path: str) -> None:
    bank, key = Bank(), new_key()
    with serving(framework, bank) as port:
        with connected(port) as connection:
            connection.sendall(request_bytes(path, key=key))
            assert bank.began.wait(10)
        twin = split(exchange(port, request_bytes(path, key=key)))[2]  # the server has seen the departure by then
        bank.go_on.set()
        status, _, body = replay(port, path, key)
    assert b"in-progress" in twin
    assert (status, body) == (200, b"one,charged" if path == "/stream" else b"charged")
    assert (bank.charges, bank.stops) == (1, 0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_h11_a_stream_with_its_client_is_whole(framework: str) -> None:
    bank, key = Bank(), new_key()
    bank.go_on.set()
    with serving(framework, bank) as port:
        answer = exchange(port, request_bytes("/stream", key=key))
        assert (ended_cleanly(answer), split(answer)[2]) == (True, b"one,charged")
        assert replay(port, "/stream", key)[2] == b"one,charged"
    assert bank.charges == 1
