"""The result that an operator gives an operation: a response or a value."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

import click

from retryproof.core.codec import JsonCodec, StoredResponse, Unencodable, encode_response, encode_value
from retryproof.http.semantics import kept_headers

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~\x80-\xff]*")
SHAPE = (
    'A response is {"status": 201, "headers": [["content-type", "application/json"]], and one of "json": …, '
    '"body": "text", "body_base64": "…"}; only status is required'
)


def value(text: str) -> bytes:
    """A function's result from JSON, as it is stored."""
    return _encoded(lambda: encode_value(JsonCodec(), _json(text, "--value")))


def response(text: str) -> bytes:
    """An HTTP response from its JSON form, as it is stored."""
    given = _json(text, "--response")
    if not isinstance(given, dict) or set(given) - {"status", "headers", "json", "body", "body_base64"}:
        raise click.UsageError(f"{SHAPE}.")
    status = given.get("status")
    if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599:
        raise click.UsageError(f"The status must be a number from 200 to 599. {SHAPE}.")
    body, kind = _body(given)
    headers = _headers(given.get("headers", []))
    if kind and not any(name.lower() == b"content-type" for name, _ in headers):
        headers.append((b"content-type", kind))
    stored = StoredResponse(status, tuple(kept_headers(headers)), body)
    return _encoded(lambda: encode_response(stored))


def status_only(status: int) -> bytes:
    """A response without a body."""
    return encode_response(StoredResponse(status, (), b""))


def _body(given: dict[str, Any]) -> tuple[bytes, bytes]:
    kinds = [name for name in ("json", "body", "body_base64") if name in given]
    if len(kinds) > 1:
        raise click.UsageError(f"A response has one body. {SHAPE}.")
    if kinds == ["json"]:
        return json.dumps(given["json"], separators=(",", ":"), ensure_ascii=False).encode(), b"application/json"
    text = given[kinds[0]] if kinds else ""
    if not isinstance(text, str):
        raise click.UsageError(f"The body must be a string. {SHAPE}.")
    if kinds == ["body_base64"]:
        try:
            return base64.b64decode(text, validate=True), b""
        except binascii.Error as error:
            raise click.UsageError(f"body_base64 is not base64: {error}.") from error
    return text.encode(), b""


def _headers(given: object) -> list[tuple[bytes, bytes]]:
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list):
        raise click.UsageError(f"headers must be a list of pairs. {SHAPE}.")
    headers = []
    for pair in pairs:
        match tuple(pair) if isinstance(pair, list | tuple) else ():
            case (str(name), str(content)) if _NAME.fullmatch(name) and _VALUE.fullmatch(content):
                headers.append((name.encode("ascii"), content.encode("latin-1")))
            case _:
                raise click.UsageError(f"{pair!r} is no header. {SHAPE}.")
    return headers


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} is not JSON: {error}.") from error


def _encoded(encode: Any) -> bytes:
    try:
        data: bytes = encode()
    except Unencodable as error:
        raise click.UsageError(f"The result cannot be stored: {error}.") from error
    return data
