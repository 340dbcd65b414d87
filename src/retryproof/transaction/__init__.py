"""Work that commits with the caller's own transaction."""

from retryproof.transaction.inbox import Inbox, Received
from retryproof.transaction.outbox import Outbox
from retryproof.transaction.relay import Relay, RelayPolicy

__all__ = ["Inbox", "Outbox", "Received", "Relay", "RelayPolicy"]
