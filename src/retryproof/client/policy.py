"""What a retrying client may do, checked when made (K1 to K3)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from retryproof.core.errors import ConfigurationError

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: names of headers and methods


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, how long and what to retry; all times in seconds.

    `deadline` counts from the first attempt: no retry starts after it. `backoff` is the upper end of the first pause,
    and doubles up to `max_backoff`; the pause is random between zero and that end. `Retry-After` is added, up to
    `max_retry_after`. `retry_ratio`, `retry_floor` (a second) and `retry_burst` are the budget (RetryBudget). Requests
    with one of `methods` get a key in `header`; with `quoted` it is in quotes (a Structured Field String).
    """

    max_attempts: int = 5
    deadline: float = 60.0
    backoff: float = 0.1
    max_backoff: float = 5.0
    max_retry_after: float = 30.0
    retry_ratio: float = 0.1
    retry_floor: float = 1.0
    retry_burst: float = 20.0
    methods: Collection[str] = ("POST", "PATCH")
    header: str = "Idempotency-Key"
    quoted: bool = False
    statuses: Collection[int] = RETRIED_STATUSES

    def __post_init__(self) -> None:
        _require(
            not isinstance(self.max_attempts, bool) and isinstance(self.max_attempts, int), "max_attempts", "whole"
        )
        _require(self.max_attempts >= 1, "max_attempts", "at least 1")
        _require(self.deadline > 0, "deadline", "positive (math.inf for none)")
        for name in ("backoff", "max_backoff", "max_retry_after", "retry_ratio", "retry_floor", "retry_burst"):
            _require(getattr(self, name) >= 0, name, "zero or more")
        for name in ("backoff", "max_backoff", "max_retry_after"):
            _require(math.isfinite(getattr(self, name)), name, "finite")
        _require(self.max_backoff >= self.backoff, "max_backoff", "no less than backoff")
        _require(_TOKEN.fullmatch(self.header) is not None, "header", "the name of an HTTP header")
        _require(not isinstance(self.methods, str), "methods", "a collection of methods, such as ('POST',)")
        _require(all(_TOKEN.fullmatch(method) for method in self.methods), "methods", "names of HTTP methods")
        _require(all(400 <= status <= 599 for status in self.statuses), "statuses", "between 400 and 599")
        object.__setattr__(self, "methods", frozenset(method.upper() for method in self.methods))
        object.__setattr__(self, "statuses", frozenset(self.statuses))


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ConfigurationError(f"RetryPolicy: {name} must be {what}")
