"""Canonical JSON (RFC 8785, JCS): one byte string for all spellings of the same JSON text.

Two texts have the same canonical form only if every reader reads them as the same value. If readers differ (repeated
names, integers above 2^53, numbers that a double cannot represent, lone surrogates, invalid UTF-8), there is no
canonical form, and callers use the raw bytes.
"""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NoReturn, TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

MAX_DEPTH = 128  # far below Python's recursion limit, and above any real payload
MAX_INTEGER = 2**53

_string = json.JSONEncoder(ensure_ascii=False).encode
_ABOVE_SURROGATES = re.compile(r"[\ud800-\uffff\U00010000-\U0010ffff]")


class NotCanonical(ValueError):
    """The text has no canonical form; the message says why."""


def canonical_json(body: bytes) -> bytes | None:
    """Return the canonical form of a JSON text, or None if the raw bytes have to be used."""
    try:
        return serialise(parse(body))
    except NotCanonical:
        return None


def parse(body: bytes) -> Json:
    """Return the value of a JSON text that all readers read in the same way; raise NotCanonical otherwise."""
    try:
        value: Json = _decoder.decode(body.decode("utf-8"))
    except NotCanonical:
        raise
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise NotCanonical(str(error)) from error
    return value


def serialise(value: Json, *, errors: str = "strict") -> bytes:
    """Return the canonical form of a value; integers keep all their digits. Raises NotCanonical.

    `errors` is how lone surrogates are encoded: "strict" refuses them, "surrogatepass" keeps them distinct.
    """
    out: list[str] = []
    try:
        _write(value, out, MAX_DEPTH)
        return "".join(out).encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise NotCanonical("a string contains a lone surrogate") from error
    except RecursionError as error:
        raise NotCanonical("nested too deep for the stack that is left") from error


def format_number(number: float) -> str:
    """Return a finite double as ECMAScript's Number.prototype.toString writes it (RFC 8785, section 3.2.2.3)."""
    if number == 0:
        return "0"
    text = repr(number)
    sign, text = ("-", text[1:]) if text[0] == "-" else ("", text)
    mantissa, _, exponent = text.partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    # The value is 0.<digits> times ten to the `point`.
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    return sign + _place_point(digits.rstrip("0"), point)


def _place_point(digits: str, point: int) -> str:
    count = len(digits)
    if count <= point <= 21:
        return digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    mantissa = digits if count == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{mantissa}e{point - 1:+d}"


def _write(value: Json, out: list[str], depth: int) -> None:
    if isinstance(value, str):
        out.append(_string(value))
    elif value is None:
        out.append("null")
    elif isinstance(value, bool):
        out.append("true" if value else "false")
    elif isinstance(value, int):
        out.append(int.__repr__(value))
    elif isinstance(value, float):
        out.append(format_number(value))
    elif not depth:
        raise NotCanonical(f"nested deeper than {MAX_DEPTH}")
    elif isinstance(value, list):
        _write_array(value, out, depth - 1)
    else:
        _write_object(value, out, depth - 1)


def _write_array(items: list[Json], out: list[str], depth: int) -> None:
    separator = "["
    for item in items:
        out.append(separator)
        _write(item, out, depth)
        separator = ","
    out.append("]" if items else "[]")


def _write_object(members: dict[str, Json], out: list[str], depth: int) -> None:
    separator = "{"
    for name in _in_utf16_order(members):
        out.append(f"{separator}{_string(name)}:")
        _write(members[name], out, depth)
        separator = ","
    out.append("}" if members else "{}")


def _in_utf16_order(names: dict[str, Json]) -> list[str]:
    # Code points and UTF-16 code units have the same order, except for U+E000 to U+FFFF and code points above.
    if any(map(_ABOVE_SURROGATES.search, names)):
        return sorted(names, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
    return sorted(names)


def _object(members: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(members)
    if len(value) != len(members):
        raise NotCanonical("an object repeats a name")
    return value


def _integer(text: str) -> int:
    # 2^53 has 16 digits; the length is checked first because int() is quadratic.
    if len(text) > 17 or abs(number := int(text)) > MAX_INTEGER:
        raise NotCanonical("an integer passes 2^53")
    return number


def _float(text: str) -> float:
    """Return the double for a number's text; raise NotCanonical if a double cannot represent the number."""
    number = float(text)
    size = abs(number)
    if size == float("inf"):
        raise NotCanonical("a number overflows a double")
    # Doubles are written with up to 17 significant digits, which RFC 8785 rounds. With more digits, integers above 2^53
    # and underflow, numbers would become equal that a reader with decimals distinguishes.
    beyond = size >= MAX_INTEGER or size < 1e-300 or _significant_digits(text) > 17
    if beyond and Decimal(text) != Decimal(repr(number)):
        raise NotCanonical("a number has more digits than a double holds")
    return number


def _significant_digits(text: str) -> int:
    return len(text.lower().partition("e")[0].lstrip("-0.").replace(".", ""))


def _constant(text: str) -> NoReturn:
    raise NotCanonical(f"{text} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
