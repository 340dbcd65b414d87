"""Events about operations, and their listeners."""

from retryproof.observe.events import Event, Kind, Listener, Traces

__all__ = ["Event", "Kind", "Listener", "Traces"]
