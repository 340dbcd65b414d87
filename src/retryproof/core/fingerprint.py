"""Fingerprints: whether a request or a call that reuses a key asks for the same thing.

A stored fingerprint is one version byte, one byte for the method that made it, and a SHA-256. The byte names the method
that was used, which may differ from the option: a JSON body without a canonical form is fingerprinted raw. Every hashed
part is preceded by its length, except the body, which comes last. So two different requests never hash the same bytes.

A strategy ignores the rest: for `json`, two spellings of one value are the same request, and `fields(...)` compares
only the given fields.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from inspect import iscoroutinefunction
from typing import Protocol, TypeAlias

from retryproof.core.canonical import Json, NotCanonical, canonical_json, parse, serialise
from retryproof.core.errors import ConfigurationError, Unreadable
from retryproof.core.keys import REMEMBERED
from retryproof.core.multipart import MultipartDigest

VERSION = 1
LENGTH = 34
MAX_JSON = 1024 * 1024
"""A JSON body of up to this many bytes is compared by its value, which takes about 0.3 s of a core at this size. A
larger body is compared byte for byte."""


class Method(IntEnum):
    """How a fingerprint was made. It is stored, so the numbers never change."""

    RAW = 1
    JSON = 2
    FIELDS = 3
    MULTIPART = 4
    ARGUMENTS = 5
    CUSTOM = 6


class Hasher(Protocol):
    """Takes a request's body chunk by chunk."""

    def update(self, chunk: bytes, /) -> None:
        """Take the next bytes of the body."""

    def digest(self) -> bytes:
        """Return the fingerprint as it is stored."""


class Strategy(Protocol):
    """A way to make the fingerprint of a request."""

    def begin(self, method: str, path: bytes, query: bytes, content_type: bytes) -> Hasher:
        """Return a hasher for the body of one request."""


@dataclass(frozen=True, slots=True)
class Request:
    """The argument of a fingerprint callable; the callable's answer alone is the fingerprint."""

    method: str
    path: bytes
    query: bytes
    content_type: bytes
    body: bytes


CustomFingerprint: TypeAlias = Callable[[Request], bytes | str]


def version_of(stored: bytes) -> tuple[int, int]:
    """Return version and method of a stored fingerprint, (0, 0) for the empty one; raise Unreadable if unknown."""
    if not stored:
        return 0, 0
    if stored[0] != VERSION:
        raise Unreadable(f"The fingerprint has version {stored[0]}; this release reads {VERSION}. Upgrade to read it.")
    if len(stored) != LENGTH or stored[1] not in set(Method):
        raise Unreadable("The stored fingerprint is damaged, or was made by a method that this release does not know.")
    return VERSION, stored[1]


def comparable(stored: bytes, configured: Strategy) -> Strategy | None:
    """Return the strategy that makes a request's fingerprint the way a stored one was made, None if none can (C21).

    A stored fingerprint of fields does not name its pointers: after a change of the pointers, older records are
    mismatches.
    """
    _, method = version_of(stored)
    if method in (Method.RAW, Method.MULTIPART):
        return raw
    if method == Method.JSON:
        return json
    maker = {Method.FIELDS: Fields, Method.CUSTOM: Custom}.get(Method(method)) if method else None
    return configured if maker is not None and isinstance(configured, maker) else None


def seal(method: Method, digest: bytes) -> bytes:
    """Return a fingerprint as it is stored."""
    return bytes((VERSION, method)) + digest


_RAW_SEAL = seal(Method.RAW, b"")
_MULTIPART = b"multipart/"


def canonical_media_type(content_type: bytes) -> bytes:
    """Return the part of a Content-Type that counts: type, subtype and charset; for multipart all but the boundary."""
    if b";" not in content_type:
        return _frame(content_type.strip(b" \t").lower())
    media_type, parameters = _parse_content_type(content_type)
    multipart = media_type.startswith(b"multipart/")
    counted = sorted((name, value) for name, value in parameters if _counts(name, multipart))
    return _frame(media_type, *(part for parameter in counted for part in parameter))


def fingerprint_of(
    strategy: Strategy, method: str, path: bytes, query: bytes, content_type: bytes, body: bytes
) -> bytes:
    """Return the fingerprint of a request whose body is here in one part."""
    if type(strategy) is not Raw or content_type[:10].lower() == _MULTIPART:
        hasher = strategy.begin(method, path, query, content_type)
        hasher.update(body)
        return hasher.digest()
    hash = _raw_hash(method, path, query, content_type)
    hash.update(body)
    return _RAW_SEAL + hash.digest()


def selected_fields(body: bytes, pointers: Sequence[str]) -> bytes | None:
    """Return the canonical form of what JSON Pointers (RFC 6901) select, or None where `body` has no canonical form.

    An absent value differs from null, and every pointer counts.
    """
    try:
        document = parse(body)
        return serialise([[pointer, _select(document, pointer)] for pointer in pointers])
    except NotCanonical:
        return None


# --- Hashers --------------------------------------------------------------------------------------------------------


class RequestFingerprint:
    """The raw fingerprint: method, path, query, media type and every byte of the body."""

    __slots__ = ("_hash", "update")

    def __init__(self, method: str, path: bytes, query: bytes, content_type: bytes) -> None:
        self._hash = _raw_hash(method, path, query, content_type)
        self.update = self._hash.update

    def digest(self) -> bytes:
        """Return the fingerprint as it is stored."""
        return _RAW_SEAL + self._hash.digest()


class MultipartFingerprint:
    """The fingerprint of a multipart request by its parts; that of the raw bytes if they are malformed."""

    __slots__ = ("_head", "_parts", "_raw")

    def __init__(self, method: str, path: bytes, query: bytes, content_type: bytes, boundary: bytes) -> None:
        self._head = _head(Method.MULTIPART, method, path, query, content_type)
        self._raw = RequestFingerprint(method, path, query, content_type)
        self._parts = MultipartDigest(boundary)

    def update(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._raw.update(chunk)
        self._parts.update(chunk)

    def digest(self) -> bytes:
        """Return the fingerprint as it is stored."""
        parts = self._parts.digest()
        if parts is None:
            return self._raw.digest()
        return seal(Method.MULTIPART, hashlib.sha256(self._head + parts).digest())


class _BufferedFingerprint:
    """Keeps the body, for a callable that wants all of it; the caller's body limit bounds it."""

    __slots__ = ("_chunks", "_finish")

    def __init__(self, finish: Callable[[bytes], bytes]) -> None:
        self._chunks: list[bytes] = []
        self._finish = finish

    def update(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def digest(self) -> bytes:
        return self._finish(b"".join(self._chunks))


class _JsonFingerprint:
    """Reduces a JSON body to what counts. A body over MAX_JSON, or one that cannot be reduced, is hashed raw."""

    __slots__ = ("_chunks", "_method", "_raw", "_reduce", "_request", "_size")

    def __init__(
        self, method: Method, reduce: Callable[[bytes], bytes | None], request: tuple[str, bytes, bytes, bytes]
    ) -> None:
        self._method = method
        self._reduce = reduce
        self._request = request
        self._chunks: list[bytes] = []
        self._size = 0
        self._raw: Hasher | None = None

    def update(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._size += len(chunk)
        if self._raw is not None:
            self._raw.update(chunk)
        elif self._size <= MAX_JSON:
            self._chunks.append(chunk)
        else:
            self._raw = self._taken_raw(b"".join([*self._chunks, chunk]))
            self._chunks = []

    def digest(self) -> bytes:
        """Return the fingerprint as it is stored."""
        if self._raw is not None:
            return self._raw.digest()
        body = b"".join(self._chunks)
        reduced = self._reduce(body)
        if reduced is None:
            return self._taken_raw(body).digest()
        return seal(self._method, hashlib.sha256(_head(self._method, *self._request) + reduced).digest())

    def _taken_raw(self, body: bytes) -> Hasher:
        hasher = raw.begin(*self._request)
        hasher.update(body)
        return hasher


# --- Strategies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Raw:
    """Every byte counts, except a multipart body's boundary."""

    def begin(self, method: str, path: bytes, query: bytes, content_type: bytes) -> Hasher:
        """Return a hasher for the body of one request."""
        if content_type[:10].lower() == _MULTIPART:
            boundary = _boundary(content_type)
            if boundary is not None:
                return MultipartFingerprint(method, path, query, content_type, boundary)
        return RequestFingerprint(method, path, query, content_type)


@dataclass(frozen=True, slots=True)
class CanonicalJson:
    """JSON bodies count by their value (RFC 8785), others by their bytes."""

    def begin(self, method: str, path: bytes, query: bytes, content_type: bytes) -> Hasher:
        """Return a hasher for the body of one request."""
        return _begin_json(Method.JSON, canonical_json, (method, path, query, content_type))


@dataclass(frozen=True, slots=True)
class Fields:
    """Only the values at these JSON Pointers count in a JSON body; other bodies count by their bytes."""

    pointers: tuple[str, ...]

    def begin(self, method: str, path: bytes, query: bytes, content_type: bytes) -> Hasher:
        """Return a hasher for the body of one request."""
        return _begin_json(
            Method.FIELDS, lambda body: selected_fields(body, self.pointers), (method, path, query, content_type)
        )


@dataclass(frozen=True, slots=True)
class Custom:
    """Only what a callable returns for the whole request counts."""

    function: CustomFingerprint

    def begin(self, method: str, path: bytes, query: bytes, content_type: bytes) -> Hasher:
        """Return a hasher for the body of one request."""

        def finish(body: bytes) -> bytes:
            answer = self.function(Request(method, path, query, content_type, body))
            if not isinstance(answer, bytes | str):
                kind = type(answer).__name__
                raise ConfigurationError(f"The fingerprint callable returned {kind}; return bytes or str.")
            encoded = b"b" + answer if isinstance(answer, bytes) else b"s" + answer.encode("utf-8", "surrogatepass")
            return seal(Method.CUSTOM, hashlib.sha256(_tag(Method.CUSTOM) + encoded).digest())

        return _BufferedFingerprint(finish)


raw = Raw()
json = CanonicalJson()


def fields(*pointers: str) -> Fields:
    """Return the strategy that compares only the values at these JSON Pointers, such as "/amount"."""
    if not pointers:
        raise ConfigurationError('fields() needs at least one JSON Pointer, such as "/amount".')
    for pointer in pointers:
        if _POINTER.fullmatch(pointer) is None:
            raise ConfigurationError(f'{pointer!r} is not a JSON Pointer (RFC 6901); write "/amount" or "/items/0/id".')
    return Fields(tuple(sorted(set(pointers))))


def strategy_for(option: object) -> Strategy:
    """Return the strategy that a `fingerprint=` option names: a strategy, or a callable of the request."""
    if not isinstance(option, type) and option is not fields:
        if callable(getattr(option, "begin", None)):
            strategy: Strategy = option  # type: ignore[assignment]  # checked structurally on the line above
            return strategy
        if callable(option) and not iscoroutinefunction(option):
            return Custom(option)
    raise ConfigurationError(
        "fingerprint= takes raw (the default), json or fields(...) of retryproof.core.fingerprint, "
        "or a callable of the request, which is not async."
    )


def _begin_json(
    method: Method, reduce: Callable[[bytes], bytes | None], request: tuple[str, bytes, bytes, bytes]
) -> Hasher:
    """Return a hasher that reduces JSON bodies, and hashes other bodies raw."""
    return _JsonFingerprint(method, reduce, request) if _is_json(request[3]) else raw.begin(*request)


# --- Parts ----------------------------------------------------------------------------------------------------------

_POINTER = re.compile(r"(?:/(?:[^/~]|~[01])*)*", re.DOTALL)
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_PARAMETER = re.compile(rb';[ \t]*(?:([^\s;="]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*)))?[ \t]*', re.DOTALL)


def _tag(method: Method) -> bytes:
    return b"retryproof fingerprint %d.%d\n" % (VERSION, method)


def _raw_hash(method: str, path: bytes, query: bytes, content_type: bytes) -> "hashlib._Hash":
    """Return the hash that a raw fingerprint begins with.

    It is a copy of one that is cached if path, query and media type, which callers choose, are short.
    """
    short = len(path) + len(query) + len(content_type) <= REMEMBERED
    return (_raw_head if short else _raw_head.__wrapped__)(method, path, query, content_type).copy()


@lru_cache(maxsize=128)  # apps have few routes
def _raw_head(method: str, path: bytes, query: bytes, content_type: bytes) -> "hashlib._Hash":
    """The hash that raw fingerprints of a route begin with; to be copied, not updated."""
    return hashlib.sha256(_head(Method.RAW, method, path, query, content_type))


def _head(kind: Method, method: str, path: bytes, query: bytes, content_type: bytes) -> bytes:
    name = method.encode("utf-8", "surrogatepass")
    return _tag(kind) + _frame(name, path, query, canonical_media_type(content_type))


def _frame(*parts: bytes) -> bytes:
    return b"".join([b"%d:%b" % (len(part), part) for part in parts])


def _counts(name: bytes, multipart: bool) -> bool:
    return name != b"boundary" if multipart else name == b"charset"


def _parse_content_type(content_type: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return media type and parameters, names in lower case; a malformed one as a whole, without parameters."""
    media_type, semicolon, rest = content_type.partition(b";")
    parameters: list[tuple[bytes, bytes]] = []
    remaining = semicolon + rest.rstrip(b" \t")
    at = 0
    while at < len(remaining):
        match = _PARAMETER.match(remaining, at)
        if match is None:
            return content_type.strip(b" \t").lower(), []
        at = match.end()
        name, quoted, token = match.groups()
        if name is not None:
            value = token if quoted is None else re.sub(rb"\\(.)", rb"\1", quoted, flags=re.DOTALL)
            lowered = name.lower()
            parameters.append((lowered, value.lower() if lowered == b"charset" else value))
    return media_type.strip(b" \t").lower(), parameters


def _boundary(content_type: bytes) -> bytes | None:
    _, parameters = _parse_content_type(content_type)
    boundaries = [value for name, value in parameters if name == b"boundary"]
    return boundaries[0] if len(boundaries) == 1 else None


def _is_json(content_type: bytes) -> bool:
    media_type, parameters = _parse_content_type(content_type)
    # In another charset, the same bytes are another text.
    if any(value not in (b"utf-8", b"utf8") for name, value in parameters if name == b"charset"):
        return False
    return media_type == b"application/json" or media_type.endswith(b"+json")


def _select(document: Json, pointer: str) -> list[Json]:
    """Return what `pointer` selects in a list, or an empty list if it selects nothing."""
    value = document
    for escaped in pointer.split("/")[1:]:
        name = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and _INDEX.fullmatch(name) and int(name) < len(value):
            value = value[int(name)]
        else:
            return []
    return [value]
