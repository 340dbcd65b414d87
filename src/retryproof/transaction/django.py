"""Django's own transaction for an operation: `operation.transaction(transaction())`."""

from retryproof.sql.callers.django import transaction

__all__ = ["transaction"]
