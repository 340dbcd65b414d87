"""What the memory store cannot promise."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.stores.diagnosis import Finding, Verdict


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Always the same."""
    return [
        Finding(
            "durability",
            Verdict.WARN,
            "records live in one process and end with it",
            "Use sqlite:/// on one machine, redis:// or postgresql:// on several; memory:// is for tests.",
        )
    ]
