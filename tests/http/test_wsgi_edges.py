"""WSGI servers and layers that leave, raise or forget: no effect is doubled, and nothing is kept for good."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import pytest

from retryproof.core.policy import Policy
from retryproof.http import body as bodies
from retryproof.http import by_header, single_tenant
from retryproof.http.wsgi import IdempotencyMiddleware
from retryproof.operation import current_operation
from tests.http.harness import new_key

Answer = tuple[int, bytes]


class Counted:
    """An app that counts its effects; `work` makes the rest of it."""

    def __init__(self, work: Callable[[WSGIEnvironment, StartResponse], Any]) -> None:
        self.effects = 0
        self._work = work

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.effects += 1
        given: Iterable[bytes] = self._work(environ, start_response)
        return given


def layer(app: WSGIApplication, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, **{"store": "memory://", "scope": single_tenant, **options})


def ask(
    app: WSGIApplication,
    key: str | None,
    *,
    body: bytes = b"{}",
    write: Callable[[bytes], object] | None = None,
    refuses_head: bool = False,
    closes: bool = True,
    **environ: Any,
) -> Answer:
    """One request, by a server whose `write` and `start_response` may fail."""
    heads: list[str] = []
    out: list[bytes] = []

    def start_response(status: str, headers: Any, exc_info: Any = None, /) -> Callable[[bytes], object]:
        if refuses_head:
            raise ValueError("the server takes no such header")
        heads.append(status)
        return write or out.append

    given = app(
        {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/charges",
            "QUERY_STRING": "",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            **({} if key is None else {"HTTP_IDEMPOTENCY_KEY": key}),
            **environ,
        },
        start_response,
    )
    try:
        out.extend(given)
    finally:
        if closes and hasattr(given, "close"):
            given.close()
    return int(heads[-1][:3]), b"".join(out)


def left(data: bytes) -> None:
    raise BrokenPipeError("the client has left")


def writes(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])(b"part")
    return [b"end"]


def test_h11_a_client_that_leaves_during_write_stops_nothing() -> None:
    """What the server raises is no failure of the app's: the response is kept, and a retry gets it."""
    app, key = Counted(writes), new_key()
    covered = layer(app)
    with pytest.raises(BrokenPipeError):
        ask(covered, key, write=left)
    assert ask(covered, key) == (200, b"partend")
    assert app.effects == 1


def test_h11_by_choice_a_client_that_leaves_during_write_stops_the_app() -> None:
    app, key = Counted(writes), new_key()
    covered = layer(app, on_departure="stop", policy=Policy(on_abandoned="refuse", lease=0.05))
    with pytest.raises(BrokenPipeError):
        ask(covered, key, write=left)
    assert ask(covered, key)[0] == 409
    assert app.effects == 1


def streams(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b"a"
    yield b"b"


def test_h11_a_server_that_refuses_the_head_of_a_stream_does_not_give_the_operation_back() -> None:
    app, key = Counted(streams), new_key()
    covered = layer(app)
    with pytest.raises(ValueError, match="no such header"):
        ask(covered, key, refuses_head=True)
    assert ask(covered, key) == (200, b"ab")
    assert app.effects == 1


def test_h11_an_app_that_returns_nothing_has_an_unknown_outcome() -> None:
    def forgets(environ: WSGIEnvironment, start_response: StartResponse) -> None:
        start_response("200 OK", [])

    app, key = Counted(forgets), new_key()
    covered = layer(app, policy=Policy(on_abandoned="refuse", lease=0.05))
    with pytest.raises(Exception, match="stopped before its end"):
        ask(covered, key)
    assert ask(covered, key)[0] == 409
    assert app.effects == 1


def test_the_operation_is_current_where_what_the_app_returned_is_begun() -> None:
    class Lazy:
        def __iter__(self) -> Iterator[bytes]:
            return iter([str(current_operation().attempt).encode()])

    def lazily(environ: WSGIEnvironment, start_response: StartResponse) -> Lazy:
        start_response("200 OK", [("Content-Length", "1")])
        return Lazy()

    assert ask(layer(Counted(lazily)), new_key()) == (200, b"1")


def echoes(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("200 OK", [])
    return [environ["wsgi.input"].read()]


def test_h5_a_header_with_an_underscore_is_found() -> None:
    """An environ has one name for both spellings."""
    app = Counted(echoes)
    covered = layer(app, key="X_Request_Key", scope=by_header("x_api_key"))
    key = new_key()
    for caller in ("alice", "alice", "bob"):
        assert ask(covered, None, HTTP_X_REQUEST_KEY=key, HTTP_X_API_KEY=caller)[0] == 200
    assert app.effects == 2


@pytest.mark.parametrize(
    "odd",
    [{"HTTP_X_NAME": "Łukasz"}, {"REQUEST_URI": "http://[x/charges"}, {"QUERY_STRING": "a=Ł"}],
    ids=["header", "target", "query"],
)
def test_h1_odd_text_in_an_environ_fails_nobody(odd: dict[str, Any]) -> None:
    app = layer(Counted(echoes))
    assert ask(app, None, **odd) == (200, b"{}")
    assert ask(app, new_key(), **odd) == (200, b"{}")


def test_a_client_cannot_shorten_its_body_by_a_header_of_another_spelling() -> None:
    chunked: dict[str, Any] = {
        "HTTP_CONTENT_LENGTH": "5",
        "HTTP_TRANSFER_ENCODING": "chunked",
        "wsgi.input_terminated": True,
    }
    assert ask(layer(Counted(echoes)), new_key(), body=b"pay 1000", CONTENT_LENGTH="", **chunked) == (200, b"pay 1000")


def test_h7_bodies_of_runs_that_nobody_closes_do_not_count_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = bodies.Budget(4 * 2**20)
    monkeypatch.setattr("retryproof.http.admission.BUDGET", budget)
    app = layer(Counted(streams))
    for _ in range(10):
        assert ask(app, new_key(), body=b"x" * 2**20, closes=False)[0] == 200
        gc.collect()
