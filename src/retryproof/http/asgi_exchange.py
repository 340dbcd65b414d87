"""One covered request under ASGI: admit it, claim, and run it; or refuse it, or replay its response (H7).

This performs the decisions of the pure modules: `admission` decides whether the request may claim, `answers` makes a
response of a conclusion. `asgi_run` runs the app.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import quote

from retryproof.attempt import LoopAttempt
from retryproof.conclusions import is_outage
from retryproof.core.errors import IdempotencyError
from retryproof.core.flow import Conclusion, Down
from retryproof.core.policy import Policy
from retryproof.drive import clock
from retryproof.http.admission import COVERED, Admission, NotAdmitted, NotCovered
from retryproof.http.answers import UNPROTECTED, refusal
from retryproof.http.asgi_answers import AsgiEngine, send_answer, send_conclusion
from retryproof.http.asgi_run import AsgiRun
from retryproof.http.body import deadline
from retryproof.http.client_link import DISCONNECT, ClientLink
from retryproof.http.options import Departure, HeadDeparture
from retryproof.http.problem import Problem
from retryproof.http.request import HttpRequest
from retryproof.http.types import REPEATABLE, AsgiMessage, AsgiScope, Receive, Send
from retryproof.observe.events import Event, Kind

_HIDDEN_EXTENSIONS = ("http.response.pathsend", "http.response.zerocopysend")
"""ASGI extensions that send a file past the middleware; without them an app sends bytes, which can be stored."""


class Gone:
    """The client left before its body was complete."""


GONE = Gone()


async def respond(
    engine: AsgiEngine, scope: AsgiScope, receive: Receive, send: Send, request: HttpRequest, policy: Policy
) -> None:
    """Run the operation, replay it, or refuse it."""
    admission = Admission(engine.options, request, policy)
    link: ClientLink | None = None
    run: AsgiRun | None = None
    try:
        refused = await _admit(engine, admission, receive)
        if refused is not None:
            await _turn_away(engine, admission, refused, scope, receive, send)
            return
        scope[COVERED] = True
        begun: LoopAttempt | Conclusion
        try:
            opened = engine.opened()
        except IdempotencyError as error:  # out of reach, or not set up; the event has it
            begun = Down(error)
            engine.attempts.conclude(begun, admission.id, admission.where, clock(), fails_open=admission.fails_open)
        else:
            if policy.wait:  # who waits may leave meanwhile (C18)
                link = ClientLink(receive, send, admission.body or b"")
            begun = await engine.attempts.abegin(
                opened,
                policy,
                admission.id,
                admission.fingerprint,
                admission.where,
                admission.tenant,
                admission.trace,
                admission.refingerprint,
                fails_open=admission.fails_open,
                stays=None if link is None else link.stays,
            )
            if isinstance(begun, LoopAttempt):
                scope = _app_scope(scope, admission.on_departure)
                run = AsgiRun(engine, opened, admission, begun, scope, receive, send, link)
                try:
                    await run.over
                except asyncio.CancelledError:
                    await run.desert()
                    raise
                return
        if admission.fails_open and isinstance(begun, Down) and is_outage(begun):
            link = link or ClientLink(receive, send, admission.body or b"")
            await _run_unprotected(engine, scope, link.receive, send)
        else:
            await send_conclusion(engine, admission, begun, send)
    finally:
        if run is None:  # otherwise its end does it, which may come later
            admission.close()
            if link is not None:
                link.close()


# Admission


async def _admit(engine: AsgiEngine, admission: Admission, receive: Receive) -> NotAdmitted | Gone | None:
    """Why the request may not claim its operation; None: it may."""
    refused: NotAdmitted | Gone | None = admission.begin()
    if refused is None:
        message = await receive()
        if message["type"] == DISCONNECT:
            return GONE
        more = message.get("more_body", False)
        refused = admission.take(message.get("body", b""), more)
        if more and refused is None:
            refused = await _read_on(engine, admission, receive)
        if refused is None and admission.is_large:
            await asyncio.to_thread(admission.digest)
    if admission.weak_key:
        engine.tell(Event(kind=Kind.WEAK_KEY, note=admission.weak_key))
    return refused


async def _read_on(engine: AsgiEngine, admission: Admission, receive: Receive) -> NotAdmitted | Gone | None:
    """Take the rest of a body that comes in several messages."""
    now, patience = asyncio.get_running_loop().time, engine.options.body_timeout
    began = now()
    while True:
        try:
            async with asyncio.timeout_at(deadline(began, now(), admission.size, patience)):
                message = await receive()
        except TimeoutError:
            return admission.stalled()
        if message["type"] == DISCONNECT:
            return GONE
        more = message.get("more_body", False)
        refused = admission.take(message.get("body", b""), more)
        if refused is not None or not more:
            return refused


async def _turn_away(
    engine: AsgiEngine,
    admission: Admission,
    refused: NotAdmitted | Gone,
    scope: AsgiScope,
    receive: Receive,
    send: Send,
) -> None:
    match refused:
        case Problem():
            await send_answer(refusal(refused, engine.options), send)
        case NotCovered(read):
            if read:
                link = ClientLink(receive, send, admission.body or b"")
                try:
                    await engine.app(scope, link.receive, send)
                finally:
                    link.close()
            else:
                await engine.app(scope, receive, send)
        case Gone():
            return  # nothing was claimed, nothing runs, and the client has left


# The claim


async def _run_unprotected(engine: AsgiEngine, scope: AsgiScope, receive: Receive, send: Send) -> None:
    """Run without protection, since the route has `fail_open` (C10)."""

    async def send_marked(message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), UNPROTECTED]}
        await send(message)

    await engine.app(scope, receive, send_marked)


# What is asked for


def request_of(scope: AsgiScope, key_header: bytes | None) -> HttpRequest:
    """The request in an ASGI scope. Callables of the user's are given the scope itself."""
    every = scope["headers"]
    if not isinstance(every, REPEATABLE):
        every = scope["headers"] = list(every)
    headers: dict[bytes, bytes] = dict(every)
    once = len(headers) == len(every)
    lines: Sequence[bytes] = ()
    if key_header in headers:
        lines = (headers[key_header],) if once else [value for name, value in every if name == key_header]
    raw = scope.get("raw_path")
    path = _quoted_path(scope) if raw is None else bytes(raw).partition(b"?")[0]
    return HttpRequest(scope["method"], path, scope.get("query_string", b""), headers, once, lines, scope)


def _quoted_path(scope: AsgiScope) -> bytes:
    path, root = scope["path"], scope.get("root_path", "")
    whole = path if path.startswith(root) else root + path  # mounts of old cut the root off
    return quote(whole, errors="surrogatepass").encode("ascii")


def _app_scope(scope: AsgiScope, on_departure: Departure | HeadDeparture) -> AsgiScope:
    """The scope for the app: the same object, since what lies outside reads from it what routing put there.

    Extensions that send a file past the middleware are left out. The scope says that sending to a client that has left
    is an error (ASGI HTTP 2.4), and the link does that. So a framework has no reason to stop a response by itself. If
    the app has to stop, the scope says what the server said.
    """
    extensions = scope.get("extensions")
    if extensions and any(name in extensions for name in _HIDDEN_EXTENSIONS):
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in _HIDDEN_EXTENSIONS}
    asgi = scope.get("asgi", {})
    if on_departure != "stop" and asgi.get("spec_version", "2.0") in ("2.0", "2.1", "2.2", "2.3"):
        scope["asgi"] = {**asgi, "spec_version": "2.4"}
    return scope
