"""What is WSGI's own: environ, `start_response`, `write`, iterables and their `close` (PEP 3333). The rules that it has
in common with ASGI are tested with those, over both (H16).
"""

from __future__ import annotations

import http.client
import io
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment
from wsgiref.validate import validator

import pytest

from retryproof.core.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from retryproof.core.policy import Policy
from retryproof.core.record import State
from retryproof.http import by_header, by_user, single_tenant
from retryproof.http.wsgi import IdempotencyMiddleware
from retryproof.operation import current_operation
from retryproof.stores.memory import MemoryStore
from tests.http.harness import Events, new_key

Pairs = list[tuple[str, str]]
REFUSE = Policy(lease=0.1, max_run=0.1, on_abandoned="refuse")


class Served:
    """One request and its answer, as a server that the test leads."""

    def __init__(self, app: WSGIApplication, key: str | None = None, body: bytes = b"{}", **environ: Any) -> None:
        self.heads: list[tuple[str, Pairs]] = []
        self.written: list[bytes] = []
        self.environ: WSGIEnvironment = {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/charges",
            "QUERY_STRING": "",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            **({} if key is None else {"HTTP_IDEMPOTENCY_KEY": key}),
            **environ,
        }
        self.given: Any = app(self.environ, self.start_response)

    def start_response(self, status: str, headers: Pairs, exc_info: Any = None, /) -> Callable[[bytes], object]:
        assert not self.heads
        self.heads.append((status, headers))
        return self.written.append

    def whole(self) -> Served:
        """All of it, and its end."""
        try:
            self.written.extend(self.given)
        finally:
            self.close()
        return self

    def close(self) -> None:
        if hasattr(self.given, "close"):
            self.given.close()

    @property
    def status(self) -> int:
        return int(self.heads[0][0][:3]) if self.heads else 0

    @property
    def body(self) -> bytes:
        return b"".join(self.written)

    def value(self, name: str) -> str | None:
        """The value of a header."""
        return next((value for found, value in self.heads[0][1] if found.lower() == name), None)

    @property
    def replayed(self) -> bool:
        return self.value("idempotency-replayed") == "true"


def call(app: WSGIApplication, key: str | None, body: bytes = b"{}", **environ: Any) -> Served:
    return Served(app, key, body, **environ).whole()


def layered(app: WSGIApplication, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, **{"store": MemoryStore(), "scope": single_tenant, **options})


class Streaming:
    """An app that sends these parts as a generator; an exception among them is raised."""

    def __init__(self, *parts: bytes | Exception, headers: Pairs | None = None, status: str = "201 Created") -> None:
        self.parts, self.headers, self.status = parts, headers or [], status
        self.runs = self.produced = 0
        self.closed = self.ended = False
        self.operations: list[str | None] = []

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.runs += 1
        self.see()
        start_response(self.status, self.headers)
        return self.produce()

    def produce(self) -> Iterator[bytes]:
        try:
            for part in self.parts:
                self.see()
                if isinstance(part, Exception):
                    raise part
                self.produced += 1
                yield part
            self.ended = True
        finally:
            self.see()
            self.closed = True

    def see(self) -> None:
        operation: Any = current_operation(default=None)
        self.operations.append(None if operation is None else operation.key_digest)


def endless() -> tuple[WSGIApplication, list[str]]:
    said: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            while True:
                yield b"x"
        finally:
            said.append("closed")

    return app, said


def settled(app: WSGIApplication, key: str, body: bytes = b"{}") -> str:
    """The answer to a retry after the lease of an unknown attempt is over."""
    while True:
        answer = call(app, key, body)
        if b"in-progress" not in answer.body:
            return answer.body.decode()


# What is not covered


@pytest.mark.parametrize("change", [{"REQUEST_METHOD": "GET"}, {"HTTP_IDEMPOTENCY_KEY": None}], ids=["GET", "no key"])
def test_h1_what_is_not_covered_passes_as_it_is(change: dict[str, Any]) -> None:
    seen: list[Any] = []
    answer: list[bytes] = [b"a"]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.extend((environ, start_response, environ["wsgi.input"]))
        return answer

    key = None if "HTTP_IDEMPOTENCY_KEY" in change else new_key()
    source = io.BytesIO(b"{}")
    served = Served(layered(app), key, **({"wsgi.input": source} | ({} if key is None else change)))
    assert (seen[0] is served.environ, seen[2] is source, served.given is answer) == (True, True, True)
    assert "wsgi.input_terminated" not in served.environ


# Responses


def test_h10_parts_flow_as_they_are_produced_and_the_end_is_held_until_it_is_stored() -> None:
    app, key = Streaming(b"a", b"b", b"c"), new_key()
    covered = layered(app)
    served = Served(covered, key)
    flowing = iter(served.given)
    for number, part in enumerate((b"a", b"b", b"c"), 1):
        assert next(flowing) == part
        assert (app.produced, app.ended) == (number, False)
    assert b"in-progress" in call(covered, key).body
    assert next(flowing, None) is None
    assert call(covered, key).replayed  # stored before the server sees the end
    served.close()
    replay = call(covered, key)
    assert (replay.status, replay.body, app.runs) == (201, b"abc", 1)


@pytest.mark.parametrize("parts", [(b"abc",), (b"ab", b"c")], ids=["one", "two"])
def test_h10_the_last_part_of_an_announced_length_is_held_until_it_is_stored(parts: tuple[bytes, ...]) -> None:
    app, key = Streaming(*parts, headers=[("Content-Length", "3")]), new_key()
    covered = layered(app)
    served = Served(covered, key)
    came: list[bytes] = []
    stored = []
    for data in served.given:
        came.append(data)
        stored.append(call(covered, key).replayed)
    served.close()
    assert b"".join(came) == b"abc"
    assert stored[-1] is True
    assert len(served.heads) == 1


@pytest.mark.parametrize("parts", [(b"ab",), (b"ab", b"cd")], ids=["short", "long"])
def test_h10_a_response_that_is_not_as_long_as_it_says_is_cut_and_unknown(parts: tuple[bytes, ...]) -> None:
    app, key = Streaming(*parts, headers=[("Content-Length", "3")]), new_key()
    covered = layered(app, policy=REFUSE)
    with pytest.raises(OutcomeUnknown, match="cut"):
        call(covered, key)
    assert "outcome-unknown" in settled(covered, key)
    assert app.runs == 1


def test_h8_a_generator_that_raises_in_the_middle_is_cut_and_given_back() -> None:
    app, key = Streaming(b"a", ZeroDivisionError("no")), new_key()
    covered = layered(app)
    for _ in range(2):
        served = Served(covered, key)
        flowing = iter(served.given)
        assert next(flowing) == b"a"
        with pytest.raises(ZeroDivisionError):
            next(flowing)
        served.close()
    assert app.runs == 2


def test_what_the_server_sees_of_a_whole_response_is_a_list_with_its_reason() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        start_response("201 Made", [("X-One", "é")])
        return [b"a"]

    covered, key = layered(app), new_key()
    first, again = Served(covered, key), Served(covered, key)
    assert (first.given, first.heads) == ([b"a"], [("201 Made", [("X-One", "é")])])
    assert (again.given, again.heads[0][0], again.value("x-one")) == ([b"a"], "201 Created", "é")


def test_an_app_may_put_an_error_in_the_place_of_a_head_that_has_not_gone() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "1")])
        try:
            raise ValueError("a fault")
        except ValueError as error:
            start_response("500 Oh", [], (ValueError, error, error.__traceback__))  # type: ignore[arg-type]  # may be
        yield b"failed"

    store = MemoryStore()
    served = call(layered(app, store=store), new_key())
    assert (served.heads, served.body) == ([("500 Oh", [])], b"failed")
    assert [record.state for record in store.scan()] == [State.RELEASED]


@pytest.mark.parametrize("sent", [False, True])
def test_an_app_may_not_begin_another_response_without_cause_or_too_late(sent: bool) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        if sent:
            yield b"a"
        error = KeyError("late")
        start_response("500 Oh", [], (KeyError, error, None) if sent else None)  # type: ignore[arg-type]  # may be
        yield b"b"

    with pytest.raises(KeyError if sent else AssertionError):
        call(layered(app), new_key())


def test_what_is_written_flows_and_counts_as_a_part() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        write = start_response("200 OK", [])
        write(b"a")
        assert served_written() == [b"a"]
        write(b"b")
        return [b"c"]

    now: list[Served] = []

    def served_written() -> list[bytes]:
        return now[0].written

    class Watched(Served):
        def start_response(self, *arguments: Any) -> Callable[[bytes], object]:
            now.append(self)
            return super().start_response(*arguments)

    covered, key = layered(app), new_key()
    assert Watched(covered, key).whole().body == b"abc"
    assert call(covered, key).body == b"abc"


def test_an_app_that_sends_before_it_begins_has_raised() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return [b"a"]

    store = MemoryStore()
    with pytest.raises(AssertionError, match="start_response"):
        call(layered(app, store=store), new_key())
    assert [record.state for record in store.scan()] == [State.RELEASED]


def test_h10_an_app_that_answers_nothing_leaves_its_outcome_unknown() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return []

    covered, key = layered(app, policy=REFUSE), new_key()
    assert call(covered, key).heads == []
    assert "outcome-unknown" in settled(covered, key)


def test_the_operation_is_the_current_one_in_each_step_and_nowhere_else() -> None:
    app = Streaming(b"a", b"b")
    served = Served(layered(app), new_key())
    seen_outside = []
    for _ in served.given:
        seen_outside.append(current_operation(default=None))
    served.close()
    assert len(set(app.operations)) == 1
    assert None not in app.operations
    assert seen_outside == [None, None]


def test_work_at_close_goes_on_after_it_was_stored() -> None:
    class Closing(list[bytes]):
        stored = False

        def close(self) -> None:
            Closing.stored = call(covered, key).replayed

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Closing:
        start_response("200 OK", [])
        return Closing([b"a"])

    covered, key = layered(app), new_key()
    served = Served(covered, key)
    assert not Closing.stored
    served.whole()
    assert (Closing.stored, served.body) == (True, b"a")


# The client


def test_h11_a_server_that_closes_early_has_no_client_and_the_rest_is_produced_and_stored() -> None:
    app, key = Streaming(b"a", b"b", b"c"), new_key()
    covered = layered(app)
    served = Served(covered, key)
    next(iter(served.given))
    served.close()
    assert (app.produced, app.ended, app.closed) == (3, True, True)
    assert (call(covered, key).body, app.runs) == (b"abc", 1)


def test_h11_a_handler_that_raises_has_raised_whoever_left() -> None:
    app, key = Streaming(b"a", ZeroDivisionError()), new_key()
    covered = layered(app)
    for _ in range(2):
        served = Served(covered, key)
        next(iter(served.given))
        with pytest.raises(ZeroDivisionError):
            served.close()
    assert app.runs == 2


@pytest.mark.parametrize(
    "choice",
    ["stop", lambda request: "stop", lambda status, headers: "stop" if status == 200 else "finish"],
    ids=["value", "request", "head"],
)
def test_h11_a_stream_that_is_to_stop_is_closed_and_its_outcome_is_unknown(choice: Any) -> None:
    app, said = endless()
    covered, key = layered(app, on_departure=choice, policy=REFUSE), new_key()
    served = Served(covered, key)
    next(iter(served.given))
    served.close()
    assert said == ["closed"]
    assert "outcome-unknown" in settled(covered, key)


def test_h11_an_endless_stream_without_a_client_is_stopped_at_max_run() -> None:
    app, said = endless()
    covered, key = layered(app, policy=REFUSE), new_key()
    served = Served(covered, key)
    next(iter(served.given))
    served.close()
    assert said == ["closed"]
    assert "outcome-unknown" in settled(covered, key)


def test_h11_over_the_limit_the_run_that_was_left_first_is_stopped() -> None:
    app, said = endless()
    covered = layered(app, max_departed=0)
    served = Served(covered, new_key())
    next(iter(served.given))
    served.close()
    assert said == ["closed"]
    assert len(covered._engine.departed) == 0


def test_nothing_is_watched_once_the_server_is_done() -> None:
    store = MemoryStore()
    covered = layered(Streaming(b"a", b"b"), store=store)
    for body in (b"1", b"2"):
        call(covered, new_key(), body)
    assert covered._engine.opened().background.idle


# Requests


def test_h7_a_body_that_is_cut_claims_and_runs_nothing() -> None:
    app, events, key = Streaming(b"a"), Events(), new_key()
    covered = layered(app, events=(events,))
    cut = call(covered, key, b"{", CONTENT_LENGTH="2")
    assert (cut.status, b"body-length-mismatch" in cut.body, app.runs, events) == (400, True, 0, [])
    assert call(covered, key, b"another").status == 201


def test_a_body_without_a_length_is_read_to_its_end_where_the_server_ends_it() -> None:
    bodies = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        bodies.append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        start_response("200 OK", [])
        return [b""]

    covered = layered(app)
    big = b"x" * 3_000_000
    for body in (b"abc", big):
        call(covered, new_key(), body, CONTENT_LENGTH="", **{"wsgi.input_terminated": True})
    assert bodies == [b"abc", big]
    chunked: dict[str, Any] = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    assert call(covered, new_key(), b"abc", **chunked).status == 400  # two bodies would look like one request
    assert call(covered, new_key(), b"", CONTENT_LENGTH="").status == 200
    assert len(bodies) == 3


def test_h5_a_path_is_one_however_the_server_says_it() -> None:
    app, key = Streaming(b"a"), new_key()
    covered = layered(app)
    call(covered, key, PATH_INFO="/a b/é".encode().decode("latin-1"))
    spellings: list[dict[str, Any]] = [
        {"RAW_URI": "/a%20b/%C3%A9?"},
        {"REQUEST_URI": "/a%20b/%C3%A9"},
        {"REQUEST_URI": "http://host/a%20b/%C3%A9"},
        {"SCRIPT_NAME": "/a b", "PATH_INFO": "/é".encode().decode("latin-1")},
    ]
    for raw in spellings:
        assert call(covered, key, **raw).replayed
    assert not call(covered, key, RAW_URI="/a%2Fb/%C3%A9").replayed


def test_h5_scopes_read_an_environ() -> None:
    app, key = Streaming(b"a"), new_key()
    covered = layered(app, scope=by_user)
    assert call(covered, key, REMOTE_USER="alice").status == 201
    assert not call(covered, key, REMOTE_USER="bob").replayed
    assert call(covered, key, REMOTE_USER="alice").replayed
    for nobody in (None, ""):
        with pytest.raises(ConfigurationError, match="by_user"):
            call(covered, key, REMOTE_USER=nobody)
    covered = layered(app, scope=by_header("x-api-key"))
    call(covered, key, HTTP_X_API_KEY="alice")
    assert not call(covered, key, HTTP_X_API_KEY="bob").replayed
    covered = layered(app, scope=lambda request: request["HTTP_X_API_KEY"] + request["method"])
    assert call(covered, key, HTTP_X_API_KEY="alice").status == 201


def test_h14_a_file_goes_through_the_layer_and_is_kept() -> None:
    """Servers look up the name after the call, and send what is an instance of their own past everybody."""

    class Own:
        def __init__(self, *_: object) -> None:
            raise AssertionError("The server's own wrapper was used.")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(b"x" * 10_000))
        return wrapped

    covered, key, offered = layered(app), new_key(), dict[str, Any]({"wsgi.file_wrapper": Own})
    first, again = call(covered, key, **offered), call(covered, key, **offered)
    assert first.body == again.body == b"x" * 10_000
    assert "wsgi.file_wrapper" in first.environ
    assert not isinstance(first.given, first.environ["wsgi.file_wrapper"])
    with pytest.raises(AssertionError, match="own wrapper"):
        call(covered, None, **offered)


def test_an_async_authorize_is_refused() -> None:
    async def later(request: Any) -> bool:
        return True

    with pytest.raises(ConfigurationError, match="authorize"):
        layered(Streaming(), authorize=later)


# The store


class Leaving(MemoryStore):
    """A store that fails where the test says so."""

    fails: str = ""

    def claim(self, claims: Any) -> Any:
        return self._unless("claim", super().claim, claims)

    def complete(self, commands: Any) -> Any:
        return self._unless("complete", super().complete, commands)

    def _unless(self, what: str, perform: Callable[[Any], Any], commands: Any) -> Any:
        if self.fails == what:
            raise StoreUnavailable("out of reach")
        return perform(commands)


def test_c10_a_store_that_is_down_refuses_or_lets_run_and_says_so() -> None:
    store, app, events = Leaving(), Streaming(b"a"), Events()
    store.fails = "claim"
    covered = layered(app, store=store, events=(events,), fail_open=lambda request: request["path"] == "/notes")
    refused = call(covered, new_key())
    assert (refused.status, refused.value("retry-after"), app.runs) == (503, "1", 0)
    ran = call(covered, new_key(), PATH_INFO="/notes")
    assert (ran.status, ran.value("idempotency-unprotected"), app.runs) == (201, "store-unavailable", 1)
    assert events.kinds == ["store_error", "unprotected"]


def test_c10_after_the_effect_the_caller_gets_the_real_result() -> None:
    store, app, events, key = Leaving(), Streaming(b"a"), Events(), new_key()
    store.fails = "complete"
    covered = layered(app, store=store, events=(events,), policy=Policy(complete_timeout=0.05))
    assert call(covered, key).body == b"a"
    assert "unstored" in events.kinds
    store.fails = ""
    while not call(covered, key).replayed:
        pass
    assert app.runs == 1


# The caller's own transaction


@pytest.mark.parametrize(("status", "kept"), [("201 Created", True), ("503 No", False)])
def test_t1_work_and_response_commit_together(tmp_path: Path, status: str, kept: bool) -> None:
    path = tmp_path / "shop.db"
    database = sqlite3.connect(path, check_same_thread=False)
    database.execute("CREATE TABLE charges (n)")
    database.commit()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        database.execute("BEGIN IMMEDIATE")
        connection = current_operation().transaction(database)
        connection.execute("INSERT INTO charges VALUES (1)")
        start_response(status, [])
        return [b"a"]

    covered, key = layered(app, store=f"sqlite:///{path}"), new_key()
    try:
        call(covered, key)
        assert call(covered, key).replayed is kept
        assert database.execute("SELECT count(*) FROM charges").fetchone() == (1 if kept else 0,)
    finally:
        database.close()
        covered.close()


# Servers


def test_it_keeps_to_pep_3333_on_both_sides() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        environ["wsgi.input"].read(2)
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"a"
        yield b"b"

    covered = validator(layered(validator(app)))

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with make_server("127.0.0.1", 0, covered, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        key = new_key()
        replays = []
        for _ in range(2):
            client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            client.request("POST", "/charges?a=1", b"{}", {"Idempotency-Key": key, "Content-Type": "text/plain"})
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"ab")
            replays.append(answer.headers["idempotency-replayed"])
            client.close()
        server.shutdown()
        thread.join()
    assert replays == [None, "true"]
