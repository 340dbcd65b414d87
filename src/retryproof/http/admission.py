"""Whether a request may claim an operation, and which one (H2 to H6). Pure: it never waits.

    admission = Admission(options, request, policy)
    refused = admission.begin()              # None: it needs the body
    refused = admission.take(chunk, more)    # for each part of the body; None after the last: it may claim `id`
    if admission.is_large:                   # under `fingerprint`, which takes time where the body is large: a
        admission.digest()                   # thread's work

The adapter reads the body, and calls `close` at the end. An exception of a user's callable is raised before anything is
claimed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from retryproof.core.errors import ConfigurationError, InvalidKey, Unreadable
from retryproof.core.fingerprint import Hasher, comparable, fingerprint_of
from retryproof.core.keys import Strength, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.http import problem as problems
from retryproof.http.body import BUDGET, SHARE, Body, OverBudget
from retryproof.http.key_source import JsonFieldKey
from retryproof.http.options import Departure, HeadDeparture, Options
from retryproof.http.problem import Problem
from retryproof.http.request import HttpRequest
from retryproof.http.scope import Anonymous, Identity, single_tenant
from retryproof.http.semantics import traceparent

COVERED = "retryproof.covered"
"""Set for a covered request, so that a second middleware further in lets it pass."""
OFF_LOOP_FROM = 64 * 1024
"""From this size of a body, its fingerprint is finished in a thread, since parsing takes a millisecond then."""


@dataclass(frozen=True, slots=True)
class NotCovered:
    """A request without a key; `read`: its body had to be read to find that out."""

    read: bool


NotAdmitted = Problem | NotCovered
"""Why a request claims nothing."""


class Admission:
    """One request before its claim.

    announced: the body's length, where the request says it. body: as it came; bytes where it came in one part.
    size: its bytes so far. weak_key: what is wrong with a key that was refused only since it can be guessed; listeners
    are told, so that clients learn to make others.
    Known at the end: id, fingerprint, tenant, trace, where (the endpoint's pinned name), fails_open, on_departure; and
    is_large: the fingerprint is not known yet, since `digest` is a thread's work.
    """

    __slots__ = (
        "_hasher",
        "_identity",
        "_is_anonymous",
        "_key",
        "_options",
        "_strength",
        "announced",
        "body",
        "fails_open",
        "fingerprint",
        "id",
        "is_large",
        "on_departure",
        "policy",
        "request",
        "size",
        "tenant",
        "trace",
        "weak_key",
        "where",
    )

    announced: int | None
    id: bytes
    fingerprint: bytes
    tenant: bytes
    trace: str
    where: str
    fails_open: bool
    is_large: bool
    on_departure: Departure | HeadDeparture
    _hasher: Hasher
    _identity: str | bytes
    _is_anonymous: bool
    _strength: Strength
    _key: str | None

    def __init__(self, options: Options, request: HttpRequest, policy: Policy) -> None:
        self._options = options
        self.request = request
        self.policy = policy
        self.body: bytes | Body | None = None
        self.size = 0
        self.weak_key = ""

    def begin(self) -> NotAdmitted | None:
        """Check everything but the body."""
        options, request = self._options, self.request
        identify = options.identify
        identity: Any = options.scope(request.context) if identify is None else identify(request)
        kind = type(identity)
        if identity and (kind is bytes or kind is str):  # nearly always
            self._identity, self._is_anonymous, self._strength = identity, False, options.strength
        else:
            named = _identified(identity)
            self._identity, self._is_anonymous = named or "", named is None or isinstance(named, Anonymous)
            self._strength = "strong" if self._is_anonymous else options.strength
        source = options.key
        if not isinstance(source, JsonFieldKey):
            try:
                key = self._key = source.find(request, self._strength)
            except InvalidKey as error:
                return self._invalid_key(error, partial(source.find, request, "any"))
            if key is None:
                return self._no_key()
        length = request.headers.get(b"content-length")
        if length is None or not length.isdigit() or len(length) > 19:
            self.announced = None
        else:
            self.announced = announced = int(length)
            if announced > options.max_body:
                return self._too_large()
        return None

    def take(self, chunk: bytes, more: bool) -> NotAdmitted | None:
        """Take the next part of the body; `more`: others follow."""
        size = self.size = self.size + len(chunk)
        if size > self._options.max_body:
            return self._too_large()
        body = self.body
        if body is None and not more:
            self.body = bytes(chunk)
        else:
            if not isinstance(body, Body):
                owner = None if self._options.scope is single_tenant else self._identity
                body = self.body = Body(BUDGET, owner, max(SHARE, self._options.max_body))
                self._hasher = self._options.fingerprint.begin(*self._head)
            try:
                body.append(chunk)
            except OverBudget:
                return Problem(problems.BUSY, "Try again in a moment, with the same key.", retry_after=1)
            self._hasher.update(chunk)
        if more:
            return None
        announced = self.announced
        if announced is not None and announced != size:
            return Problem(
                problems.BODY_MISMATCH,
                f"Content-Length says {announced} bytes and {size} came. Nothing was done; send it again.",
            )
        return self._end()

    def stalled(self) -> Problem:
        """The refusal of a body that stalls."""
        return Problem(
            problems.BODY_TIMEOUT,
            f"The body stalled after {self.size} bytes. Nothing was done; send it again with the same key.",
        )

    def _end(self) -> NotAdmitted | None:
        """The body is whole: find out which operation it is."""
        options, request = self._options, self.request
        if isinstance(options.key, JsonFieldKey):
            refused = self._find_in_body(options.key)
            if refused is not None:
                return refused
        endpoint, self.fails_open, self.on_departure = options.fixed or options.settings(request.context)
        identity, pepper = self._identity, options.pepper
        if self._is_anonymous:
            who, self.tenant = "anonymous", b""
        else:
            who, self.tenant = "caller", tenant_digest(identity, pepper=pepper)
        if endpoint is None:
            self.where = ""
            scope = (options.name, who, identity, request.method, request.raw_path)
            self.id = record_id(scope, self._key or "", pepper=pepper)
        else:
            self.where = endpoint
            self.id = record_id((options.name, who, identity, endpoint), self._key or "", pepper=pepper)
        trace = request.headers.get(b"traceparent")
        self.trace = "" if trace is None else traceparent(trace)
        self.is_large = self.size >= OFF_LOOP_FROM
        if not self.is_large:
            self.digest()
        return None

    def _find_in_body(self, source: JsonFieldKey) -> NotAdmitted | None:
        """Find the key in the body."""
        body = self.body
        whole = body.read() if isinstance(body, Body) else body or b""
        try:
            self._key = source.find_in(whole, self._strength)
        except InvalidKey as error:
            return self._invalid_key(error, partial(source.find_in, whole, "any"))
        return self._no_key() if self._key is None else None

    def digest(self) -> None:
        """Take the fingerprint, or finish it."""
        body = self.body
        if isinstance(body, Body):
            self.fingerprint = self._hasher.digest()
        else:
            request, strategy = self.request, self._options.fingerprint
            content_type = request.headers.get(b"content-type", b"")
            self.fingerprint = fingerprint_of(
                strategy, request.method, request.raw_path, request.query, content_type, body or b""
            )

    def refingerprint(self, stored: bytes) -> bytes | None:
        """This request's fingerprint by the algorithm that made a stored one (C21)."""
        try:
            strategy = comparable(stored, self._options.fingerprint)
        except Unreadable:
            return None
        if strategy is None:
            return None
        hasher = strategy.begin(*self._head)
        for chunk in self.chunks():
            hasher.update(chunk)
        return hasher.digest()

    @property
    def operation(self) -> str:
        """The operation's digest for responses and logs."""
        return short_digest(self.id)

    @property
    def _head(self) -> tuple[str, bytes, bytes, bytes]:
        """What the fingerprint begins with."""
        request = self.request
        return request.method, request.raw_path, request.query, request.headers.get(b"content-type", b"")

    def chunks(self) -> Iterable[bytes]:
        """The body in order."""
        body = self.body
        return body.chunks() if isinstance(body, Body) else (body or b"",)

    def close(self) -> None:
        """Free the body. May be called twice."""
        if isinstance(self.body, Body):
            self.body.close()

    def _no_key(self) -> NotAdmitted:
        if not self._options.required.of(self.request.context):
            return NotCovered(self.body is not None)
        where = self._options.key.place
        return Problem(
            problems.KEY_MISSING,
            f"Put a new random key, such as a UUIDv4, in {where}, and send the same key when you retry.",
        )

    def _invalid_key(self, error: InvalidKey, find_any: Callable[[], str | None]) -> Problem:
        if self._strength == "strong" and _finds(find_any):
            self.weak_key = error.message
        anonymous = self._is_anonymous and self._options.strength == "any"
        why = " This caller is anonymous to the service, and then only keys that cannot be guessed are taken."
        return Problem(problems.KEY_INVALID, error.message + (why if anonymous else ""))

    def _too_large(self) -> Problem:
        return Problem(
            problems.BODY_TOO_LARGE, f"A body may have {self._options.max_body} bytes here. Nothing was done."
        )


def _identified(identity: object) -> Identity:
    """What a scope callable returned, where it is an identity or says that there is none."""
    if identity is None or identity in ("", b""):
        return None  # also an anonymous caller who names no host
    if isinstance(identity, str | bytes):
        return identity
    if inspect.iscoroutine(identity):
        identity.close()
    raise ConfigurationError(
        f"The scope callable returned {type(identity).__name__}; return a string or bytes that tell callers apart, "
        "or None for an anonymous caller, and no coroutine."
    )


def _finds(find: Callable[[], str | None]) -> bool:
    try:
        return find() is not None
    except InvalidKey:
        return False
