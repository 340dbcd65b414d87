"""A handler that does not know whether it had its effect, where a framework answers its exception (C5)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, cast

import django  # type: ignore[import-untyped]  # Django has no types of its own
import pytest
from django.conf import settings  # type: ignore[import-untyped]  # Django has no types of its own
from django.core.asgi import get_asgi_application  # type: ignore[import-untyped]  # Django has no types of its own
from django.http import HttpRequest, HttpResponse  # type: ignore[import-untyped]  # Django has no types of its own
from django.test import override_settings  # type: ignore[import-untyped]  # Django has no types of its own
from django.urls import path as django_path  # type: ignore[import-untyped]  # Django has no types of its own
from fastapi import FastAPI, HTTPException
from litestar import Litestar, post
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from retryproof import Policy, current_operation, errors
from retryproof.core.record import State
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import App, AsgiScope, Receive, Send
from retryproof.stores.memory import MemoryStore
from tests.http.harness import Answer, new_key, start

UNKNOWN = errors.OutcomeUnknown("The bank hung up.")


class BankTimeout(Exception):
    """A read time-out of a payment."""


RAISED = [UNKNOWN, ExceptionGroup("tasks", [ValueError(), UNKNOWN]), BankTimeout("secret")]
IDS = ["raised", "in a group", "named by the policy"]


async def charge_once(app: App, **options: Any) -> tuple[Answer, list[State]]:
    """One request under a policy that refuses, and what the store has after it."""
    store, key = MemoryStore(), new_key()
    policy = Policy(on_abandoned="refuse", unknown_on=(BankTimeout,), release_on_cancel=True)
    layer = IdempotencyMiddleware(app, store=store, scope=single_tenant, policy=policy, **options)
    conversation = start(layer, key=key)
    conversation.give(b"{}")
    with contextlib.suppress(Exception):  # which Starlette raises again after its answer, for the server's log
        await conversation.end()
    return conversation.answer, [record.state for record in store.scan(limit=10)]


@pytest.mark.parametrize("error", RAISED, ids=IDS)
async def test_c5_what_reaches_the_layer_keeps_the_record(error: Exception) -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        raise error

    answer, states = await charge_once(app, store_when="stripe")
    assert (answer.status, answer.code, states) == (409, "outcome-unknown", [State.IN_PROGRESS])
    assert b"secret" not in answer.body


@pytest.mark.parametrize("error", RAISED, ids=IDS)
@pytest.mark.parametrize("framework", ["starlette", "starlette by type", "fastapi", "fastapi by type"])
@pytest.mark.parametrize("preset", ["default", "stripe"])
async def test_c5_what_an_exception_handler_of_starlette_answers_keeps_the_record(
    framework: str, error: Exception, preset: str
) -> None:
    async def charge(request: Request) -> Response:
        raise error

    async def answer_it(request: Request, raised: Exception) -> Response:
        return PlainTextResponse("sorry", 500)

    handlers: dict[Any, Any] = {type(error) if "type" in framework else Exception: answer_it}
    app: Any
    if framework.startswith("starlette"):
        app = Starlette(routes=[Route("/charges", charge, methods=["POST"])], exception_handlers=handlers)
    else:
        app = FastAPI(exception_handlers=handlers)
        app.post("/charges")(charge)
    answer, states = await charge_once(app, store_when=preset)
    assert (answer.status, states) == (500, [State.IN_PROGRESS])


@pytest.mark.parametrize("error", RAISED, ids=IDS)
@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize("answered", [True, False])
async def test_c5_what_a_stream_raises_keeps_the_record_whatever_starlette_makes_of_it(
    error: Exception, parts: int, answered: bool
) -> None:
    """Starlette cannot answer it any more, and raises a RuntimeError where it has a handler for it."""

    async def charge(request: Request) -> Response:
        async def produce() -> AsyncIterator[bytes]:
            for _ in range(parts):
                yield b"part"
            raise error

        return StreamingResponse(produce())

    async def answer_it(request: Request, raised: Exception) -> Response:
        return PlainTextResponse("sorry", 500)

    handlers: dict[Any, Any] = {type(error): answer_it} if answered else {}
    app = Starlette(routes=[Route("/charges", charge, methods=["POST"])], exception_handlers=handlers)
    answer, states = await charge_once(app)
    assert (answer.status, answer.complete, states) == (200 if parts else 409, not parts, [State.IN_PROGRESS])


async def test_c5_a_stream_that_fails_otherwise_gives_the_operation_back() -> None:
    async def charge(request: Request) -> Response:
        async def produce() -> AsyncIterator[bytes]:
            yield b"part"
            raise LookupError

        return StreamingResponse(produce())

    async def answer_it(request: Request, raised: Exception) -> Response:
        return PlainTextResponse("sorry", 500)

    app = Starlette(routes=[Route("/charges", charge, methods=["POST"])], exception_handlers={LookupError: answer_it})
    _, states = await charge_once(app)
    assert states == [State.RELEASED]


@pytest.mark.parametrize("error", RAISED, ids=IDS)
async def test_c5_what_litestar_answers_keeps_the_record(error: Exception) -> None:
    @post("/charges")
    async def charge() -> None:
        raise error

    answer, states = await charge_once(cast(App, Litestar([charge], openapi_config=None)))
    assert (answer.status, states) == (500, [State.IN_PROGRESS])


def _django(view: Callable[[HttpRequest], Any]) -> App:
    if not settings.configured:
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup(set_prefix=False)

    class Urls:
        urlpatterns: ClassVar[list[Any]] = [django_path("charges", view)]

    app: Any = get_asgi_application()

    async def with_urls(scope: AsgiScope, receive: Receive, send: Send) -> None:
        with override_settings(ROOT_URLCONF=Urls, ALLOWED_HOSTS=["*"], MIDDLEWARE=[]):
            await app(scope, receive, send)

    return with_urls


@pytest.mark.parametrize("error", RAISED, ids=IDS)
@pytest.mark.parametrize("colour", ["sync", "async"])
async def test_c5_what_django_answers_keeps_the_record(error: Exception, colour: str) -> None:
    def charge(request: HttpRequest) -> HttpResponse:
        raise error

    async def acharge(request: HttpRequest) -> HttpResponse:
        raise error

    answer, states = await charge_once(_django(charge if colour == "sync" else acharge), store_when="stripe")
    assert (answer.status, states) == (500, [State.IN_PROGRESS])


async def test_c5_django_gives_back_what_any_other_exception_ends() -> None:
    def charge(request: HttpRequest) -> HttpResponse:
        raise ValueError("a fault")

    answer, states = await charge_once(_django(charge))
    assert (answer.status, states) == (500, [State.RELEASED])


@pytest.mark.parametrize(("status", "told"), [(500, 500), (402, 402), (201, 409)])
async def test_c5_a_response_after_the_handler_said_so_is_neither_stored_nor_released(status: int, told: int) -> None:
    """Nor does anybody see a success that is not stored (I5)."""

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        current_operation().outcome_unknown()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    answer, states = await charge_once(app, store_when="stripe")
    assert (answer.status, states) == (told, [State.IN_PROGRESS])


@pytest.mark.parametrize(("known", "state"), [(False, State.IN_PROGRESS), (True, State.RELEASED)])
async def test_c5_an_answer_that_is_raised_from_what_is_unknown_keeps_the_record(known: bool, state: State) -> None:
    """As handlers and dependencies wrap exceptions; `from None` says that the handler has found out."""

    async def endpoint() -> None:
        try:
            raise BankTimeout
        except BankTimeout as error:
            raise HTTPException(502) from (None if known else error)

    app = FastAPI()
    app.post("/charges")(endpoint)
    answer, states = await charge_once(app)
    assert (answer.status, states) == (502, [state])


async def test_c5_an_exception_that_comes_after_the_head_is_not_what_the_response_answers() -> None:
    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            raise UNKNOWN
        except errors.OutcomeUnknown:
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    answer, states = await charge_once(app)
    assert (answer.status, answer.body, states) == (200, b"ab", [State.COMPLETED])
