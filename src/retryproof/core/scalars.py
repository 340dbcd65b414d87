"""The simplest values of converters: plain JSON, and scalars that are written as JSON strings."""

from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from math import isfinite
from operator import is_
from typing import Any, NamedTuple, get_args
from uuid import UUID


class Unencodable(ValueError):
    """The value cannot be stored and given back unchanged; the operation becomes a tombstone (C17)."""


class Unfit(ValueError):
    """A stored JSON value does not fit the annotation."""


class Converter(NamedTuple):
    """`encode` makes a plain JSON value or raises Unencodable; `decode` takes it back or raises any Exception."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def expect(kind: type, value: Any) -> Any:
    """Return a value of exactly this type; raise Unencodable for others."""
    if type(value) is not kind:
        raise Unencodable(f"{name_of(type(value))} where {name_of(kind)} is annotated")
    return value


def fit(kind: type, value: Any) -> Any:
    """Return a stored JSON value of exactly this type; raise Unfit for others."""
    if type(value) is not kind:
        raise Unfit(f"not a {kind.__name__}")
    return value


def name_of(annotation: Any) -> str:
    """Return what an annotation is called in messages and in stored unions."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__qualname__
    return str(annotation)


# --- Plain JSON -----------------------------------------------------------------------------------------------------


MAX_DEPTH = 256
"""How deep lists and objects of plain JSON may be nested: every reader must be able to read them, even with a deep call
stack."""


def _plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a plain JSON value as every caller gets it: unchanged, or with lists in place of its tuples (C16).

    Raises Unencodable for all others.
    """
    kind = type(value)
    if kind is dict and depth > 0:  # first, since most results are one
        plain = value
        for name, item in value.items():
            if type(name) is not str:
                raise Unencodable(f"a dict with a name of type {name_of(type(name))} is not JSON")
            kind = type(item)
            if kind is str or kind is int or kind is bool or item is None:
                continue
            kept = _plain(item, depth - 1)
            if kept is not item:
                plain = dict(value) if plain is value else plain
                plain[name] = kept
        return plain
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return _finite(value)
    if kind is list and depth > 0:
        items = [_plain(item, depth - 1) for item in value]
        return value if all(map(is_, items, value)) else items
    if kind is tuple and depth > 0:
        return [_plain(item, depth - 1) for item in value]
    if depth == 0:
        raise Unencodable(f"plain JSON may have {MAX_DEPTH} lists and objects in each other, and this has more")
    name = name_of(kind)
    raise Unencodable(f"{name} is not plain JSON; pass codec=codec_for({name}), or annotate the field that holds it")


def _finite(value: float) -> float:
    if not isfinite(value):
        raise Unencodable("NaN and infinities are not JSON")
    return value


def unchanged(value: Any) -> Any:
    """Return the value."""
    return value


# --- Scalars --------------------------------------------------------------------------------------------------------


def _exactly(*kinds: type) -> Converter:
    """Return the converter of JSON's own types, which only checks."""

    def encode(value: Any) -> Any:
        if type(value) not in kinds:
            raise Unencodable(f"{name_of(type(value))} where {name_of(kinds[0])} is annotated")
        return _finite(value) if type(value) is float else value

    def decode(value: Any) -> Any:
        if type(value) not in kinds:
            raise Unfit(f"not {name_of(kinds[0])}")
        return value

    return Converter(encode, decode)


def as_text(kind: type, to_text: Callable[[Any], str], from_text: Callable[[str], Any]) -> Converter:
    """Return the converter of a type that is written as a JSON string."""

    def encode(value: Any) -> str:
        if type(value) is not kind:
            raise Unencodable(f"{name_of(type(value))} where {name_of(kind)} is annotated")
        return to_text(value)

    def decode(value: Any) -> Any:
        if type(value) is not str:
            raise Unfit(f"not {name_of(kind)}")
        return from_text(value)

    return Converter(encode, decode)


def _decimal_to_text(value: Decimal) -> str:
    if not value.is_finite():
        raise Unencodable("NaN and infinities are not JSON")
    return str(value)


def _timedelta_to_text(value: timedelta) -> str:
    return f"{value.days} {value.seconds} {value.microseconds}"


def _timedelta_from_text(text: str) -> timedelta:
    days, seconds, microseconds = text.split(" ")
    return timedelta(int(days), int(seconds), int(microseconds))


SCALARS: dict[object, Converter] = {
    Any: Converter(_plain, unchanged),
    object: Converter(_plain, unchanged),
    None: _exactly(type(None)),
    type(None): _exactly(type(None)),
    bool: _exactly(bool),
    int: _exactly(int),
    # An int is a float to type checkers; it comes back as the int it was.
    float: _exactly(float, int),
    str: _exactly(str),
    bytes: as_text(bytes, lambda value: b64encode(value).decode("ascii"), lambda text: b64decode(text, validate=True)),
    datetime: as_text(datetime, datetime.isoformat, datetime.fromisoformat),
    date: as_text(date, date.isoformat, date.fromisoformat),
    time: as_text(time, time.isoformat, time.fromisoformat),
    timedelta: as_text(timedelta, _timedelta_to_text, _timedelta_from_text),
    Decimal: as_text(Decimal, _decimal_to_text, Decimal),
    UUID: as_text(UUID, str, UUID),
}
