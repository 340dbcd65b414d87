"""Who a key belongs to: the choice that every app makes once, so that no caller meets another's record (H5).

    scope=by_user                   what the authentication before the layer established
    scope=by_header("x-api-key")    a long-lived credential
    scope=single_tenant             one caller, or callers that may see each other's responses
    scope=lambda scope: …           an identity, or None for a caller that has none

A caller without an identity is anonymous: apart from all that have one, and only with strong keys, which nobody else
can guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from retryproof.core.errors import ConfigurationError

AsgiScope: TypeAlias = Mapping[str, Any]
Identity: TypeAlias = str | bytes | None
Identify: TypeAlias = Callable[[Any], Identity]
"""A callable of the request (the ASGI scope) that returns who is calling; None is nobody in particular."""

CHOICES = (
    "scope= says whom a key belongs to, and has no default, so that no caller ever meets another's record. Choose: "
    "by_user (the user that your authentication, placed before this layer, established), "
    'by_header("x-api-key") (a long-lived credential), '
    "single_tenant (one caller, or callers that may see each other's responses), "
    "or a callable of the request, not async, that returns an identity, or None for an anonymous caller. "
    "The first three are in retryproof.http."
)

_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_IDENTITY_NAMES = ("identity", "id", "pk", "sub", "username")


def by_user(scope: AsgiScope) -> Identity:
    """The user in `scope["user"]`, as Starlette's and most other authentication middleware leave it there.

    Read from it are, first found: the user itself when it is a string, `identity`, `id`, `pk`, `sub`, `username`, as
    attributes or names in a mapping. What is not the user itself counts with its class and its type, as in
    "shop.models.Customer int 42": a member of the staff with the number 42 is somebody else, and so is "42". Renaming
    the class makes keys of before unseen; a callable of your own can name users as you like.
    No user, or one that is not authenticated, is anonymous. Raises ConfigurationError for a user that has none of
    these: two users would look alike.
    """
    user = scope.get("user")
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
    """The value of a header that holds a long-lived credential, such as an API key; without it, anonymous.

    A token that rotates makes a retry under the new token unseen: it would run again. Use `by_user` or a callable
    there.
    """
    given: object = name
    if not isinstance(given, str) or not _FIELD_NAME.fullmatch(name):
        raise ConfigurationError(f"by_header({name!r}): not a header's name.")
    wanted = name.lower().encode("ascii")

    def identify(scope: AsgiScope) -> Identity:
        # Several lines stay one identity of their own: a server may read either of them. Values hold no line breaks.
        return b"\n".join([value for found, value in scope["headers"] if found == wanted]) or None

    return identify


def single_tenant(scope: AsgiScope) -> Identity:
    """Everybody is the same caller: whoever knows a key gets its response."""
    return "single tenant"


def check_scope(option: object) -> Identify:
    """The callable behind a `scope=` option; ConfigurationError names the choices when it was left out."""
    if not callable(option) or option is by_header or iscoroutinefunction(option):
        raise ConfigurationError(CHOICES)
    return option
