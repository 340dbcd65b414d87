"""For tests: the suite that every store passes, a link that loses and delays, and a clock that stands still.

The suite needs pytest, which is imported only when the suite is; the demo uses the rest without it.
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
    # pytest warns of what was imported before.
    suite = ("retryproof.testing.bench", "retryproof.testing.cases")
    pytest.register_assert_rewrite(*(module for module in suite if module not in sys.modules))
    return getattr(import_module("retryproof.testing.conformance"), name)
