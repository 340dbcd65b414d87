"""The retrying client: one key for each operation, and retries that cannot cause a second effect."""

from retryproof.client.budget import RetryBudget
from retryproof.client.policy import RetryPolicy

__all__ = ["RetryBudget", "RetryPolicy"]
