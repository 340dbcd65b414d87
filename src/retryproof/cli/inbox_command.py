"""What the inbox's commands have in common: the inbox by URL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from retryproof.cli.operated import closing
from retryproof.transaction.inbox_operator import InboxOperator

T = TypeVar("T")


def with_inbox(url: str, work: Callable[[InboxOperator], Awaitable[T]]) -> T:
    """Do something to the inbox of a database."""

    return closing(lambda: InboxOperator(url), work)
