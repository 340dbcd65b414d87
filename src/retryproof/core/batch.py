"""A store's answer to a batch: one reply for each item; and what one pass of reaping did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from retryproof.core.errors import StoreUnavailable, Unreadable
from retryproof.core.record import Record

T = TypeVar("T")
ItemError: TypeAlias = StoreUnavailable | Unreadable
"""How one item of a batch may fail: no answer, or a record that this version cannot read (C21)."""

Batch = Sequence[T | ItemError]
"""One reply or error for each item, in order."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one bounded pass of reaping did.

    settled: how many records past their retention it removed.
    unsettled: records without an outcome whose time is over. They still exist: report each of them, and then pass them
        as `told` (C12).
    more: whether another pass would find more.
    ended: ids of those of `told` that it removed.
    """

    settled: int = 0
    unsettled: Sequence[Record] = field(default=())
    more: bool = False
    ended: Sequence[bytes] = field(default=())
