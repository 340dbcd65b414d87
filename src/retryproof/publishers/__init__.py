"""Where a relay sends."""

from retryproof.publishers.base import DELIVERED, UNTRIED, Batch, Delivered, Failed, Outcome, Publisher, Untried
from retryproof.publishers.url import open_publisher

__all__ = [
    "DELIVERED",
    "UNTRIED",
    "Batch",
    "Delivered",
    "Failed",
    "Outcome",
    "Publisher",
    "Untried",
    "open_publisher",
]
