"""The WSGI layer under a real server of several processes and threads, and around a real framework."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import django  # type: ignore[import-untyped]  # Django has no types of its own
import pytest
from django.conf import settings  # type: ignore[import-untyped]  # Django has no types of its own
from django.core.wsgi import get_wsgi_application  # type: ignore[import-untyped]  # Django has no types of its own
from django.http import (  # type: ignore[import-untyped]  # Django has no types of its own
    HttpRequest,
    HttpResponse,
    StreamingHttpResponse,
)
from django.test import override_settings  # type: ignore[import-untyped]  # Django has no types of its own
from django.urls import path as django_path  # type: ignore[import-untyped]  # Django has no types of its own

from retryproof.core.errors import OutcomeUnknown
from retryproof.core.record import State
from retryproof.http import single_tenant
from retryproof.http.wsgi import IdempotencyMiddleware
from retryproof.stores.memory import MemoryStore
from tests.http.harness import new_key
from tests.http.servers import SECONDS, ended_cleanly, exchange, request_bytes, split

APP = """
from retryproof.http import single_tenant
from retryproof.http.wsgi import IdempotencyMiddleware

effects = 0


def app(environ, start_response):
    global effects
    effects += 1
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("201 Created", [("X-Effects", str(effects))])
    if environ["PATH_INFO"] == "/stream":
        return stream()
    return [body]


def stream():
    yield b"one "
    yield b"two"




application = IdempotencyMiddleware(app, store="sqlite:///keys.db", scope=single_tenant)
"""


@pytest.fixture(scope="module")
def gunicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a gunicorn of two processes with two threads each."""
    folder: Path = tmp_path_factory.mktemp("gunicorn")
    (folder / "served.py").write_text(APP)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "gunicorn", "served:application", "-k", "gthread", "-w", "2", "--threads", "2"]
        bound = ["-b", f"fd://{listener.fileno()}", "--log-level", "critical", "--no-control-socket"]
        server = subprocess.Popen([*command, *bound], cwd=folder, pass_fds=[listener.fileno()])
        try:
            port: int = listener.getsockname()[1]
            until = time.monotonic() + SECONDS
            while not exchange(port, b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"):
                assert time.monotonic() < until
            yield port
        finally:
            server.terminate()
            server.wait(SECONDS)


def test_h16_gunicorn_gives_the_layer_what_it_needs(gunicorn: int) -> None:
    key, chunked = new_key(), ("transfer-encoding: chunked",)
    asked = request_bytes("/a%20b?c=1", key=key, body=b"5\r\nhello\r\n0\r\n\r\n", headers=chunked)
    answers = [split(exchange(gunicorn, asked)) for _ in range(6)]
    assert {(status, body) for status, _, body in answers} == {(201, b"hello")}
    assert [headers.get(b"idempotency-replayed") for _, headers, _ in answers] == [None, *[[b"true"]] * 5]
    assert len({headers[b"x-effects"][0] for _, headers, _ in answers}) == 1


def test_h10_a_stream_of_gunicorn_ends_cleanly_and_is_replayed(gunicorn: int) -> None:
    asked = request_bytes("/stream", key=new_key())
    first, again = exchange(gunicorn, asked), exchange(gunicorn, asked)
    assert ended_cleanly(first)
    assert (split(first)[2], split(again)[2]) == (b"one two", b"one two")


def _django(view: Any, store: MemoryStore) -> Any:
    if not settings.configured:
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup(set_prefix=False)

    class Urls:
        urlpatterns: ClassVar[list[Any]] = [django_path("charges", view)]

    covered = IdempotencyMiddleware(get_wsgi_application(), store=store, scope=single_tenant)

    def post(key: str) -> tuple[str, bytes]:
        heads: list[str] = []
        environ = {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/charges",
            "QUERY_STRING": "",
            "SERVER_NAME": "test",
            "SERVER_PORT": "80",
            "CONTENT_LENGTH": "",
            "HTTP_IDEMPOTENCY_KEY": key,
            "wsgi.input": None,
            "wsgi.url_scheme": "http",
        }
        start: Any = lambda status, headers, *_: heads.append(status)  # noqa: E731  # as a server's
        with override_settings(ROOT_URLCONF=Urls, ALLOWED_HOSTS=["*"], MIDDLEWARE=[]):
            given: Any = covered(environ, start)
            body = b"".join(given)
            if hasattr(given, "close"):
                given.close()
        return heads[0], body

    return post


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_h7_a_django_view_runs_once(streams: bool) -> None:
    runs: list[HttpRequest] = []

    def charge(request: HttpRequest) -> Any:
        runs.append(request)
        return StreamingHttpResponse([b"a", b"b"]) if streams else HttpResponse(b"ab", status=201)

    post, key = _django(charge, MemoryStore()), new_key()
    assert post(key) == post(key)
    assert len(runs) == 1


@pytest.mark.parametrize(("error", "state"), [(OutcomeUnknown("?"), State.IN_PROGRESS), (ValueError(), State.RELEASED)])
def test_c5_what_django_answers_says_what_the_view_raised(error: Exception, state: State) -> None:
    def charge(request: HttpRequest) -> HttpResponse:
        raise error

    store = MemoryStore()
    assert _django(charge, store)(new_key())[0].startswith("500 ")
    assert [record.state for record in store.scan()] == [state]
