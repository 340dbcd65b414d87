"""Records for people and programs: never with a key, which no record contains (C11)."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from retryproof.core.codec import JsonCodec, decode_response, decode_value
from retryproof.core.errors import Unreadable
from retryproof.core.fingerprint import Method, version_of
from retryproof.core.keys import short_digest
from retryproof.core.record import MICROSECONDS, Record, State

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(microseconds: int) -> str:
    """A time of the store's clock as ISO 8601 in UTC; a time outside the calendar as a number."""
    try:
        time = EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        return f"{microseconds} µs"
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def abandoned(record: Record) -> bool:
    """No attempt holds it, and one died or said that its outcome is unknown; a later one may have failed cleanly."""
    if record.state is State.RELEASED:
        return record.attempt > 1 or record.committed
    return record.state is State.IN_PROGRESS and not record.live(record.read_at)


def state_of(record: Record) -> str:
    """One word. `abandoned`: nobody knows whether it happened, and no attempt is running."""
    return "abandoned" if abandoned(record) else record.state.name.lower()


def as_document(record: Record) -> dict[str, Any]:
    """A record for `--json`; times in ISO 8601, durations in seconds."""
    return {
        "digest": short_digest(record.id),
        "id": record.id.hex(),
        "state": state_of(record),
        "attempt": record.attempt,
        "deaths": record.deaths,
        "first_seen": moment(record.first_seen),
        "lease_left": max(0.0, (record.lease_until - record.read_at) / MICROSECONDS) if not record.settled else 0.0,
        "expires_at": moment(record.expires_at),
        "retention": record.retention,
        "fingerprint": algorithm(record.fingerprint),
        "tenant": record.tenant.hex(),
        "trace": record.trace,
    }


def algorithm(fingerprint: bytes) -> str:
    """The method of the fingerprint, without the fingerprint itself."""
    try:
        version, method = version_of(fingerprint)
    except Unreadable:
        return f"unknown ({fingerprint[:2].hex()})"
    return f"{Method(method).name.lower()} v{version}" if version else "none"


def result_of(record: Record) -> dict[str, Any]:
    """The stored result, decoded if it is a response or JSON, otherwise as base64."""
    data = record.result
    if data is None:
        return {"kind": "omitted" if record.state is State.TOMBSTONE else "none"}
    try:
        response = decode_response(data)
    except Unreadable:
        return _value(data)
    return {
        "kind": "response",
        "status": response.status,
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in response.headers],
        "omitted": response.omitted,
        **_text_or_base64(response.body, "body"),
    }


def _value(data: bytes) -> dict[str, Any]:
    try:
        return {"kind": "value", "value": decode_value(JsonCodec(), data)}
    except Unreadable as error:
        return {"kind": "unreadable", "why": error.message, "base64": base64.b64encode(data).decode()}


def _text_or_base64(data: bytes, name: str) -> dict[str, str]:
    try:
        return {name: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def pretty(document: object) -> str:
    """JSON for people, in ASCII, so that a terminal executes none of it."""
    return json.dumps(document, indent=2, default=str)
