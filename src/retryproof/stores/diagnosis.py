"""Diagnosis: what breaks the safety of a store's server or file without an error (O2).

A store's own doctor module gathers facts (`diagnose`) and judges them (`verdicts`, pure). `diagnose` here finds it by
the URL's scheme (`stores.url.ENTRIES`). It changes nothing: it creates no file, no schema and no key.
"""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.core.errors import ConfigurationError
from retryproof.core.findings import Finding, Verdict, clock_skew
from retryproof.stores.url import entry_of, load

__all__ = ["Finding", "Verdict", "clock_skew", "diagnose"]


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Check the store of a URL.

    Raises StoreUnavailable, and ConfigurationError for an unknown scheme or a missing driver.
    """
    entry = entry_of(url)
    if entry.doctor is None:
        raise ConfigurationError("An engine has no doctor; give the URL of its database.")
    findings: Sequence[Finding] = load(entry, entry.doctor).diagnose(url, timeout=timeout)
    return findings
