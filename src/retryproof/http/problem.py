"""The responses to refused requests: problem documents (RFC 9457) with a stable `code`. Pure (H7)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from retryproof.core.errors import ConfigurationError
from retryproof.http.semantics import Headers

DOCS_URL = "https://retryproof.readthedocs.io/en/stable/reference/problems.html"


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One kind of refusal: its code, status and title stay; details differ."""

    code: str
    status: int
    title: str


KEY_MISSING = ProblemType("key-missing", 400, "This request needs an idempotency key")
KEY_INVALID = ProblemType("key-invalid", 400, "The idempotency key is not valid")
BODY_MISMATCH = ProblemType("body-length-mismatch", 400, "The body does not have the length that was announced")
REPLAY_DENIED = ProblemType("replay-denied", 403, "The stored response is not for this caller")
BODY_TIMEOUT = ProblemType("body-timeout", 408, "The body did not come in time")
IN_PROGRESS = ProblemType("in-progress", 409, "The same request is being processed")
OUTCOME_UNKNOWN = ProblemType("outcome-unknown", 409, "Whether an earlier attempt took effect is not known")
BODY_TOO_LARGE = ProblemType("body-too-large", 413, "The body is too large")
KEY_REUSED = ProblemType("key-reused", 422, "The idempotency key was used with another request")
HANDLER_FAILED = ProblemType("handler-failed", 500, "The request failed")
TRANSACTION_FAILED = ProblemType("transaction-failed", 500, "The transaction was not committed")
RECORD_UNREADABLE = ProblemType("record-unreadable", 503, "The stored response cannot be read")
STORE_UNAVAILABLE = ProblemType("store-unavailable", 503, "The idempotency store gave no answer")
BUSY = ProblemType("too-busy", 503, "Too many large requests are being received")

KINDS: Mapping[str, ProblemType] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            KEY_MISSING,
            KEY_INVALID,
            BODY_MISMATCH,
            REPLAY_DENIED,
            BODY_TIMEOUT,
            IN_PROGRESS,
            OUTCOME_UNKNOWN,
            BODY_TOO_LARGE,
            KEY_REUSED,
            HANDLER_FAILED,
            TRANSACTION_FAILED,
            RECORD_UNREADABLE,
            STORE_UNAVAILABLE,
            BUSY,
        )
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal: its kind, what happened and what to do, and the seconds to wait if a retry helps."""

    kind: ProblemType
    detail: str
    retry_after: int | None = None
    operation: str | None = None


def check_docs_url(url: object) -> str:
    """The address that problem documents point to, checked: it goes into a header."""
    if not isinstance(url, str) or not url or any(not "!" <= c <= "~" or c in '<>"' for c in url):
        raise ConfigurationError(f"docs_url={url!r} must be an absolute URL in ASCII.")
    return url


def render(problem: Problem, docs_url: str) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a problem document; `type` and the link lead to the documentation."""
    kind = problem.kind
    document: dict[str, object] = {
        "type": f"{docs_url}#{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": problem.detail,
    }
    if problem.operation is not None:
        document["operation"] = problem.operation
    body = json.dumps(document).encode()
    headers: Headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"link", b'<%b>; rel="describedby"' % docs_url.encode("ascii")),
    ]
    if problem.retry_after is not None:
        headers.append((b"retry-after", b"%d" % problem.retry_after))
    return kind.status, headers, body
