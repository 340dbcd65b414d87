"""The findings of a diagnosis of a store: one for each check, with its verdict (O2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SKEW_WARNING = 2.0
"""If the host's clock and the store's differ by more seconds than this, people who compare times are misled."""


class Verdict(StrEnum):
    """The result of a check: good, worth knowing, or unsafe."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. says: what was found. advice: what to do about it, or ""."""

    check: str
    verdict: Verdict
    says: str
    advice: str = ""


def clock_skew(store: float, before: float, after: float) -> Finding:
    """Compare the store's clock with the host's, read before and after; all are seconds since the epoch."""
    skew = max(before - store, store - after, 0.0)
    if skew <= SKEW_WARNING:
        return Finding("clock", Verdict.OK, f"within {SKEW_WARNING:g} s of this host's")
    return Finding(
        "clock",
        Verdict.WARN,
        f"{skew:.1f} s from this host's",
        "Leases go by the store's clock alone and hold, but first-seen times will not match your logs, and a fail-over "
        "to a server with another clock stretches or cuts leases. Run NTP on both.",
    )
