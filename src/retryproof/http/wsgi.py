"""The middleware for WSGI apps: Flask, Django, Pyramid, Bottle and others (PEP 3333).

    app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, store="sqlite:///keys.db", scope=by_user)

It needs nothing but WSGI, and what it does not cover passes through it untouched (H1). Its rules and its options are
those of the layer for ASGI: callables are given the environ as a mapping, under the names of an ASGI scope as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from inspect import iscoroutinefunction
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from retryproof.core.errors import ConfigurationError
from retryproof.core.fingerprint import CustomFingerprint, Strategy, raw
from retryproof.core.keys import Strength
from retryproof.core.policy import Policy
from retryproof.http.admission import COVERED
from retryproof.http.environ import request_of
from retryproof.http.key_source import FindKey, JsonFieldKey
from retryproof.http.options import (
    BODY_TIMEOUT,
    MAX_BODY,
    MAX_DEPARTED,
    Authorize,
    OnDeparture,
    PerRequest,
    check_options,
)
from retryproof.http.problem import DOCS_URL
from retryproof.http.scope import Identify
from retryproof.http.semantics import Preset, StoreWhen
from retryproof.http.wsgi_exchange import respond
from retryproof.http.wsgi_run import WsgiEngine
from retryproof.observe.events import Listener
from retryproof.observe.logging import log_event
from retryproof.stores.base import AsyncStore, Store


class IdempotencyMiddleware:
    """Lets requests with an idempotency key take effect once, and replays their responses.

    The options are those of `retryproof.http.asgi.IdempotencyMiddleware`, but for these:
    callables of the request are given the environ as a mapping, which has the names of an ASGI scope as well (`path`,
    `headers`, `user`, …). authorize: not async. on_departure: a client's departure shows when the server closes what it
    was given; "stop" then closes what the app returned.
    body_timeout: a read that the server does not return from is ended by the server's own time-out alone.
    store: a URL is closed by `close`. A handler runs in the server's thread and cannot be cancelled: one that lost its
    lease learns it from its steps, and its caller gets the winner's response.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        store: str | Store | AsyncStore,
        scope: Identify | None = None,
        policy: PerRequest[Policy | None] = Policy(),  # noqa: B008  # frozen
        required: PerRequest[bool] = False,
        methods: Iterable[str] = ("POST", "PATCH"),
        key: str | JsonFieldKey | FindKey = "Idempotency-Key",
        keys: Strength = "any",
        strict: bool = False,
        endpoint: PerRequest[str | None] = None,
        fingerprint: Strategy | CustomFingerprint = raw,
        store_when: Preset | StoreWhen = "default",
        on_departure: OnDeparture = "finish",
        max_departed: int = MAX_DEPARTED,
        authorize: Authorize | None = None,
        max_body: int = MAX_BODY,
        body_timeout: float = BODY_TIMEOUT,
        fail_open: PerRequest[bool] = False,
        replay_header: str = "Idempotency-Replayed",
        keep_set_cookie: bool = True,
        docs_url: str = DOCS_URL,
        events: Sequence[Listener] = (log_event,),
        pepper: bytes = b"",
        name: str = "",
    ) -> None:
        options = check_options(
            scope=scope,
            policy=policy,
            required=required,
            methods=methods,
            key=key,
            keys=keys,
            strict=strict,
            endpoint=endpoint,
            fingerprint=fingerprint,
            store_when=store_when,
            on_departure=on_departure,
            max_departed=max_departed,
            authorize=authorize,
            max_body=max_body,
            body_timeout=body_timeout,
            fail_open=fail_open,
            replay_header=replay_header,
            keep_set_cookie=keep_set_cookie,
            docs_url=docs_url,
            pepper=pepper,
            name=name,
        )
        if iscoroutinefunction(authorize):
            raise ConfigurationError(f"authorize={authorize!r} must not be async under WSGI.")
        if "django.core.signals" in sys.modules:
            import retryproof.http.django  # noqa: F401  # hears what Django makes a response of
        self.app = app
        self._options = options
        self._engine = WsgiEngine(
            app, options, store=store, policy=policy if isinstance(policy, Policy) else None, events=events
        )

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
