"""Events to the standard library's logging, under the name "retryproof"."""

from __future__ import annotations

import logging

from retryproof.observe.events import Event, Kind

logger = logging.getLogger("retryproof")

LEVELS = {
    Kind.FRESH: logging.DEBUG,
    Kind.REPLAYED: logging.DEBUG,
    Kind.IN_PROGRESS: logging.DEBUG,
    Kind.FAILED: logging.DEBUG,
    Kind.STORED_LATE: logging.INFO,
    Kind.MISMATCH: logging.INFO,
    Kind.WEAK_KEY: logging.INFO,
    Kind.EVICTED: logging.INFO,
    Kind.SETTLED: logging.INFO,
    Kind.ABANDONED: logging.WARNING,
    Kind.UNKNOWN: logging.WARNING,
    Kind.LEASE_LOST: logging.WARNING,
    Kind.OVERRUN: logging.WARNING,
    Kind.UNPROTECTED: logging.WARNING,
    Kind.STORE_ERROR: logging.ERROR,
    Kind.UNREADABLE: logging.ERROR,
    Kind.UNSTORED: logging.ERROR,
    Kind.NEVER_STORED: logging.ERROR,
}


class LogListener:
    """Writes one line for an event; ordinary outcomes at DEBUG."""

    def wants(self, kind: Kind) -> bool:
        """Whether the logger's level lets this kind through."""
        return logger.isEnabledFor(LEVELS[kind])

    def __call__(self, event: Event) -> None:
        level = LEVELS[event.kind]
        if not logger.isEnabledFor(level):
            return
        logger.log(
            level,
            "%s operation=%s where=%s attempt=%d seconds=%.3f%s%s",
            event.kind,
            event.digest,
            event.where or "-",
            event.attempt,
            event.seconds,
            f" note={event.note}" if event.note else "",
            f" error={event.error}" if event.error is not None else "",
            extra={"retryproof_event": event},
        )


log_event = LogListener()
"""The default listener of engines."""
