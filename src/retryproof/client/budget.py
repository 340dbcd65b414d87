"""A budget for the retries of all calls, so that retries do not make an outage worse (K3)."""

from __future__ import annotations

import threading

from retryproof.client.policy import RetryPolicy
from retryproof.core.errors import ConfigurationError


class RetryBudget:
    """A bucket of tokens: each call adds `ratio`, each second adds `per_second`, each retry takes one.

    It holds at most `burst` tokens and starts full; `burst=math.inf` never refuses. While a server is down, a client
    that makes N calls a second sends at most N * (1 + ratio) + per_second requests a second, once the burst is spent.
    Transports, threads and loops may share one budget. Times are monotonic seconds, which the caller gives.
    """

    def __init__(self, *, ratio: float = 0.1, per_second: float = 1.0, burst: float = 20.0) -> None:
        if not (ratio >= 0 and per_second >= 0 and burst >= 0):
            raise ConfigurationError("RetryBudget: ratio, per_second and burst must be zero or more")
        self._ratio = ratio
        self._per_second = per_second
        self._burst = burst
        self._tokens = burst
        self._refilled_at: float | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, policy: RetryPolicy) -> RetryBudget:
        """The budget that a policy describes."""
        return cls(ratio=policy.retry_ratio, per_second=policy.retry_floor, burst=policy.retry_burst)

    def deposit(self) -> None:
        """Count a call (not a retry)."""
        with self._lock:
            self._tokens = min(self._burst, self._tokens + self._ratio)

    def withdraw(self, now: float) -> bool:
        """Take a token for one retry; False if there is none."""
        with self._lock:
            if self._refilled_at is not None:
                grown = max(0.0, now - self._refilled_at) * self._per_second
                self._tokens = min(self._burst, self._tokens + grown)
            self._refilled_at = now
            # Ten additions of 0.1 give 0.99…, but have to be enough for a retry.
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            return True
