"""Diagnosis: what of a store's server or file silently breaks safety (O2).

A store's own doctor module gathers facts (`diagnose`) and judges them (`verdicts`, pure). `diagnose` here finds it by
the URL's scheme. Nothing is changed: no file is made, no schema, no key.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from retryproof.core.errors import ConfigurationError
from retryproof.stores.url import SCHEMES, scheme_name

SKEW_WARNING = 2.0
"""Seconds between the host's clock and the store's beyond which times that people compare are misleading."""


class Verdict(StrEnum):
    """How a check came out: as it should be, worth knowing, or unsafe."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. says: what was found. advice: what to do about it, "" where nothing."""

    check: str
    verdict: Verdict
    says: str
    advice: str = ""


_DOCTORS = {
    "memory": "retryproof.stores.memory_doctor",
    "sqlite": "retryproof.stores.sql.sqlite_doctor",
    "redis": "retryproof.stores.redis.doctor",
    "rediss": "retryproof.stores.redis.doctor",
    "postgresql": "retryproof.stores.sql.postgres_doctor",
    "postgres": "retryproof.stores.sql.postgres_doctor",
    "postgresql+psycopg": "retryproof.stores.sql.postgres_doctor",
    "postgresql+asyncpg": "retryproof.stores.sql.postgres_doctor",
}


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Look at the store of a URL.

    Raises StoreUnavailable, and ConfigurationError for an unknown scheme or a missing driver.
    """
    scheme = scheme_name(url)
    try:
        doctor = importlib.import_module(_DOCTORS[scheme])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("retryproof"):
            raise
        raise ConfigurationError(
            f"This store needs the package {error.name!r}: pip install 'retryproof[{SCHEMES[scheme].extra}]'."
        ) from error
    findings: Sequence[Finding] = doctor.diagnose(url, timeout=timeout)
    return findings


def clock_skew(store: float, before: float, after: float) -> Finding:
    """Judge the store's clock against the host's, read before and after; all are seconds since the epoch."""
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
