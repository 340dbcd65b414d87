"""Events: one for every outcome of an operation (O3).

A listener is a callable that takes an event. It is called where the outcome is known, possibly from the keeper's
thread. It must not block, and it cannot change the outcome: an exception that it raises is only logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

logger = logging.getLogger("retryproof")


class Kind(StrEnum):
    """What happened."""

    __hash__ = str.__hash__  # that of Enum is written in Python, and tables are read by kind for every operation

    FRESH = "fresh"
    """An attempt ran and its result is stored."""
    REPLAYED = "replayed"
    """A stored result was returned again."""
    IN_PROGRESS = "in_progress"
    """A duplicate found a running attempt."""
    MISMATCH = "mismatch"
    """A key was used again with other input."""
    ABANDONED = "abandoned"
    """An attempt had died, and the policy refuses another one."""
    FAILED = "failed"
    """An attempt raised and was released."""
    UNKNOWN = "unknown"
    """An attempt ended without saying whether it had its effect; its record stays in progress."""
    LEASE_LOST = "lease_lost"
    """An attempt was overtaken by another."""
    OVERRUN = "overrun"
    """An attempt ran past `max_run`; its lease is no longer renewed."""
    UNSTORED = "unstored"
    """A caller got its result before it could be stored (C10); storing continues in the background."""
    STORED_LATE = "stored_late"
    """A result that was unstored is stored now."""
    NEVER_STORED = "never_stored"
    """A caller has a result that is not stored: another attempt took over meanwhile, or the record is gone."""
    STORE_ERROR = "store_error"
    """The store gave no answer."""
    UNPROTECTED = "unprotected"
    """A handler ran without protection, since the store was out of reach and the route has `fail_open`."""
    UNREADABLE = "unreadable"
    """A record in a format that this version cannot read."""
    WEAK_KEY = "weak_key"
    """A key was refused as too weak."""
    EVICTED = "evicted"
    """An operator evicted a record, or its unsettled retention ended."""
    SETTLED = "settled"
    """An operator settled a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One outcome.

    digest: names the operation (16 hex digits), or "" before it is known. where: the endpoint or function, "" if none.
    seconds: how long the attempt took. trace: the trace context of the attempt that ran, where it was recorded.
    """

    kind: Kind
    digest: str = ""
    where: str = ""
    attempt: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    trace: str = ""
    note: str = ""


Listener = Callable[[Event], None]


@runtime_checkable
class Traces(Protocol):
    """A listener that knows the current trace context; a first claim records it."""

    def current_trace(self) -> str:
        """A W3C traceparent, or "" for none."""


def tracing(listeners: Sequence[object]) -> Traces | None:
    """The first listener that knows the current trace."""
    return next((listener for listener in listeners if isinstance(listener, Traces)), None)


def recorded_trace(source: Traces, given: str) -> str:
    """The trace that a claim records: the current one, or else the caller's (from a request's header)."""
    try:
        return source.current_trace() or given
    except Exception:
        logger.exception("A listener could not tell the current trace.")
        return given


def wants_of(listeners: Sequence[Listener]) -> tuple[Callable[[Kind], bool] | None, ...]:
    """Which kinds of events each listener wants; None for a listener that wants all.

    If a listener has `wants(kind)`, it is called before an event is made.
    """
    return tuple(getattr(listener, "wants", None) for listener in listeners)


def tell(listeners: Sequence[Listener], event: Event) -> None:
    """Call all listeners; log their exceptions."""
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("A listener failed on %s of operation %s.", event.kind, event.digest)
