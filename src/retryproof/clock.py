"""The host's clock, for stores whose engine has none of its own."""

from __future__ import annotations

import time


def wall_clock() -> int:
    """Microseconds since the epoch by the host's clock."""
    return time.time_ns() // 1_000
