"""hiredis, where it is installed, and the driver's errors as the store's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from redis.exceptions import RedisError, ResponseError

from retryproof.core.errors import StoreUnavailable

Reader: Callable[..., Any] | None = import_module("hiredis").Reader if find_spec("hiredis") else None
"""Makes a parser of answers; None without hiredis."""


def unavailable(error: RedisError) -> StoreUnavailable:
    """What the driver's error means to a caller; raised from it."""
    what = "refused" if isinstance(error, ResponseError) else "given no answer"
    return StoreUnavailable(f"Redis has {what}: {error}")
