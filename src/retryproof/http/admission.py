"""Whether a request may claim an operation, and which one (H2 to H6). Pure: it never waits.

    admission = Admission(options, request, policy)
    refused = admission.begin()                 # None: it needs the body
    refused = admission.take(chunk, more=…)     # for each part of the body
    refused = admission.end()                   # None: it may claim `id` under `fingerprint`,
    if admission.is_large:                      # which takes time where the body is large: a thread's work
        admission.digest()

Whoever performs it reads the body, and calls `close` at the end. What a callable of the user's raises, it raises before
anything is claimed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from retryproof.core.errors import ConfigurationError, InvalidKey, Unreadable
from retryproof.core.fingerprint import Hasher, comparable
from retryproof.core.keys import Strength, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.http import problem as problems
from retryproof.http.body import BUDGET, SHARE, Body, OverBudget
from retryproof.http.key_source import CallableKey, HeaderKey, JsonFieldKey
from retryproof.http.options import Choice, Departure, HeadDeparture, Options
from retryproof.http.problem import Problem
from retryproof.http.request import HttpRequest
from retryproof.http.scope import Anonymous, Identity, single_tenant
from retryproof.http.semantics import traceparent

COVERED = "retryproof.covered"
"""Set for a request that a layer covers, so that a second layer further in lets it pass."""
OFF_LOOP_FROM = 64 * 1024
"""Bytes of a body from which its fingerprint is finished in a thread: parsing takes a millisecond then."""


@dataclass(frozen=True, slots=True)
class NotCovered:
    """A request without a key; `read` says that its body had to be read to find that."""

    read: bool


_NAMES = frozenset({str, bytes})

NotAdmitted = Problem | NotCovered
"""Why a request claims nothing."""


class Admission:
    """One request on its way to a claim.

    body: as it came; bytes where it came in one part. size: its bytes so far. weak_key: what is wrong with a key that
    was refused only since it can be guessed; listeners are told, so that clients learn to make others.
    Known at the end: id, fingerprint, tenant, trace, where (the endpoint's pinned name), fails_open, on_departure; and
    is_large: the fingerprint is not known yet, since `digest` is a thread's work.
    """

    __slots__ = (
        "_announced",
        "_hasher",
        "_identity",
        "_is_anonymous",
        "_key",
        "_options",
        "_strength",
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
    _announced: int | None
    _key: str | None

    def __init__(self, options: Options, request: HttpRequest, policy: Policy) -> None:
        self._options = options
        self.request = request
        self.policy = policy
        self.body: bytes | Body | None = None
        self.size = 0
        self.weak_key = ""

    def begin(self) -> NotAdmitted | None:
        """Look at everything but the body."""
        options, request = self._options, self.request
        identity: Any = options.scope(request.context)
        if not identity or type(identity) not in _NAMES:  # nearly always it is one
            identity = _identified(identity)
        self._identity = identity or ""
        anonymous = self._is_anonymous = identity is None or isinstance(identity, Anonymous)
        strength = self._strength = "strong" if anonymous else options.strength
        source = options.key
        if not isinstance(source, JsonFieldKey):
            try:
                key = self._key = self._early_key(source, strength)
            except InvalidKey as error:
                return self._invalid_key(error, partial(self._early_key, source, "any"))
            if key is None:
                return self._no_key()
        announced = self._announced = request.announced
        if announced is not None and announced > options.max_body:
            return self._too_large()
        self._hasher = options.fingerprint.begin(
            request.method, request.raw_path, request.query, request.headers.get(b"content-type", b"")
        )
        return None

    def take(self, chunk: bytes, *, more: bool) -> NotAdmitted | None:
        """Take the next part of the body; `more` says that others follow."""
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
            try:
                body.append(chunk)
            except OverBudget:
                return Problem(problems.BUSY, "Try again in a moment, with the same key.", retry_after=1)
        self._hasher.update(chunk)
        announced = self._announced
        if more or announced is None or announced == size:
            return None
        return Problem(
            problems.BODY_MISMATCH,
            f"Content-Length says {announced} bytes and {size} came. Nothing was done; send it again.",
        )

    def stalled(self) -> Problem:
        """The refusal of a body that does not go on."""
        return Problem(
            problems.BODY_TIMEOUT,
            f"The body stalled after {self.size} bytes. Nothing was done; send it again with the same key.",
        )

    def end(self) -> NotAdmitted | None:
        """The body is whole: find out which operation it is."""
        options, request = self._options, self.request
        if isinstance(options.key, JsonFieldKey):
            refused = self._find_in_body(options.key)
            if refused is not None:
                return refused
        context, identity, pepper = request.context, self._identity, options.pepper
        endpoint = options.endpoint.of(context)
        self.tenant = b"" if self._is_anonymous else tenant_digest(identity, pepper=pepper)
        who = "anonymous" if self._is_anonymous else "caller"
        name = options.name
        what = (
            (name, who, identity, request.method, request.raw_path)
            if endpoint is None
            else (name, who, identity, endpoint)
        )
        self.id = record_id(what, self._key or "", pepper=pepper)
        self.where = endpoint or ""
        trace = request.headers.get(b"traceparent")
        self.trace = "" if trace is None else traceparent(trace)
        self.fails_open = options.fail_open.of(context)
        departure = options.on_departure
        self.on_departure = cast("Departure", departure.of(context)) if isinstance(departure, Choice) else departure
        self.is_large = self.size >= OFF_LOOP_FROM
        if not self.is_large:
            self.fingerprint = self._hasher.digest()
        return None

    def _find_in_body(self, source: JsonFieldKey) -> NotAdmitted | None:
        """Find the key in the body."""
        body = self.body
        whole = body.read() if isinstance(body, Body) else body or b""
        try:
            self._key = source.find(whole, self._strength)
        except InvalidKey as error:
            return self._invalid_key(error, partial(source.find, whole, "any"))
        return self._no_key() if self._key is None else None

    def digest(self) -> None:
        """Finish the fingerprint."""
        self.fingerprint = self._hasher.digest()

    def refingerprint(self, stored: bytes) -> bytes | None:
        """This request's fingerprint by the algorithm that made a stored one (C21)."""
        try:
            strategy = comparable(stored, self._options.fingerprint)
        except Unreadable:
            return None
        if strategy is None:
            return None
        request = self.request
        hasher = strategy.begin(
            request.method, request.raw_path, request.query, request.headers.get(b"content-type", b"")
        )
        for chunk in self.chunks():
            hasher.update(chunk)
        return hasher.digest()

    @property
    def operation(self) -> str:
        """What stands for the operation in answers and logs."""
        return short_digest(self.id)

    def chunks(self) -> Iterable[bytes]:
        """The body in order."""
        body = self.body
        return body.chunks() if isinstance(body, Body) else (body or b"",)

    def close(self) -> None:
        """Let go of the body. May be called twice."""
        if isinstance(self.body, Body):
            self.body.close()

    def _early_key(self, source: HeaderKey | CallableKey, strength: Strength) -> str | None:
        """The key, where it is found without the body."""
        request = self.request
        if isinstance(source, HeaderKey):
            return source.find(request.key_lines, strength) if request.key_lines else None
        return source.find(request.context, strength)

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
