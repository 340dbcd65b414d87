"""Phased operations, and the completer that finishes them without their client (T3)."""

from retryproof.phased.completer import Completer
from retryproof.phased.functions import BlockingPhased, Phased

__all__ = ["BlockingPhased", "Completer", "Phased"]
