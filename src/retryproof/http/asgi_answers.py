"""Answers sent by ASGI: `answers` says what they are, this asks and waits for what they need first."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from retryproof.core.errors import Unreadable
from retryproof.core.flow import Conclusion, Replayed
from retryproof.engine import AsyncIdempotency
from retryproof.http.admission import Admission
from retryproof.http.answers import Answer, Undoing, denied, problem_of, refusal, replay, undone_answer, unreadable
from retryproof.http.departed import Departed
from retryproof.http.options import Authorize, Options
from retryproof.http.semantics import undone
from retryproof.http.types import App, Send
from retryproof.observe.events import Event, Kind


class AsgiEngine(AsyncIdempotency):
    """The engine of one layer, and the operations that it has running."""

    def __init__(self, app: App, options: Options, **engine_options: Any) -> None:
        super().__init__(**engine_options, pepper=options.pepper)
        self.app = app
        self.options = options
        self.running: set[asyncio.Task[None]] = set()
        self.departed = Departed(options.max_departed)


async def send_conclusion(engine: AsgiEngine, admission: Admission, conclusion: Conclusion, send: Send) -> None:
    """Send what a conclusion means to the caller."""
    if isinstance(conclusion, Replayed):
        await send_answer(await _replay(engine, admission, conclusion), send)
    else:
        problem = problem_of(conclusion, admission.policy, admission.operation)
        await send_answer(refusal(problem, engine.options), send)


async def send_answer(answer: Answer, send: Send) -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _replay(engine: AsgiEngine, admission: Admission, replayed: Replayed) -> Answer:
    options = engine.options
    if options.authorize is not None and not await _is_allowed(options.authorize, admission.request.context):
        return refusal(denied(admission.operation), options)
    try:
        found = replay(replayed.finished, admission.request, options)
    except Unreadable as error:
        digest = admission.operation
        engine.tell(Event(kind=Kind.UNREADABLE, digest=digest, where=admission.where, error=error))
        return refusal(unreadable(error, digest), options)
    if not isinstance(found, Undoing):
        return found
    codings, body = found.codings, found.response.body
    plain = await asyncio.to_thread(undone, codings, body) if found.is_large else undone(codings, body)
    return undone_answer(found, plain, options)


async def _is_allowed(authorize: Authorize, context: Any) -> bool:
    answer = authorize(context)
    if inspect.isawaitable(answer):
        answer = await answer
    return answer is True
