"""Who owns a key: every app makes this choice once, so that no caller sees another's record (H5).

    scope=by_user                   the user that authentication outside the middleware has set
    scope=by_header("x-api-key")    a long-lived credential
    scope=single_tenant             one caller, or callers that may see each other's responses
    scope=lambda scope: …           an identity, or None for a caller that has none
    scope=by_host(by_user)          any of these, separately for each host that the app serves

A caller without an identity is anonymous: separate from all callers with one, and only with strong keys, which nobody
else can guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import iscoroutinefunction
from typing import Any, Literal, TypeAlias, overload
from urllib.parse import quote

from retryproof.core.errors import ConfigurationError
from retryproof.http.request import HttpRequest

AsgiScope: TypeAlias = Mapping[str, Any]
Identity: TypeAlias = str | bytes | None
Identify: TypeAlias = Callable[[Any], Identity]
"""A callable of the request (the ASGI scope) that returns the caller's identity; None is anonymous."""

CHOICES = (
    "scope= says whom a key belongs to, and has no default, so that no caller ever meets another's record. Choose: "
    "by_user (the user that your authentication, placed before this layer, established), "
    'by_header("x-api-key") (a long-lived credential), '
    "single_tenant (one caller, or callers that may see each other's responses), "
    "or a callable of the request, not async, that returns an identity, or None for an anonymous caller. "
    "by_host(…) around one of them keeps several hosts apart. The names are in retryproof.http."
)

_NO_USER = (
    "by_user finds no user in the request: nothing has set scope['user'], signed in or not, so that all callers would "
    "be one. Nothing was run. Put the authentication outside of (before) the idempotency layer; where callers "
    'without a user are meant to be anonymous, pass scope=by_user(absent="anonymous").'
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_IDENTITY_NAMES = ("identity", "id", "pk", "sub", "username")


class Anonymous(str):
    """A caller without an identity, apart from those of other hosts; the empty string is the one without a host."""

    __slots__ = ()


@overload
def by_user(scope: AsgiScope, /) -> Identity: ...


@overload
def by_user(*, absent: Literal["error", "anonymous"]) -> Identify: ...


def by_user(
    scope: AsgiScope | None = None, /, *, absent: Literal["error", "anonymous"] = "error"
) -> Identity | Identify:
    """The user in `scope["user"]`, where Starlette's and most other authentication middleware put it.

    The identity is the first of these: the user itself if it is a string, or its `identity`, `id`, `pk`, `sub` or
    `username`, as attributes or names in a mapping. If it is not the user itself, the user's class and the value's type
    belong to it, as in "shop.models.Customer int 42": a member of the staff with the number 42 is another user, and so
    is "42". If you rename the class, earlier keys count as new; a callable of your own can name users as you like. A
    user of None, or one that is not authenticated, is anonymous.
    absent: if nothing has set a user, signed in or not, this is an error: the authentication is missing, or inside the
    middleware, and all callers would be the same. `by_user(absent="anonymous")` allows it.
    Raises ConfigurationError in that case, and for a user without an identity, since two users would be the same.
    """
    if scope is None:
        given: object = absent
        if given not in ("error", "anonymous"):
            raise ConfigurationError(f"by_user(absent={absent!r}): choose 'error' or 'anonymous'.")
        return by_user if absent == "error" else _by_user_if_any
    if "user" not in scope:
        raise ConfigurationError(_NO_USER)
    return _user_of(scope)


def _by_user_if_any(scope: AsgiScope) -> Identity:
    return _user_of(scope) if "user" in scope else None


def _user_of(scope: AsgiScope) -> Identity:
    user = scope["user"]
    if user is None or getattr(user, "is_authenticated", True) is False:
        return None
    if isinstance(user, str | bytes):
        return user or None
    for name in _IDENTITY_NAMES:
        found = _attribute(user, name)
        if found is not None and found not in ("", b""):
            return _told_apart(user, name, found)
    raise ConfigurationError(
        f"by_user finds none of {', '.join(_IDENTITY_NAMES)} in the user, a {type(user).__name__}; "
        "pass scope=lambda scope: … and return what tells users apart."
    )


def _told_apart(user: object, name: str, found: object) -> str | bytes:
    """An identity with the class of its user, which proxies know, and its own type."""
    kind = user.__class__
    prefix = f"{kind.__module__}.{kind.__qualname__} {type(found).__name__} "
    if isinstance(found, bytes):
        return prefix.encode() + found
    return prefix + (found if isinstance(found, str) else _as_text(name, found))


def _as_text(name: str, identity: object) -> str:
    """An id that is a number, a UUID or the like; not one whose text is an address in memory, new at every request."""
    kind = type(identity)
    if callable(identity) or (kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__):
        raise ConfigurationError(
            f"by_user finds a {kind.__name__} as {name!r} of the user; "
            "pass scope=lambda scope: … and return what tells users apart, as a string."
        )
    return str(identity)


def _attribute(user: Any, name: str) -> Any:
    if isinstance(user, Mapping):
        return user.get(name)
    try:
        return getattr(user, name, None)
    except NotImplementedError:  # what a base class may say for a property that it leaves open
        return None


def by_header(name: str) -> Identify:
    """The value of a header with a long-lived credential, such as an API key; without it, the caller is anonymous.

    If tokens rotate, a retry with a new token counts as new, and would run again. Use `by_user` or a callable then.
    """
    given: object = name
    if not isinstance(given, str) or not _FIELD_NAME.fullmatch(name):
        raise ConfigurationError(f"by_header({name!r}): not a header's name.")
    return ByHeader(name.lower().encode("ascii"))


class ByHeader:
    """`by_header`, of the request as the layer has read it, or of its scope."""

    __slots__ = ("_dashed", "_name")

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._dashed = name.replace(b"_", b"-")  # as an environ has it, which cannot tell the two apart

    def __call__(self, scope: AsgiScope) -> Identity:
        name = self._name_in(scope)
        return _one_of([value for found, value in scope["headers"] if found == name])

    def of(self, request: HttpRequest) -> Identity:
        """The same, without a look at every header."""
        name = self._name
        if name != self._dashed:
            name = self._name_in(request.context)
        return request.headers.get(name) or None if request.once else _one_of(request.lines(name))

    def _name_in(self, scope: AsgiScope) -> bytes:
        return self._dashed if "wsgi.version" in scope else self._name


def _one_of(lines: Sequence[bytes]) -> bytes | None:
    # Several lines stay one identity of their own: a server may read either of them. Values hold no line breaks.
    return (lines[0] if len(lines) == 1 else b"\n".join(lines)) or None


def by_host(identify: Identify) -> Identify:
    """Another choice, separately for each host: for an app that serves several hosts with different users.

    The host is in the `Host` header; it is used in lower case, without a final dot and without the scheme's default
    port. If a proxy rewrites this header, use a callable that reads the host from where the proxy puts it.
    """
    inner = check_scope(identify)

    def identify_at_host(scope: AsgiScope) -> Identity:
        identity: object = inner(scope)
        host = _host(scope)
        if identity is None or identity in ("", b""):
            return Anonymous(host)
        # No host has a space in it, so no other pair reads the same.
        if isinstance(identity, bytes):
            return host.encode("ascii") + b" " + identity
        return f"{host} {identity}" if isinstance(identity, str) else identity  # type: ignore[return-value]  # refused

    return identify_at_host


def _host(scope: AsgiScope) -> str:
    # Several lines stay a host of their own: nobody knows which of them the app reads.
    lines = [value for name, value in scope["headers"] if name == b"host"]
    text = b",".join(lines).decode("latin-1").strip().lower()
    text = text.removesuffix(_DEFAULT_PORTS.get(scope.get("scheme", "http"), "\0"))
    name, colon, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", "")
    return quote(f"{name.removesuffix('.')}{colon}{port}", safe="[]:,-._~")


def single_tenant(scope: AsgiScope) -> Identity:
    """All callers are the same one: everyone who knows a key gets its response."""
    return "single tenant"


def check_scope(option: object) -> Identify:
    """The callable behind a `scope=` option; ConfigurationError names the choices when it was left out."""
    if not callable(option) or option in (by_header, by_host) or iscoroutinefunction(option):
        raise ConfigurationError(CHOICES)
    return option
