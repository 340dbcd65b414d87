"""The outbox: messages are written in the caller's own transaction, and a relay sends them afterwards (T5 to T7)."""

from retryproof.outbox.add import Outbox
from retryproof.outbox.policy import RelayPolicy
from retryproof.outbox.relay import Relay

__all__ = ["Outbox", "Relay", "RelayPolicy"]
