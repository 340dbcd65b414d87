"""The retrying client: one key an operation, and retries that cannot make a second effect."""

from retryproof.client.budget import RetryBudget
from retryproof.client.policy import RetryPolicy

__all__ = ["RetryBudget", "RetryPolicy"]
