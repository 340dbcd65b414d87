"""Diagnosis: what of a store's server or file silently breaks safety (O2).

A store's own doctor module gathers facts (`diagnose`) and judges them (`verdicts`, pure). `diagnose` here finds it by
the URL's scheme. Nothing is changed: no file is made, no schema, no key.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from retryproof.core.errors import ConfigurationError
from retryproof.core.findings import Finding, Verdict, clock_skew
from retryproof.stores.url import SCHEMES, scheme_name

__all__ = ["Finding", "Verdict", "clock_skew", "diagnose"]

_DOCTORS = {
    "memory": "retryproof.stores.memory_doctor",
    "sqlite": "retryproof.sql.sqlite.doctor",
    "redis": "retryproof.stores.redis.doctor",
    "rediss": "retryproof.stores.redis.doctor",
    "postgresql": "retryproof.sql.postgres.doctor",
    "postgres": "retryproof.sql.postgres.doctor",
    "postgresql+psycopg": "retryproof.sql.postgres.doctor",
    "postgresql+asyncpg": "retryproof.sql.postgres.doctor",
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
