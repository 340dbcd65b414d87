"""The middleware for WSGI apps: Flask, Django, Pyramid, Bottle and others (PEP 3333).

    app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, store="sqlite:///keys.db", scope=by_user)

It needs nothing but WSGI, and what it does not cover passes through it untouched (H1). Its rules and its options are
those of the layer for ASGI: callables are given the environ as a mapping, under the names of an ASGI scope as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import iscoroutinefunction
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from retryproof.core.errors import ConfigurationError
from retryproof.http.admission import COVERED
from retryproof.http.environ import request_of
from retryproof.http.layer import Layer
from retryproof.http.options import Options
from retryproof.http.wsgi_exchange import respond
from retryproof.http.wsgi_run import WsgiEngine


class IdempotencyMiddleware(Layer[WSGIApplication, WsgiEngine]):
    """Lets requests with an idempotency key take effect once, and replays their responses.

    The options are those of `retryproof.http.asgi.IdempotencyMiddleware`, but for these:
    callables of the request are given the environ as a mapping, which has the names of an ASGI scope as well (`path`,
    `headers`, `user`, …). authorize: not async. on_departure: a client's departure shows when the server closes what it
    was given; "stop" then closes what the app returned.
    body_timeout: a read that the server does not return from is ended by the server's own time-out alone.
    store: a URL is closed by `close`. A handler runs in the server's thread and cannot be cancelled: one that lost its
    lease learns it from its steps, and its caller gets the winner's response.
    """

    def _make_engine(self, app: WSGIApplication, options: Options, **engine_options: Any) -> WsgiEngine:
        if iscoroutinefunction(options.authorize):
            raise ConfigurationError(f"authorize={options.authorize!r} must not be async under WSGI.")
        return WsgiEngine(app, options, **engine_options)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        options = self._options
        if environ["REQUEST_METHOD"] not in options.methods or COVERED in environ:
            return self.app(environ, start_response)
        request = request_of(environ, options.key_header)
        covered = options.key_header is None or request.key_lines or options.required.of(request.context)
        policy = options.policy.of(request.context) if covered else None
        if policy is None:
            return self.app(environ, start_response)
        return respond(self._engine, environ, start_response, request, policy)

    def close(self, drain: float = 5.0) -> None:
        """Wait for operations that still run, for up to `drain` seconds, and close a store that was opened from a URL.
        What is left is said in the log. To be called when the process ends: WSGI has no word for that.
        """
        self._engine.close(drain)
