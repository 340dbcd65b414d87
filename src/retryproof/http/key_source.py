"""Where a request's key is: in a header, in a field of its JSON body, or where a callable finds it (H2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

from retryproof.core.errors import ConfigurationError, InvalidKey
from retryproof.core.keys import Strength, check_key, parse_key
from retryproof.http.request import HttpRequest

FindKey: TypeAlias = Callable[[Mapping[str, Any]], str | None]
"""A callable of the ASGI scope that returns the key, or None if there is none."""

_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_OBJECT = re.compile(rb"[\s\x00\xef\xbb\xbf\xfe\xff]*\{")
"""How a JSON object begins, in any encoding of JSON."""

MAX_DOCUMENT = 1024 * 1024
"""A larger JSON body is not searched for a key; the request is refused."""


@dataclass(frozen=True, slots=True)
class HeaderKey:
    """The key is in this header; quoted and bare spellings name the same key unless `strict`."""

    name: bytes
    strict: bool = False

    @property
    def place(self) -> str:
        """Where clients put the key, in words."""
        return f"the header {self.name.decode()}"

    def find(self, request: HttpRequest, strength: Strength) -> str | None:
        """The key in the header's lines, None where it has none; raises InvalidKey."""
        lines = request.key_lines
        return parse_key(lines, strict=self.strict, strength=strength) if lines else None


@dataclass(frozen=True, slots=True)
class JsonFieldKey:
    """The key is a string in the JSON object that the body is."""

    field: str

    @property
    def place(self) -> str:
        """Where clients put the key, in words."""
        return f"the field {self.field!r} of the body"

    def find_in(self, body: bytes, strength: Strength) -> str | None:
        """The key in the body, None where the body has no such field; raises InvalidKey."""
        if len(body) > MAX_DOCUMENT:
            if _OBJECT.match(body) is None:  # an upload, say
                return None
            raise InvalidKey(f"The body is over {MAX_DOCUMENT} bytes, too large to look for {self.field!r} in it.")
        try:
            document = json.loads(body, object_pairs_hook=_only_once(self.field))
        except (ValueError, RecursionError):
            return None  # the app says what is wrong with it
        if not isinstance(document, dict) or document.get(self.field) is None:
            return None
        return check_key(document[self.field], strength=strength)


@dataclass(frozen=True, slots=True)
class CallableKey:
    """The key is what a callable of the ASGI scope returns."""

    function: FindKey

    @property
    def place(self) -> str:
        """Where clients put the key, in words."""
        return "its place in the request"

    def find(self, request: HttpRequest, strength: Strength) -> str | None:
        """The key, None where the callable finds none; raises InvalidKey."""
        key = self.function(request.context)
        return None if key is None else check_key(key, strength=strength)


KeySource: TypeAlias = HeaderKey | JsonFieldKey | CallableKey


def json_field(name: str) -> JsonFieldKey:
    """The key is the string under this name in a JSON body, as Square's `idempotency_key`.

    Then the body of every request with a covered method has to be read to find out whether it has a key.
    """
    given: object = name
    if not isinstance(given, str) or not name:
        raise ConfigurationError(f"json_field({name!r}): give the name of a field.")
    return JsonFieldKey(name)


def key_source_for(option: str | JsonFieldKey | FindKey, *, strict: bool) -> KeySource:
    """The source that a `key=` option names."""
    if isinstance(option, str) and _FIELD_NAME.fullmatch(option):
        return HeaderKey(option.lower().encode("ascii"), strict)
    if strict:
        raise ConfigurationError(
            "strict=True is about the spelling of a header; leave it out for another source of keys."
        )
    if isinstance(option, JsonFieldKey):
        return option
    if callable(option) and not iscoroutinefunction(option):
        return CallableKey(option)
    raise ConfigurationError(
        f"key={option!r} must be a header's name, json_field(…), or a callable of the ASGI scope, not async, "
        "that returns the key."
    )


def _only_once(field: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An object hook that refuses an object with the field twice: which of the two would be the key?"""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == field for name, _ in pairs) > 1:
            raise InvalidKey(f"The body has the field {field!r} more than once.")
        return dict(pairs)

    return build
