"""The layer in Starlette and FastAPI apps: their middleware, responses and errors around it and inside it."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import litestar
import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from litestar.params import QueryParameter
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route

from retryproof.http import by_user, single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.operation import current_operation
from tests.http.harness import new_key, serving

Effects = list[str]


def starlette_app(routes: dict[str, Callable[..., Any]], middleware: list[Middleware]) -> Starlette:
    return Starlette(
        routes=[Route(path, endpoint, methods=["POST"]) for path, endpoint in routes.items()], middleware=middleware
    )


def fastapi_app(routes: dict[str, Callable[..., Any]], middleware: list[Middleware]) -> FastAPI:
    app = FastAPI(middleware=middleware)
    for path, endpoint in routes.items():
        app.add_route(path, endpoint, methods=["POST"])
    return app


MakeApp = Callable[[dict[str, Callable[..., Any]], list[Middleware]], Any]


@pytest.fixture(params=[starlette_app, fastapi_app], ids=["starlette", "fastapi"])
def make_app(request: pytest.FixtureRequest) -> MakeApp:
    made: MakeApp = request.param
    return made


@pytest.fixture
def idempotency(store_url: str, unique: str) -> Middleware:
    return Middleware(IdempotencyMiddleware, store=store_url, scope=single_tenant, name=unique)


@asynccontextmanager
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that is being served."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with serving(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


async def twice(app: Any, path: str = "/", *, headers: dict[str, str] | None = None) -> list[httpx.Response]:
    """The answers to one request and its retry."""
    async with client(app) as http:
        sent = {"idempotency-key": new_key(), **(headers or {})}
        return [await http.post(path, headers=sent) for _ in range(2)]


def replayed(response: httpx.Response) -> bool:
    return response.headers.get_list("idempotency-replayed") == ["true"]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_the_operation_is_seen_by_handlers_of_both_colours(
    make_app: MakeApp, idempotency: Middleware, asynchronous: bool
) -> None:
    def sync(request: Request) -> Response:
        return PlainTextResponse(str(current_operation().derive("charge")))

    async def on_loop(request: Request) -> Response:
        return sync(request)

    first, second = await twice(make_app({"/": on_loop if asynchronous else sync}, [idempotency]))
    assert (first.status_code, first.text, replayed(second)) == (200, second.text, True)


async def test_background_tasks_run_once_after_the_response_was_stored(
    make_app: MakeApp, idempotency: Middleware
) -> None:
    effects: Effects = []

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("done", background=BackgroundTask(effects.append, "sent"))

    first, second = await twice(make_app({"/": endpoint}, [idempotency]))
    assert (first.text, second.text, replayed(second), effects) == ("done", "done", True, ["sent"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_h14_redirects_are_replayed(make_app: MakeApp, idempotency: Middleware, status: int) -> None:
    async def endpoint(request: Request) -> Response:
        return RedirectResponse("/elsewhere", status_code=status)

    first, second = await twice(make_app({"/": endpoint}, [idempotency]))
    assert (first.status_code, first.headers["location"]) == (status, "/elsewhere")
    assert (second.status_code, second.headers["location"], replayed(second)) == (status, "/elsewhere", True)


async def test_a_204_is_replayed(make_app: MakeApp, idempotency: Middleware) -> None:
    async def endpoint(request: Request) -> Response:
        return Response(status_code=204)

    first, second = await twice(make_app({"/": endpoint}, [idempotency]))
    assert (first.status_code, second.status_code, second.content, replayed(second)) == (204, 204, b"", True)
    assert "content-length" not in second.headers


async def test_h14_a_file_is_replayed(make_app: MakeApp, idempotency: Middleware, tmp_path: Any) -> None:
    (tmp_path / "file").write_bytes(b"a" * 200_000)

    async def endpoint(request: Request) -> Response:
        return FileResponse(tmp_path / "file")

    first, second = await twice(make_app({"/": endpoint}, [idempotency]))
    assert (first.content, second.content, replayed(second)) == (b"a" * 200_000, b"a" * 200_000, True)


async def test_h8_an_exception_is_answered_by_the_app_and_released(make_app: MakeApp, idempotency: Middleware) -> None:
    effects: Effects = []

    async def endpoint(request: Request) -> Response:
        effects.append("run")
        raise ZeroDivisionError

    answers = await twice(make_app({"/": endpoint}, [idempotency]))
    assert [answer.status_code for answer in answers] == [500, 500]
    assert answers[0].text == "Internal Server Error"
    assert effects == ["run", "run"]


async def test_h9_cookies_keep_their_order(make_app: MakeApp, idempotency: Middleware) -> None:
    async def endpoint(request: Request) -> Response:
        response = JSONResponse({})
        for name in "cab":
            response.set_cookie(name, "1")
        return response

    first, second = await twice(make_app({"/": endpoint}, [idempotency]))
    assert second.headers.get_list("set-cookie") == first.headers.get_list("set-cookie")
    assert [cookie[0] for cookie in second.headers.get_list("set-cookie")] == ["c", "a", "b"]


class Wrapping(BaseHTTPMiddleware):
    """The middleware that many apps have."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-wrapped"] = "yes"
        return response


@pytest.mark.parametrize("outside", [True, False])
async def test_an_apps_own_middleware_works_on_either_side(
    make_app: MakeApp, idempotency: Middleware, outside: bool
) -> None:
    async def endpoint(request: Request) -> Response:
        assert await request.body() == b""
        return PlainTextResponse("done")

    stack = [Middleware(Wrapping), idempotency]
    first, second = await twice(make_app({"/": endpoint}, stack if outside else stack[::-1]))
    assert (first.text, second.text, replayed(second)) == ("done", "done", True)
    assert (first.headers["x-wrapped"], second.headers["x-wrapped"]) == ("yes", "yes")


@pytest.mark.parametrize("outside", [True, False])
async def test_h14_compression_works_on_either_side(make_app: MakeApp, idempotency: Middleware, outside: bool) -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("a" * 10_000)

    stack = [Middleware(GZipMiddleware), idempotency]
    app = make_app({"/": endpoint}, stack if outside else stack[::-1])
    async with client(app) as http:
        key = {"idempotency-key": new_key()}
        packed = [await http.post("/", headers={**key, "accept-encoding": "gzip"}) for _ in range(2)]
        plain = await http.post("/", headers={**key, "accept-encoding": "identity"})
    for answer in packed:
        assert (answer.text, answer.headers["content-encoding"]) == ("a" * 10_000, "gzip")
        assert answer.headers["vary"].lower() == "accept-encoding"
    assert (plain.text, plain.headers.get("content-encoding"), replayed(plain)) == ("a" * 10_000, None, True)


class Tokens(AuthenticationBackend):
    """Whoever says a name is its bearer."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        name = conn.headers.get("authorization")
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


async def test_h5_by_user_takes_the_user_of_the_authentication_outside(
    make_app: MakeApp, store_url: str, unique: str
) -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(request.user.display_name)

    layer = Middleware(IdempotencyMiddleware, store=store_url, scope=by_user, name=unique)
    app = make_app({"/": endpoint}, [Middleware(AuthenticationMiddleware, backend=Tokens()), layer])
    async with client(app) as http:
        answers = [
            await http.post("/", headers={"idempotency-key": "order-1", "authorization": name})
            for name in ("alice", "bob", "alice")
        ]
    assert [answer.text for answer in answers] == ["alice", "bob", "alice"]
    assert [replayed(answer) for answer in answers] == [False, False, True]


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@pytest.mark.parametrize("announced", [True, False], ids=["with its length", "without"])
async def test_h10_a_stream_that_base_http_middleware_ends_in_place_of_the_app(
    make_app: MakeApp, idempotency: Middleware, announced: bool
) -> None:
    """Inside the layer it ends a stream that fails, and raises then: only a Content-Length tells that it is none.

    docs/explain/endings.md says so.
    """
    effects: Effects = []

    async def endpoint(request: Request) -> Response:
        effects.append("charged")

        async def parts() -> AsyncIterator[bytes]:
            yield b"a" * 60
            raise ZeroDivisionError

        return StreamingResponse(parts(), headers={"content-length": "100"} if announced else None)

    first, second = await twice(make_app({"/": endpoint}, [idempotency, Middleware(Passing)]))
    assert (replayed(first), replayed(second)) == (False, not announced)
    assert second.status_code == (409 if announced else 200)
    assert effects == ["charged"]


async def test_apps_mounted_under_different_paths_do_not_meet(store_url: str, unique: str) -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(request.scope["root_path"])

    def part() -> Starlette:
        layer = Middleware(IdempotencyMiddleware, store="memory://mounted", scope=single_tenant)
        return Starlette(routes=[Route("/charges", endpoint, methods=["POST"])], middleware=[layer])

    app = Starlette(routes=[Mount("/one", part()), Mount("/two", part())])
    async with client(app) as http:
        key = {"idempotency-key": new_key()}
        answers = [await http.post(f"{path}/charges", headers=key) for path in ("/one", "/two", "/one")]
    assert [answer.text for answer in answers] == ["/one", "/two", "/one"]
    assert [replayed(answer) for answer in answers] == [False, False, True]


request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")


async def test_what_outer_middleware_put_into_the_context_is_seen_inside(
    make_app: MakeApp, idempotency: Middleware
) -> None:
    class Naming:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            request_id.set("42")
            await self.app(scope, receive, send)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(request_id.get())

    first, _ = await twice(make_app({"/": endpoint}, [Middleware(Naming), idempotency]))
    assert first.text == "42"


class Charge(BaseModel):
    amount: int


async def test_fastapi_validation_and_http_errors_are_stored_by_their_status(store_url: str, unique: str) -> None:
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=store_url, scope=single_tenant, name=unique)
    effects: Effects = []

    @app.post("/charges")
    def charge(charge: Charge) -> dict[str, int]:
        effects.append("run")
        raise HTTPException(charge.amount)

    async with client(app) as http:
        for body, status, runs, again in (
            ({"amount": "many"}, 422, 0, True),
            ({"amount": 404}, 404, 1, True),
            ({"amount": 503}, 503, 2, False),
        ):
            effects.clear()
            key = {"idempotency-key": new_key()}
            answers = [await http.post("/charges", json=body, headers=key) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [status, status]
            assert (replayed(answers[1]), len(effects)) == (again, runs)


events: Effects = []


async def session() -> AsyncIterator[str]:
    events.append("open")
    yield "session"
    events.append("close")


async def test_fastapi_dependencies_with_yield_are_left_as_without_the_layer(store_url: str, unique: str) -> None:
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=store_url, scope=single_tenant, name=unique)

    @app.post("/charges")
    def charge(opened: Annotated[str, Depends(session)]) -> None:
        events.append(opened)

    events.clear()
    first, second = await twice(app, "/charges")
    assert (first.status_code, second.status_code, replayed(second)) == (200, 200, True)
    assert events == ["open", "session", "close"]


class Payment(BaseModel):
    amount: int


@pytest.mark.parametrize(
    ("amount", "kept"),
    [("much", False), (1, True), (2, True)],
    ids=["validation", "its own answer", "its own exception"],
)
async def test_h8_stripe_keeps_what_the_handler_answered_and_not_what_was_refused_before_it(
    store_url: str, unique: str, amount: int | str, kept: bool
) -> None:
    layer = Middleware(
        IdempotencyMiddleware, store=store_url, scope=single_tenant, name=unique, store_when="stripe", required=True
    )
    app, effects = FastAPI(middleware=[layer]), []

    @app.post("/")
    async def pay(payment: Payment) -> None:
        effects.append(payment.amount)
        if payment.amount == 1:
            raise HTTPException(422, "its own")
        raise RequestValidationError([])

    async with client(app) as http:
        key = {"idempotency-key": new_key()}
        answers = [await http.post("/", headers=key, json={"amount": amount}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert [replayed(answer) for answer in answers] == [False, kept]
    assert effects == ([amount] if kept else [])


async def test_h8_stripe_does_not_keep_what_litestar_refused_before_the_handler(store_url: str, unique: str) -> None:
    @litestar.post("/", status_code=201)
    async def pay(amount: Annotated[int, QueryParameter()]) -> None:
        raise AssertionError("never")

    app = IdempotencyMiddleware(
        litestar.Litestar([pay], openapi_config=None),  # type: ignore[arg-type]  # Litestar's own types
        store=store_url,
        scope=single_tenant,
        name=unique,
        store_when="stripe",
    )
    async with client(app) as http:
        key = {"idempotency-key": new_key()}
        answers = [await http.post("/?amount=much", headers=key) for _ in range(2)]
    assert [(answer.status_code, replayed(answer)) for answer in answers] == [(400, False), (400, False)]
