"""For tests: the suite that every store passes, a proxy for network faults, and a clock that a test moves.

The suite needs pytest, which is imported only with the suite. The demo uses the rest without pytest.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from retryproof.testing.clock import ManualClock

if TYPE_CHECKING:
    from retryproof.testing.conformance import AsyncStoreConformance, StoreConformance

__all__ = ["AsyncStoreConformance", "ManualClock", "StoreConformance"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pytest = import_module("pytest")
    # pytest warns about modules that were imported before.
    suite = ("retryproof.testing.bench", "retryproof.testing.cases")
    pytest.register_assert_rewrite(*(module for module in suite if module not in sys.modules))
    return getattr(import_module("retryproof.testing.conformance"), name)
