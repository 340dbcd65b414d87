"""Makes any operation safe to retry: at-least-once delivery, exactly-once effect."""

from retryproof.core import errors
from retryproof.core.operation_key import operation_key
from retryproof.core.policy import Policy
from retryproof.engine import AsyncIdempotency, Idempotency, Outcome
from retryproof.operation import current_operation

__version__ = "0.1.0"

__all__ = [
    "AsyncIdempotency",
    "Idempotency",
    "Outcome",
    "Policy",
    "__version__",
    "current_operation",
    "errors",
    "operation_key",
]
