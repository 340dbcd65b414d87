"""The rules of HTTP: which requests are covered, which responses are stored, and what a replay contains. Pure.

Rules H1, H8, H9, H10 and H14; the adapters (ASGI, WSGI) only carry messages.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from inspect import iscoroutinefunction
from typing import Literal, TypeAlias, get_args

from retryproof.core.errors import ConfigurationError

Header: TypeAlias = tuple[bytes, bytes]
Headers: TypeAlias = list[Header]

StoreWhen: TypeAlias = Callable[[int, Sequence[Header]], bool]
"""Whether a response, by its status and headers, settles the operation (H8); otherwise a retry may run again."""

Preset: TypeAlias = Literal["default", "stripe", "success-only"]

NEVER_COVERED = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "CONNECT"})
"""Safe methods, and CONNECT, which opens a tunnel (H1)."""

NOT_SETTLED = frozenset({401, 403, 408, 409, 425, 429})
"""Statuses below 500 that mean "not now" or "not you": the same request may succeed later (H8)."""

_NO_CONTENT = frozenset({204, 304})

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Headers of one exchange, which would be wrong in a replay.
_OF_ONE_EXCHANGE = frozenset(
    {
        b"content-length",
        b"date",
        b"server",
        # tracing
        b"request-id",
        b"server-timing",
        b"traceparent",
        b"tracestate",
        b"traceresponse",
        b"x-amzn-trace-id",
        b"x-cloud-trace-context",
        b"x-correlation-id",
        b"x-process-time",
        b"x-request-id",
        b"x-trace-id",
        # rate limits
        b"ratelimit",
        b"ratelimit-policy",
    }
)
_DROPPED = _HOP_BY_HOP | _OF_ONE_EXCHANGE
_DROPPED_PREFIXES = (b"ratelimit-", b"x-ratelimit-", b"x-rate-limit-", b"x-b3-", b"x-datadog-")

_EVENT_STREAM = b"text/event-stream"
_OF_A_BODY = frozenset(
    {b"accept-ranges", b"digest", b"content-digest", b"etag", b"last-modified", b"repr-digest", b"want-digest"}
)


def covered_methods(methods: Iterable[str]) -> frozenset[str]:
    """The covered methods, checked; PUT and DELETE only if the app asks for them (H1)."""
    if isinstance(methods, str):
        raise ConfigurationError(f"methods={methods!r} is one string; give a collection, such as ('POST', 'PATCH').")
    chosen = frozenset(methods)
    for method in chosen:
        given: object = method
        if not isinstance(given, str) or not method.isascii() or method != method.upper() or not method:
            raise ConfigurationError(f"methods={sorted(map(str, chosen))}: {method!r} is no HTTP method in upper case.")
    if chosen & NEVER_COVERED:
        raise ConfigurationError(f"methods: {', '.join(sorted(chosen & NEVER_COVERED))} can never be covered.")
    if not chosen:
        raise ConfigurationError("methods is empty, so nothing would be covered; leave it out for POST and PATCH.")
    return chosen


# Which responses are stored (H8)


def settles(status: int, headers: Sequence[Header]) -> bool:
    """The default: every status below 500, except those that mean "not now" or "not you"."""
    return status < 500 and status not in NOT_SETTLED


def settles_always(status: int, headers: Sequence[Header]) -> bool:
    """The preset "stripe": every response of the handler once it has begun, also its failures.

    A refusal by a framework's validation is not the handler's answer. `refused_before` recognises it by the exception.
    """
    return True


def settles_success(status: int, headers: Sequence[Header]) -> bool:
    """The preset "success-only": 2xx and 3xx."""
    return status < 400


_PRESETS: dict[str, StoreWhen] = {"default": settles, "stripe": settles_always, "success-only": settles_success}


def is_preset(store_when: StoreWhen) -> bool:
    """Whether it checks only the status, as all presets do."""
    return store_when in _PRESETS.values()


def store_when_for(option: Preset | StoreWhen) -> StoreWhen:
    """The predicate that a `store_when=` option names."""
    if isinstance(option, str) and option in _PRESETS:
        return _PRESETS[option]
    if callable(option) and not iscoroutinefunction(option):
        return option
    raise ConfigurationError(
        f"store_when={option!r} must be one of {', '.join(map(repr, get_args(Preset)))}, "
        "or a callable of status and headers, which is not async."
    )


_VALIDATIONS = frozenset(
    {
        ("fastapi.exceptions", "RequestValidationError"),
        ("litestar.exceptions.http_exceptions", "ValidationException"),
    }
)
"""The exceptions of frameworks for a request that does not match a handler's signature."""


def refused_before(error: BaseException) -> bool:
    """Whether an exception is a framework's own validation of the request, so that the handler has not begun.

    A handler may raise the same type itself, after its effect: the last frame shows who raised it.
    """
    kinds = {(kind.__module__, kind.__qualname__) for kind in type(error).__mro__} & _VALIDATIONS
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if not kinds or last is None:
        return False
    raised_in = str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return raised_in in {module.partition(".")[0] for module, _ in kinds}


# What is kept and what is replayed (H9, H10)


ReadHeaders: TypeAlias = tuple[Headers, int | None, bool]
"""Headers that a replay repeats, in order, repeated names kept, names in lower case; the Content-Length, -1 where there
are two that differ; and whether it is `text/event-stream`."""


def read_headers(headers: Iterable[Header], unwanted: frozenset[bytes] = frozenset()) -> ReadHeaders:
    """What a response's headers say, in one look.

    unwanted: names of others that a replay does not repeat.
    """
    kept: Headers = []
    length: int | None = None
    is_events = False
    of_connection: set[bytes] = set()
    for name, value in headers:
        try:
            lowered = _known[name]
        except KeyError:
            lowered = _kept_name(name)
        if lowered is None:
            size = len(name)
            if size == 14:  # content-length, or another
                if name.lower() == b"content-length" and value.isdigit() and len(value) < 20:
                    given = int(value)
                    length = given if length is None or length == given else -1
            elif size == 10 and name.lower() == b"connection":
                of_connection.update(token.strip().lower() for token in value.split(b","))
            continue
        if lowered == b"content-type" and len(value) >= len(_EVENT_STREAM):
            is_events = is_events or is_event_stream(((lowered, value),))
        if lowered not in unwanted:
            kept.append((lowered, value))
    return [header for header in kept if header[0] not in of_connection] if of_connection else kept, length, is_events


def kept_headers(headers: Iterable[Header]) -> Headers:
    """The headers of a response that a replay repeats."""
    return read_headers(headers)[0]


REMEMBERED = 64
"""Characters up to which a header's name is remembered: an app may echo what others send."""
_MOST = 256
_known: dict[bytes, bytes | None] = {}
"""What `_kept_name` says of names that were met; emptied when there are many."""


def _kept_name(name: bytes) -> bytes | None:
    """A header's name in lower case, or None where the header is dropped whatever it says."""
    lowered = name.lower()
    kept = None if lowered in _DROPPED or lowered.startswith(_DROPPED_PREFIXES) else lowered
    if len(name) <= REMEMBERED:
        if len(_known) >= _MOST:
            _known.clear()
        _known[name] = kept
    return kept


def headers_without_body(headers: Iterable[Header]) -> Headers:
    """The kept headers that do not describe a body, for a replay that has none."""
    return [(name, value) for name, value in headers if name not in _OF_A_BODY and not name.startswith(b"content-")]


def replayed_headers(status: int, headers: Iterable[Header], length: int, marks: Iterable[Header]) -> Headers:
    """A replay's headers: the stored ones, Content-Length computed anew, and the marks of a replay."""
    if status in _NO_CONTENT:
        return [*headers, *marks]
    return [*headers, (b"content-length", b"%d" % length), *marks]


def is_event_stream(headers: Iterable[Header]) -> bool:
    """Whether a response is `text/event-stream`, which is never kept (H10)."""
    for name, value in headers:
        if name.lower() == b"content-type":
            return value.partition(b";")[0].strip().lower() == _EVENT_STREAM
    return False


_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{1,72})?")


def traceparent(value: bytes) -> str:
    """The trace context in a request's header; "" for what is none (W3C Trace Context, 3.2)."""
    return value.decode("ascii") if _TRACEPARENT.fullmatch(value) else ""


def retry_after(left: float, lease: float) -> int:
    """Whole seconds after which a duplicate should ask again, when the holder's lease has `left` seconds to go.

    A live holder renews its lease after a third of it. If less than two thirds are left, the holder has missed that and
    is probably dead: only the end of its lease helps. A live holder is usually done within a second.
    """
    return max(1, math.ceil(left)) if left < lease * 2 / 3 else 1


# A stored response that was compressed (H14)

_OF_CODED_BYTES = frozenset(
    {b"content-digest", b"content-encoding", b"content-md5", b"digest", b"etag", b"repr-digest"}
)
"""Headers that are wrong for a decoded body."""

_CODINGS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 47}
"""Content codings that can be decoded here, with zlib's window bits."""


def accepts(coding: bytes, accept_encoding: bytes) -> bool:
    """Whether an Accept-Encoding header allows a content coding; without the header everything is allowed."""
    if not accept_encoding:
        return True
    allowed: dict[bytes, bool] = {}
    for item in accept_encoding.lower().split(b","):
        name, _, parameters = item.partition(b";")
        quality = parameters.replace(b" ", b"").removeprefix(b"q=")
        allowed[name.strip()] = not quality or quality.strip(b"0.") != b""
    return allowed.get(coding, allowed.get(b"*", False))


def unaccepted_codings(headers: Iterable[Header], accept_encoding: bytes) -> list[bytes]:
    """The content codings of a stored response, in the order they were applied, if this caller may not take one."""
    if not accept_encoding:
        return []
    listed = [value for name, value in headers if name == b"content-encoding"]
    if not listed:
        return []
    items = b",".join(listed).lower().split(b",")
    codings = [coding for item in items if (coding := item.strip()) not in (b"", b"identity")]
    return [] if all(accepts(coding, accept_encoding) for coding in codings) else codings


UNDO_LIMIT = 16 * 1024 * 1024
"""The most bytes of a decoded body: a megabyte of gzip can contain a gigabyte."""


def undone(codings: Sequence[bytes], body: bytes) -> bytes | None:
    """A decoded body; None if it cannot be decoded completely, or is over UNDO_LIMIT (H14)."""
    bits = _CODINGS.get(codings[0]) if len(codings) == 1 else None
    if bits is None:
        return None
    plain: list[bytes] = []
    left = UNDO_LIMIT
    while body:  # gzip may have several members, one after the other (RFC 1952)
        stream = zlib.decompressobj(bits)
        try:
            part = stream.decompress(body, left + 1)
        except zlib.error:
            return None
        left -= len(part)
        if left < 0 or not stream.eof:
            return None
        plain.append(part)
        body = stream.unused_data
    return b"".join(plain)


def headers_of_undone(headers: Iterable[Header]) -> Headers:
    """The headers of a stored response for its decoded body."""
    return [(name, value) for name, value in headers if name not in _OF_CODED_BYTES]
