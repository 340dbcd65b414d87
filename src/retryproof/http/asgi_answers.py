"""Answers sent by ASGI: `answers` says what they are, this asks and waits for what they need first."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, Protocol

from retryproof.core.errors import Unreadable
from retryproof.core.flow import Conclusion, Replayed
from retryproof.core.hold import Hold
from retryproof.engine import AsyncIdempotency
from retryproof.http.admission import Admission
from retryproof.http.answers import Answer, Undoing, denied, problem_of, refusal, replay, undone_answer, unreadable
from retryproof.http.departed import Departed
from retryproof.http.options import Authorize, Options
from retryproof.http.semantics import undone
from retryproof.http.types import App, Send
from retryproof.observe.events import Event, Kind


class Running(Protocol):
    """The app's run for one request."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def task(self) -> asyncio.Task[None]: ...

    def overran(self) -> None:
        """Its lease is not renewed any more; called from the keeper's thread."""


class AsgiEngine(AsyncIdempotency):
    """The engine of one layer, and the runs of its app, by what they hold."""

    def __init__(self, app: App, options: Options, **engine_options: Any) -> None:
        super().__init__(**engine_options, pepper=options.pepper)
        self.app = app
        self.options = options
        self.runs: dict[Hold, Running] = {}
        self.departed = Departed(options.max_departed)
        self._tell_overrun = self.attempts.overran
        self.attempts.overran = self._overran

    def _overran(self, hold: Hold) -> None:
        """A lease is not renewed any more; called from the keeper's thread."""
        self._tell_overrun(hold)
        run = self.runs.get(hold)
        if run is not None:
            run.overran()


async def send_conclusion(engine: AsgiEngine, admission: Admission, conclusion: Conclusion, send: Send) -> None:
    """Send what a conclusion means to the caller."""
    options = engine.options
    if not isinstance(conclusion, Replayed):
        answer = refusal(problem_of(conclusion, admission.policy, admission.operation), options)
    elif options.authorize is not None and not await _is_allowed(options.authorize, admission.request.context):
        answer = refusal(denied(admission.operation), options)
    else:
        try:
            found = replay(conclusion.finished, admission.request, options)
        except Unreadable as error:
            digest = admission.operation
            engine.tell(Event(kind=Kind.UNREADABLE, digest=digest, where=admission.where, error=error))
            found = refusal(unreadable(error, digest), options)
        answer = await _undone(found, options) if isinstance(found, Undoing) else found
    await send_answer(answer, send)


async def send_answer(answer: Answer, send: Send) -> None:
    """Send a whole response."""
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _undone(found: Undoing, options: Options) -> Answer:
    codings, body = found.codings, found.response.body
    plain = await asyncio.to_thread(undone, codings, body) if found.is_large else undone(codings, body)
    return undone_answer(found, plain, options)


async def _is_allowed(authorize: Authorize, context: Any) -> bool:
    answer = authorize(context)
    if inspect.isawaitable(answer):
        answer = await answer
    return answer is True
