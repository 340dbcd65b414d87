"""The middleware for WSGI apps: Flask, Django, Pyramid, Bottle and others (PEP 3333).

    app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, store="sqlite:///keys.db", scope=by_user)

It needs only WSGI. A request that it does not cover passes through unchanged (H1). Its rules and options are those of
the ASGI middleware; callables get the environ as a mapping, which also has the names of an ASGI scope.
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

    The options are those of `retryproof.http.asgi.IdempotencyMiddleware`, except for these:
    callables of the request get the environ as a mapping, which also has the names of an ASGI scope (`path`, `headers`,
    `user`, …). authorize: not async. on_departure: a client's departure is noticed when the server closes the response
    iterable; "stop" then closes the app's iterable.
    body_timeout: if a read hangs in the server, only the server's own time-out ends it.
    store: `close` closes a URL's store. A handler runs in the server's thread and cannot be cancelled. If it lost its
    lease, its steps raise an error, and its caller gets the winner's response.
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
        """Wait up to `drain` seconds for operations that still run, and close a store that was opened from a URL.
        Operations that are left are logged. Call it when the process ends, since WSGI has no event for that.
        """
        self._engine.close(drain)
