"""The middleware for ASGI apps: Starlette, FastAPI, Litestar, Quart, Django and others.

    app.add_middleware(IdempotencyMiddleware, store="sqlite:///keys.db", scope=by_user)

It needs only ASGI. A request that it does not cover passes through unchanged (H1).
"""

from __future__ import annotations

import asyncio
from typing import Any

from retryproof.http.admission import COVERED
from retryproof.http.asgi_answers import AsgiEngine
from retryproof.http.asgi_exchange import request_of, respond
from retryproof.http.layer import Layer
from retryproof.http.options import Options
from retryproof.http.types import App, AsgiMessage, AsgiScope, Receive, Send

DRAIN = 10.0
"""Seconds that a shutdown waits for operations whose requests the server has cancelled."""


class IdempotencyMiddleware(Layer[App, AsgiEngine]):
    """Lets requests with an idempotency key take effect once, and replays their responses.

    store: a URL, opened at the first covered request and closed at `lifespan.shutdown`, or a store of the caller's.
    scope: who owns a key: `by_user`, `by_header(…)`, `single_tenant`, or a callable of the ASGI scope;
    `by_host(…)` around one of them adds the host.
    policy, required, endpoint, fail_open: a value or a callable of the ASGI scope. A policy of None: not covered.
    required: refuse requests without a key. endpoint: a name that stands for method and path in the key's scope.
    key: the header with the key, `json_field(…)`, or a callable. keys: "strong" refuses keys that can be guessed.
    strict: accept only the quoted form. fingerprint: what makes two requests the same; by default every byte.
    store_when: "default", "stripe", "success-only", or a callable of status and headers: which responses are stored.
    on_departure: what happens when a client leaves. "finish": the handler, and the stream that it produces, runs to its
    end. "stop": the app sees the disconnect, and a stream ends there, with an unknown outcome. Or a callable of the
    ASGI scope, or of a response's status and headers, that returns one of them.
    max_departed: how many handlers may run at once without their clients; above that, the one that has run so for
    longest is stopped, with an unknown outcome.
    authorize: called before each replay; it says whether this caller may have the response.
    max_body: bytes. body_timeout: seconds for which a body may stall; a whole body may take these and one second for
        every
    16 KiB.
    fail_open: run without protection while the store is down, and say so in the response.
    replay_header: marks a replay. keep_set_cookie: whether replays repeat cookies. docs_url: for problem documents.
    events: listeners; by default the log. pepper: a secret that is mixed into record ids. name: a name for this app, if
    several apps share a store.
    """

    def _make_engine(self, app: App, options: Options, **engine_options: Any) -> AsgiEngine:
        return AsgiEngine(app, options, **engine_options)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        options = self._options
        if scope["type"] == "http" and scope["method"] in options.methods and COVERED not in scope:
            request = request_of(scope, options.key_header)
            if request.key_lines or options.key_header is None or options.required.of(scope):
                policy = options.policy.fixed or options.policy.of(scope)
                if policy is not None:
                    await respond(self._engine, scope, receive, send, request, policy)
                    return
        elif scope["type"] == "lifespan":
            send = self._closing(send)
        await self.app(scope, receive, send)

    def _closing(self, send: Send) -> Send:
        """A `send` that closes the store when the app has shut down."""

        async def send_and_close(message: AsgiMessage) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self.aclose()
            await send(message)

        return send_and_close

    async def aclose(self, drain: float = DRAIN) -> None:
        """Wait up to `drain` seconds for operations that still run, and close a store that was opened from a URL.
        Operations that are left are logged.

        `lifespan.shutdown` does this; call it yourself on servers without lifespan.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + drain
        running = {run.task for run in list(self._engine.runs.values()) if run.loop is loop}
        if running:
            await asyncio.wait(running, timeout=drain)
        await self._engine.aclose(max(0.0, until - loop.time()))
