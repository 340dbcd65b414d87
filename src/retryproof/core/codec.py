"""How results are stored in records: a versioned envelope around a response or a value.

Every stored result starts with a version byte and a kind byte. A result that cannot be read (cut off, damaged, of a
later version, written by another codec) raises `errors.Unreadable`; it is never a wrong result.

A response is one packed head, then its bytes. Numbers are big-endian:

    version u8 | kind "R" | flags u8 | status u16 | header count u16 | body length u32
    then per header: name length u16, value length u32
    then names and values in order, then the body

A value is `version u8 | kind "V" | length of the codec's name u8 | name | what the codec wrote`.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, cast

from retryproof.core.convert import converter_for
from retryproof.core.errors import Unreadable
from retryproof.core.scalars import Converter, Unencodable, unchanged
from retryproof.core.value import value as value_class

__all__ = [
    "OMITTED_VALUE",
    "Codec",
    "JsonCodec",
    "StoredResponse",
    "Unencodable",
    "codec_for",
    "decode_response",
    "decode_value",
    "encode_and_replay",
    "encode_response",
    "encode_value",
    "pack_response",
]

VERSION = 1

_RESPONSE = ord("R")
_VALUE = ord("V")
_OMITTED = 1
OMITTED_VALUE = bytes((VERSION, ord("O")))
"""Stands for a value that could not be stored: its step is done, and does not run again (C14)."""

_HEAD = struct.Struct(">BBBHHI")
_LENGTHS = struct.Struct(">HI")


def _layout(count: int) -> struct.Struct:
    """The head of a response with so many headers, and their lengths."""
    return struct.Struct(_HEAD.format + "HI" * count)


_LAYOUTS = tuple(map(_layout, range(64)))
"""That of most responses, by the number of their headers."""


@value_class
class StoredResponse:
    """An HTTP response as it is replayed: names and values byte for byte, in order, repeated names kept.

    `omitted` marks one whose body was not kept.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    omitted: bool = False


def encode_response(response: StoredResponse) -> bytes:
    """Return a response as it is stored; raise Unencodable for what no HTTP response can be."""
    return pack_response(response.status, response.headers, response.body, omitted=response.omitted)


def pack_response(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, *, omitted: bool = False) -> bytes:
    """`encode_response` of the parts of one."""
    if not 100 <= status <= 999:
        raise Unencodable(f"{status} is no status of a response")
    parts: list[bytes] = []
    for header in headers:
        parts += header
    count = len(headers)
    layout = _LAYOUTS[count] if count < len(_LAYOUTS) else _layout(count)
    flags = _OMITTED if omitted else 0
    try:
        head = layout.pack(VERSION, _RESPONSE, flags, status, count, len(body), *map(len, parts))
        return b"".join((head, *parts, body))
    except (struct.error, TypeError) as error:
        raise Unencodable(f"not a response that can be stored: {error}") from error


def decode_response(data: bytes) -> StoredResponse:
    """Return a stored response; raise Unreadable if it is not one, whole and of this version."""
    try:
        version, kind, flags, status, count, body_length = _HEAD.unpack_from(data)
        if version != VERSION or kind != _RESPONSE or flags > _OMITTED or not 100 <= status <= 999:
            raise _unreadable(data, _RESPONSE)
        at = _HEAD.size + _LENGTHS.size * count
        lengths = _LENGTHS.iter_unpack(data[_HEAD.size : at])
    except struct.error as error:
        raise _unreadable(data, _RESPONSE) from error
    headers = []
    for name_length, value_length in lengths:
        middle = at + name_length
        end = middle + value_length
        headers.append((data[at:middle], data[middle:end]))
        at = end
    if at + body_length != len(data):
        raise _unreadable(data, _RESPONSE)
    return StoredResponse(status, tuple(headers), data[at:], flags == _OMITTED)


class Codec(Protocol):
    """Turns results into bytes and back; `decode(encode(value)) == value`.

    `encode` raises Unencodable for a value that it cannot give back faithfully. `name` is stored with each value and
    changes when the format does; it has 1 to 255 ASCII characters.
    """

    @property
    def name(self) -> str:
        """What names the format in the record."""

    def encode(self, value: Any, /) -> bytes:
        """Return the bytes of a value, or raise Unencodable."""

    def decode(self, data: bytes, /) -> Any:
        """Return the value of such bytes."""


def encode_value(codec: Codec, value: object) -> bytes:
    """Return a value as it is stored; raise only Unencodable, if the codec cannot write it."""
    try:
        return _envelope(codec.name) + codec.encode(value)
    except Unencodable:
        raise
    except Exception as error:  # The effect has happened, so every exception of a codec must lead to a tombstone (C17).
        raise Unencodable(f"codec {type(codec).__name__} failed: {_said(error)}") from error


def _said(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an error that cannot be printed
        return type(error).__name__


@lru_cache(maxsize=64)
def _envelope(name: str) -> bytes:
    if not (name.isascii() and 1 <= len(name) <= 255):
        raise Unencodable(f"the codec's name {name!r} is not 1 to 255 ASCII characters")
    return b"%c%c%c%b" % (VERSION, _VALUE, len(name), name.encode("ascii"))


def decode_value(codec: Codec, data: bytes) -> Any:
    """Return a stored value; raise only Unreadable, if this codec did not write it or cannot read it."""
    if len(data) < 3 or data[0] != VERSION or data[1] != _VALUE:
        raise _unreadable(data, _VALUE)
    start = 3 + data[2]
    name = data[3:start].decode("ascii", "replace")
    if name != codec.name:
        raise Unreadable(f"The result was written by codec {name!r}; reading it takes that codec, not {codec.name!r}.")
    try:
        return codec.decode(data[start:])
    except Unreadable:
        raise
    except Exception as error:  # a codec may raise anything for bytes of another one (C21)
        raise Unreadable(
            f"The stored result cannot be read by codec {name!r}: {type(error).__name__}. "
            "Was the annotation changed since it was stored?"
        ) from error


def encode_and_replay(codec: Codec, value: object) -> tuple[bytes, Any]:
    """Return a value as it is stored, and as every caller gets it, also the first one (C16).

    Raises only Unencodable, for a value that the codec cannot write or could not read back.
    """
    if type(codec) is JsonCodec and codec.is_plain:
        # Plain JSON is read back as it was written, so decoding it again is unnecessary.
        value, payload = codec.encode_plain(value)
        return _envelope(codec.name) + payload, value
    data = encode_value(codec, value)
    try:
        return data, decode_value(codec, data)
    except Unreadable as error:
        raise Unencodable(f"codec {codec.name} cannot read back what it wrote") from error


class JsonCodec:
    """JSON, with dataclasses, dates, decimals and so on by an annotation; without one, only plain JSON."""

    name = "json"

    def __init__(self, annotation: object = Any) -> None:
        self._converter: Converter = converter_for(annotation)
        self.is_plain = self._converter.decode is unchanged

    def encode(self, value: Any, /) -> bytes:
        """Return the bytes of a value, or raise Unencodable."""
        return self.encode_plain(value)[1]

    def encode_plain(self, value: Any) -> tuple[Any, bytes]:
        """Return the plain JSON that a value is written as, and its bytes; raise Unencodable where there is none."""
        try:
            plain = self._converter.encode(value)
            return plain, "".join(_chunks(plain, 0)).encode("utf-8", "surrogatepass")
        except Unencodable:
            raise
        except Exception as error:  # as by a thread that changes the result meanwhile (C17)
            raise Unencodable(f"the result cannot be written as JSON: {_said(error)}") from error

    def decode(self, data: bytes, /) -> Any:
        """Return the value of such bytes."""
        return self._converter.decode(json.loads(data.decode("utf-8", "surrogatepass")))


Extension: TypeAlias = Callable[[object], Codec | None]


def codec_for(annotation: object, extensions: Sequence[Extension] = ()) -> Codec:
    """Return the codec for an annotation: the first that an extension offers, or else JSON.

    Raises ConfigurationError, naming the annotation, where there is none.
    """
    for extension in extensions:
        codec = extension(annotation)
        if codec is not None:
            return codec
    return JsonCodec(annotation)


def _chunks_encoder() -> Callable[[Any, int], Iterable[str]]:
    """Writes plain JSON compactly, in parts, with an encoder made once: the json module makes one at each call."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    try:
        # No table of what is being written: a value that holds itself was refused before it came here.
        chunks = make(None, encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, False)
    except TypeError:  # a Python that has none, or another
        return lambda value, _: encoder.iterencode(value)
    return cast(Callable[[Any, int], Iterable[str]], chunks)


_chunks = _chunks_encoder()


def _unreadable(data: bytes, kind: int) -> Unreadable:
    what = "response" if kind == _RESPONSE else "value"
    if data and data[0] != VERSION:
        return Unreadable(f"The stored {what} has version {data[0]}; this release reads {VERSION}. Upgrade to read it.")
    return Unreadable(f"The stored {what} is damaged or cut off, or is no {what} at all.")
