"""A conclusion as a response: status, headers, body. Pure (H7, H9, H13, H14).

If this caller does not accept the coding of a stored body, the replay is an `Undoing`, not an answer yet: the adapter
decodes the body, in a thread if it is large, and calls `undone_answer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from retryproof.conclusions import WHY_UNKNOWN
from retryproof.core.codec import StoredResponse, decode_response
from retryproof.core.commands import Finished
from retryproof.core.errors import ConfigurationError, Unreadable
from retryproof.core.flow import Busy, Completed, Conclusion, Down, Failed, Foreign, Mismatched, Refused, Replayed
from retryproof.core.policy import Policy
from retryproof.http import problem as problems
from retryproof.http.options import Options
from retryproof.http.problem import Problem, ProblemType, render
from retryproof.http.request import HttpRequest
from retryproof.http.semantics import (
    Header,
    Headers,
    headers_of_undone,
    headers_without_body,
    replayed_headers,
    retry_after,
    unaccepted_codings,
)

OMITTED: Header = (b"idempotency-replay", b"omitted")
UNPROTECTED: Header = (b"idempotency-unprotected", b"store-unavailable")
"""The header for the response of a handler that ran without a record (C10)."""
OFF_LOOP_FROM = 2 * 1024
"""From this size, a compressed body is decoded in a thread: it may contain a thousand times as many bytes."""
_NOTHING_KEPT = StoredResponse(200, (), b"", omitted=True)


class Answer(NamedTuple):
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


class Undoing(NamedTuple):
    """A stored response that has to be decoded first, by `semantics.undone`."""

    response: StoredResponse
    codings: Sequence[bytes]

    @property
    def is_large(self) -> bool:
        """Whether to do that in a thread."""
        return len(self.response.body) >= OFF_LOOP_FROM


def refusal(problem: Problem, options: Options) -> Answer:
    """A problem document."""
    return Answer(*render(problem, options.docs_url))


def replay(finished: Finished, request: HttpRequest, options: Options) -> Answer | Undoing:
    """The stored response. Raises Unreadable."""
    response = _NOTHING_KEPT if finished.result is None else decode_response(finished.result)
    headers, body = response.headers, response.body
    codings = unaccepted_codings(headers, request.headers.get(b"accept-encoding", b"")) if body else ()
    if codings:
        return Undoing(response, codings)
    return _replayed(response.status, headers, body, options, omitted=response.omitted)


def undone_answer(undoing: Undoing, plain: bytes | None, options: Options) -> Answer:
    """The replay with its decoded body; None: decoding was not possible, and the body is left out."""
    status, headers = undoing.response.status, undoing.response.headers
    if plain is None:
        return _replayed(status, headers_without_body(headers), b"", options, omitted=True)
    return _replayed(status, headers_of_undone(headers), plain, options, omitted=False)


def _replayed(status: int, headers: Iterable[Header], body: bytes, options: Options, *, omitted: bool) -> Answer:
    mark = (options.replay_header, b"true")
    return Answer(status, replayed_headers(status, headers, len(body), (mark, OMITTED) if omitted else (mark,)), body)


def denied(operation: str) -> Problem:
    """The answer to a caller whose replay `authorize` refuses."""
    detail = "The request was done before, and this caller may not have its response."
    return Problem(problems.REPLAY_DENIED, detail, operation=operation)


def unreadable(error: Unreadable, operation: str) -> Problem:
    """The answer to a caller whose stored response cannot be read."""
    return Problem(problems.RECORD_UNREADABLE, error.message, retry_after=1, operation=operation)


def problem_of(conclusion: Conclusion, policy: Policy, operation: str) -> Problem:
    """The answer for a conclusion without a response."""
    return Problem(*_explained(conclusion, policy), operation)


def _explained(conclusion: Conclusion, policy: Policy) -> tuple[ProblemType, str, int | None]:
    match conclusion:
        case Busy(left):
            seconds = retry_after(left, policy.lease)
            return problems.IN_PROGRESS, "Ask again with the same key to get its response.", seconds
        case Mismatched():
            return problems.KEY_REUSED, "Use a new key for a new request; a retry repeats the request as it was.", None
        case Refused(reason, number):
            why = WHY_UNKNOWN[reason]
            detail = f"It is held back because {why} (attempt {number}). Retrying does not help; ask the operator."
            return problems.OUTCOME_UNKNOWN, detail, None
        case Down(ConfigurationError()):
            detail = "The idempotency store of this service is not set up; its log says what to do. Nothing was done."
            return problems.STORE_UNAVAILABLE, detail, 1
        case Down(Unreadable() as error):
            return problems.RECORD_UNREADABLE, error.message, 1
        case Down(_, overtaken):
            done = "What was done is not known yet" if overtaken else "Nothing was done"
            return problems.STORE_UNAVAILABLE, f"{done}. Try again with the same key.", 1
        case Foreign():
            detail = "It was stored by another version of this service. Nothing was done; try again with the same key."
            return problems.RECORD_UNREADABLE, detail, 1
        case Completed() | Failed() | Replayed():
            raise TypeError(f"{conclusion!r} is no refusal")
