"""The fingerprint of a function's arguments (F3).

Arguments become canonical JSON in which every value keeps its type. A value that JSON has no form for becomes an object
with one name that starts with "$". If a caller's own name starts with "$", that "$" is doubled. So different values
have different forms, except 1 and 1.0, and lists, tuples and named tuples of equal items.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import cast
from uuid import UUID

from retryproof.core.canonical import Json, serialise
from retryproof.core.errors import ConfigurationError
from retryproof.core.fingerprint import VERSION, Method, seal


def arguments(values: Mapping[str, object]) -> bytes:
    """Return the fingerprint of named arguments; raise ConfigurationError, with its name, if one has no stable form."""
    plain: dict[str, Json] = {}
    for name, value in values.items():
        try:
            plain[name] = _plain(value)
            serialise(plain[name], errors="surrogatepass")
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"The argument {name!r} cannot be fingerprinted: {error}. "
                "Select the arguments that count, or pass plain values or dataclasses."
            ) from error
    tag = b"retryproof fingerprint %d.%d\n" % (VERSION, Method.ARGUMENTS)
    return seal(Method.ARGUMENTS, hashlib.sha256(tag + serialise(plain, errors="surrogatepass")).digest())


class _NoStableForm(ValueError):
    """A value of a type whose form may differ between two calls."""


def _plain(value: object) -> Json:
    if isinstance(value, Enum):
        return {"$enum": [type(value).__qualname__, value.name]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, set | frozenset):
        return {"$set": _sorted([_plain(item) for item in value])}
    if is_dataclass(value) and not isinstance(value, type):
        members = {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.compare}
        return {"$dataclass": [type(value).__qualname__, cast("Json", members)]}
    return _plain_scalar(value)


def _plain_scalar(value: object) -> Json:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, datetime | date | time):
        kind = "datetime" if isinstance(value, datetime) else "date" if isinstance(value, date) else "time"
        return {f"${kind}": value.isoformat()}
    if isinstance(value, timedelta):
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, Decimal):
        return {"$decimal": str(value)}
    if isinstance(value, UUID):
        return {"$uuid": str(value)}
    raise _NoStableForm(f"{type(value).__qualname__} has no stable form")


def _plain_mapping(value: Mapping[object, object]) -> Json:
    if all(isinstance(name, str) and not isinstance(name, Enum) for name in value):
        named = cast("Mapping[str, object]", value)
        return {f"${name}" if name.startswith("$") else name: _plain(item) for name, item in named.items()}
    return {"$map": _sorted([[_plain(name), _plain(item)] for name, item in value.items()])}


def _sorted(items: list[Json]) -> list[Json]:
    return sorted(items, key=lambda item: serialise(item, errors="surrogatepass"))
