"""The inbox: a message takes effect once, in the consumer's own transaction (T4)."""

from retryproof.inbox.receive import Inbox, Received

__all__ = ["Inbox", "Received"]
