"""Idempotency keys: reading them from a header, judging their strength, turning them into record ids.

A key comes as a Structured Field String (``"k"``, RFC 8941) or as the bare token that most vendors use; both name the
same key. A bare token is any run of visible ASCII characters without ``"``, ``,``, ``;`` and ``\\``. These four
characters, and blanks inside, are refused: a proxy joins two field lines with a comma, a semicolon starts parameters,
and quotes and backslashes mean a broken Structured Field. A client that needs such characters sends the quoted form. So
two forms are read as one key only if they are the same text, and no value can be read in two ways.

Messages never contain the key (C11).
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from retryproof.core.errors import InvalidKey

Strength = Literal["any", "strong"]

MAX_LENGTH = 255

_BARE = re.compile(rb"[!#-+\--:<-\[\]-~]+")
_QUOTED = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPE = re.compile(r'\\(["\\])')

# RFC 8941 section 3.1.2, and the two value types that RFC 9651 added (dates, display strings).
_PARAMETERS = re.compile(
    rb"""(?:
        ;[ ]*[a-z*][a-z0-9_.*-]*
        (?:=(?:
            -?[0-9]{1,12}\.[0-9]{1,3}
          | -?[0-9]{1,15}
          | "(?:[ !#-\[\]-~]|\\["\\])*"
          | [A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*
          | :[A-Za-z0-9+/=]*:
          | \?[01]
          | @-?[0-9]{1,15}
          | %"(?:[ !#$&-~]|%[0-9a-f]{2})*"
        ))?
    )*""",
    re.VERBOSE,
)


def parse_key(field_lines: Sequence[bytes], *, strict: bool = False, strength: Strength = "any") -> str:
    """Return the key in a request's Idempotency-Key field lines (raw values, one per line).

    Raises InvalidKey unless there is exactly one well-formed key; `strict` accepts only the quoted form.
    """
    if len(field_lines) != 1:
        found = "has no Idempotency-Key line" if not field_lines else "has several Idempotency-Key lines"
        raise InvalidKey(f"The request {found}; send the header exactly once.")
    value = field_lines[0].strip(b" \t")
    if not strict and _BARE.fullmatch(value) is not None:
        key = value.decode("ascii")  # printable, as the pattern says
        return key if strength == "any" and len(key) <= MAX_LENGTH else check_key(key, strength=strength)
    if value.startswith(b'"'):
        return check_key(_unquote(value), strength=strength)
    if not value:
        raise InvalidKey("The key is empty; send 1 to 255 printable ASCII characters, such as a UUIDv4.")
    if strict:
        raise InvalidKey('The key is not quoted; send it as a Structured Field String: "key", with the quotes.')
    raise InvalidKey(_why_not_bare(value))


def check_key(key: str, strength: Strength = "any") -> str:
    """Return `key` unchanged if it has the required length, characters and strength; raise InvalidKey otherwise."""
    if not isinstance(key, str):
        raise InvalidKey(f"The key is of type {type(key).__name__}, not a string; convert it to a string first.")
    if not key:
        raise InvalidKey("The key is empty; send 1 to 255 printable ASCII characters, such as a UUIDv4.")
    if len(key) > MAX_LENGTH:
        raise InvalidKey(f"The key has {len(key)} characters; send at most {MAX_LENGTH}.")
    if not (key.isascii() and key.isprintable()):
        raise InvalidKey("The key contains control or non-ASCII characters; send printable ASCII only.")
    if strength == "strong":
        weakness = _weakness(key)
        if weakness is not None:
            raise InvalidKey(f"The key {weakness}; send a UUIDv4, UUIDv7, ULID or 22+ random base64url characters.")
    return key


def _unquote(value: bytes) -> str:
    match = _QUOTED.match(value)
    if match is None:
        raise InvalidKey(_why_not_quoted(value))
    rest = value[match.end() :]
    if rest and _PARAMETERS.fullmatch(rest) is None:
        if rest.lstrip(b" \t").startswith(b","):
            raise InvalidKey("The header holds a list; send exactly one key.")
        raise InvalidKey(
            "What follows the quoted key is not a well-formed parameter; send the quoted key alone (RFC 8941)."
        )
    content = match.group(1).decode("ascii")
    return _ESCAPE.sub(r"\1", content) if "\\" in content else content


def _why_not_quoted(value: bytes) -> str:
    if any(byte < 0x20 or byte > 0x7E for byte in value):
        return "The key contains control or non-ASCII characters; send printable ASCII only."
    return 'The quoting is malformed; send "key", with \\" and \\\\ as the only escapes (RFC 8941 String).'


def _why_not_bare(value: bytes) -> str:
    if any(byte < 0x20 or byte > 0x7E for byte in value):
        return "The key contains control or non-ASCII characters; send printable ASCII only."
    if b"," in value:
        return "An unquoted key must not contain a comma (it reads as a list); send one key, or put it in quotes."
    return 'An unquoted key must not contain blanks, quotes, ";" or "\\"; put it in quotes (RFC 8941 String).'


# --- Strength -------------------------------------------------------------------------------------------------------
# Nobody can prove from one sample that a key is random. These tests refuse keys that are plainly not random. Each test
# would refuse a truly random key of its format less than once in ten million.

_UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
_HEX = re.compile(r"[0-9a-f]+")
_ULID = re.compile(r"[0-7][0-9a-hjkmnp-tv-z]{25}")
_BASE64URL = re.compile(r"([A-Za-z0-9_-]+)={0,2}")
_DECIMAL_RUN = re.compile(r"[0-9]{10,}")
_MINIMUM = 22  # characters of base64url: 132 bits


def _weakness(key: str) -> str | None:
    """Say why a key is not strong, as the words that follow "The key"; None if it is."""
    lower = key.lower()
    if _UUID.fullmatch(lower):
        return _uuid_weakness(lower.replace("-", ""))
    if _HEX.fullmatch(lower):
        return _hex_weakness(lower)
    if _ULID.fullmatch(lower):
        return "is a ULID without randomness" if len(set(lower[10:])) < 4 else None
    match = _BASE64URL.fullmatch(key)
    if match is None:
        return "is in none of the formats that are known to be random"
    return _base64url_weakness(match.group(1))


def _uuid_weakness(digits: str) -> str | None:
    version = digits[12]
    if version not in "47" or digits[16] not in "89ab":
        return "is a UUID of a version that is not random (4 and 7 are)"
    # UUIDs of version 7 from the same time have the same first 48 bits; only the rest is random.
    random_part, least = (digits, 6) if version == "4" else (digits[17:], 3)
    return "is a UUID without randomness" if len(set(random_part)) < least else None


def _hex_weakness(digits: str) -> str | None:
    if digits.isdecimal():
        return "is a number (a counter or a timestamp?)"
    if len(digits) < 32:
        return "is hexadecimal with fewer than 122 bits"
    if len(digits) == 32:
        # Only the layout decides, so that a source of such keys is always refused, and not only now and then.
        return "is 32 hexadecimal characters but no UUIDv4 or UUIDv7" if _uuid_weakness(digits) else None
    return _repetition(digits, least_distinct=6)


def _base64url_weakness(text: str) -> str | None:
    if len(text) < _MINIMUM:
        return f"is shorter than {_MINIMUM} characters"
    if sum(not character.isalpha() for character in text) > 0.75 * len(text):
        return "consists mostly of digits (a counter or a timestamp?)"
    if len(_DECIMAL_RUN.sub("", text)) < _MINIMUM <= len(text) and _DECIMAL_RUN.search(text):
        return "contains a counter or a timestamp"
    return _repetition(text, least_distinct=9)


def _repetition(text: str, *, least_distinct: int) -> str | None:
    # A text repeats a shorter one exactly if the text occurs inside two copies of itself.
    if len(set(text)) < least_distinct or text in (text + text)[1:-1]:
        return "repeats itself"
    steps = {ord(after) - ord(before) for before, after in pairwise(text)}
    return "is a plain sequence of characters" if len(steps) == 1 else None


# --- Record ids -----------------------------------------------------------------------------------------------------

REMEMBERED = 512
"""Longer texts of a caller are not cached beside their digests, since they could fill the memory."""


def record_id(scope: Sequence[str | bytes], key: str | bytes, *, pepper: bytes = b"") -> bytes:
    """Return the 32-byte id of the record of `key` in `scope`; with a pepper it cannot be guessed from the key.

    Every part is preceded by its type and length, so that two different pairs never have the same id (C11).
    """
    parts = tuple(scope)
    message = (_frames.get(parts) or _framed(parts)) + _frame(key)
    return hmac.digest(pepper, message, "sha256") if pepper else hashlib.sha256(message).digest()


def tenant_digest(part: str | bytes, *, pepper: bytes = b"") -> bytes:
    """Return the 16 bytes under which all records of one tenant can be purged."""
    digest = _tenant_digest if len(part) <= REMEMBERED else _tenant_digest.__wrapped__
    return digest(part, pepper)


@lru_cache(maxsize=1_024)
def _tenant_digest(part: str | bytes, pepper: bytes) -> bytes:
    message = b"retryproof tenant 1\n" + _frame(part)
    return (hmac.digest(pepper, message, "sha256") if pepper else hashlib.sha256(message).digest())[:16]


def short_digest(record: bytes) -> str:
    """Return the 16 hexadecimal characters that name a record id in logs and messages."""
    return record[:8].hex()


_frames: dict[tuple[str | bytes, ...], bytes] = {}
"""Encoded scopes, cached; emptied when there are many."""


def _framed(scope: tuple[str | bytes, ...]) -> bytes:
    framed = b"".join([b"retryproof record 1\n", *map(_frame, scope)])
    if len(framed) <= REMEMBERED:
        if len(_frames) >= 1_024:
            _frames.clear()
        _frames[scope] = framed
    return framed


def _frame(part: str | bytes) -> bytes:
    if isinstance(part, str):
        # surrogatepass keeps different strings different; surrogateescape would fold '\udcc3\udca9' into 'é'.
        encoded = part.encode("utf-8", "surrogatepass")
        return b"s%d:%b" % (len(encoded), encoded)
    return b"b%d:%b" % (len(part), part)
