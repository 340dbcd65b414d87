"""One covered request under WSGI: admitted, claimed, run; or told why not, or replayed (H7).

This performs what the pure modules decide: `admission` whether it may claim, `answers` what a conclusion is as a
response. The app's run is `wsgi_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment
from wsgiref.util import FileWrapper

from retryproof.attempt import BlockingAttempt
from retryproof.conclusions import is_outage
from retryproof.core.errors import IdempotencyError
from retryproof.core.flow import Conclusion, Down
from retryproof.core.policy import Policy
from retryproof.drive import clock
from retryproof.http.admission import COVERED, Admission, NotAdmitted, NotCovered
from retryproof.http.answers import UNPROTECTED, refusal
from retryproof.http.body import CHUNK, Body, deadline
from retryproof.http.environ import body_file
from retryproof.http.problem import BODY_MISMATCH, Problem
from retryproof.http.request import HttpRequest
from retryproof.http.wsgi_run import ExcInfo, WsgiEngine, WsgiRun, answer_to, say
from retryproof.observe.events import Event, Kind


def respond(
    engine: WsgiEngine, environ: WSGIEnvironment, start_response: StartResponse, request: HttpRequest, policy: Policy
) -> Iterable[bytes]:
    """Run the operation, replay it, or say why not."""
    admission = Admission(engine.options, request, policy)
    keeps_body = False
    try:
        refused = _admit(engine, admission, environ)
        if isinstance(refused, Problem):
            return say(refusal(refused, engine.options), start_response)
        if isinstance(refused, NotCovered):
            if refused.read:
                _give_again(environ, admission)
            given = _keeping_body(admission, engine.app(environ, start_response))
            keeps_body = True
            return given
        environ[COVERED] = True
        attempt = _begin(engine, admission)
        _give_again(environ, admission)
        if isinstance(attempt, BlockingAttempt):
            if "wsgi.file_wrapper" in environ:  # a file's bytes come through here; servers look up the name afterwards
                environ["wsgi.file_wrapper"] = FileWrapper
            given = WsgiRun(engine, admission, attempt, start_response).begin(environ)
            keeps_body = True
            return given
        if admission.fails_open and isinstance(attempt, Down) and is_outage(attempt):
            given = _keeping_body(admission, engine.app(environ, _marking_unprotected(start_response)))
            keeps_body = True
            return given
        return say(answer_to(engine, admission, attempt), start_response)
    finally:
        if not keeps_body:
            admission.close()


# Admission


def _admit(engine: WsgiEngine, admission: Admission, environ: WSGIEnvironment) -> NotAdmitted | None:
    """Why the request may not claim its operation; None: it may."""
    refused = admission.begin()
    if refused is None:
        refused = _read_body(admission, environ, engine.options.body_timeout)
        if refused is None and admission.is_large:
            admission.digest()
    if admission.weak_key:
        engine.tell(Event(kind=Kind.WEAK_KEY, note=admission.weak_key))
    return refused


def _read_body(admission: Admission, environ: WSGIEnvironment, patience: float) -> NotAdmitted | None:
    """Take the body. A server that waits for a client that stalls is not to be interrupted; it has a time-out."""
    source: Any = environ["wsgi.input"]
    left = admission.announced
    if left is None and not environ.get("wsgi.input_terminated"):
        if environ.get("HTTP_TRANSFER_ENCODING"):
            detail = "The server cannot tell where a body without Content-Length ends. Nothing was done; send one."
            return Problem(BODY_MISMATCH, detail)
        left = 0
    began = clock()
    while left is None or left > 0:
        until = deadline(began, clock(), admission.size, patience)
        chunk: bytes = source.read(CHUNK if left is None else min(CHUNK, left))
        if not chunk:
            break
        if clock() > until:
            return admission.stalled()
        if left is not None:
            left -= len(chunk)
            if left == 0 and admission.size == 0:  # nearly always
                return admission.take(chunk, False)
        refused = admission.take(chunk, True)
        if refused is not None:
            return refused
    return admission.take(b"", False)


def _give_again(environ: WSGIEnvironment, admission: Admission) -> None:
    """Give the body that was read to the app."""
    environ["wsgi.input"] = body_file(admission.body)
    environ["wsgi.input_terminated"] = True
    environ["CONTENT_LENGTH"] = str(admission.size)
    environ.pop("HTTP_TRANSFER_ENCODING", None)  # it has been undone


class _KeepingBody:
    """What an app returned that is not covered, and the body that it reads meanwhile."""

    def __init__(self, admission: Admission, iterable: Iterable[bytes]) -> None:
        self._admission = admission
        self._iterable = iterable

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._iterable)

    def close(self) -> None:
        """Close both."""
        try:
            close = getattr(self._iterable, "close", None)
            if close is not None:
                close()
        finally:
            self._admission.close()


def _keeping_body(admission: Admission, iterable: Iterable[bytes]) -> Iterable[bytes]:
    return _KeepingBody(admission, iterable) if isinstance(admission.body, Body) else iterable


# The claim


def _begin(engine: WsgiEngine, admission: Admission) -> BlockingAttempt | Conclusion:
    try:
        opened = engine.opened()
    except IdempotencyError as error:  # out of reach, or not set up; the event has it
        down = Down(error)
        engine.attempts.conclude(down, admission.id, admission.where, clock(), fails_open=admission.fails_open)
        return down
    return engine.attempts.begin(
        opened,
        admission.policy,
        admission.id,
        admission.fingerprint,
        admission.where,
        admission.tenant,
        admission.trace,
        admission.refingerprint,
        fails_open=admission.fails_open,
    )


def _marking_unprotected(start_response: StartResponse) -> StartResponse:
    """The route would rather double an effect than refuse (C10)."""
    mark = (UNPROTECTED[0].decode("ascii"), UNPROTECTED[1].decode("ascii"))

    def start_marked(
        status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        return start_response(status, [*headers, mark], exc_info)

    return start_marked
