"""What happened to operations, told to whoever listens."""

from retryproof.observe.events import Event, Kind, Listener, Traces

__all__ = ["Event", "Kind", "Listener", "Traces"]
