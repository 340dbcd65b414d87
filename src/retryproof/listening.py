"""The events about attempts for an engine's listeners."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.conclusions import event_of, is_outage, kind_of
from retryproof.core.flow import Conclusion, Down
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.drive import clock
from retryproof.observe.events import Event, Kind, Listener, recorded_trace, tell, tracing, wants_of


class Listening:
    """The listeners of one engine. overran, settled: called by the keeper of a hold."""

    __slots__ = ("_traces", "_wants", "listeners", "overran", "settled")

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = tuple(listeners)
        self._traces = tracing(self.listeners)
        self._wants = wants_of(self.listeners)
        self.overran, self.settled = self._overran, self._settled  # bound once, not for each hold

    def trace_of(self, trace: str) -> str:
        """The trace context for a record: the caller's, or that of a listener that traces."""
        return trace if self._traces is None else recorded_trace(self._traces, trace)

    def tell(self, event: Event) -> None:
        """Tell the listeners."""
        tell(self.listeners, event)

    def conclude(
        self, conclusion: Conclusion, id: bytes, where: str, began: float, *, fails_open: bool = False
    ) -> None:
        """Tell the listeners how an attempt ended that began at this time of `drive.clock`."""
        if fails_open and isinstance(conclusion, Down) and is_outage(conclusion):
            self.tell(Event(kind=Kind.UNPROTECTED, digest=short_digest(id), where=where, error=conclusion.error))
            return
        kind = kind_of(conclusion)
        for wants in self._wants:
            if wants is None or wants(kind):
                self.tell(event_of(conclusion, kind, short_digest(id), where, clock() - began))
                return

    def _overran(self, hold: Hold) -> None:
        """The hold's lease is not renewed any more; called from the keeper's thread."""
        self._tell_of(Kind.OVERRUN, hold)

    def _settled(self, hold: Hold, stored: bool) -> None:
        """A waiting result is stored, or never will be; called from the keeper's thread."""
        self._tell_of(Kind.STORED_LATE if stored else Kind.NEVER_STORED, hold)

    def _tell_of(self, kind: Kind, hold: Hold) -> None:
        digest = short_digest(hold.id)
        self.tell(Event(kind=kind, digest=digest, where=hold.where, attempt=hold.attempt, trace=hold.trace))
