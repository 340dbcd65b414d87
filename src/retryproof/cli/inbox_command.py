"""What the inbox's commands have in common: the inbox by URL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from retryproof.transaction.inbox_operator import InboxOperator

T = TypeVar("T")


def with_inbox(url: str, work: Callable[[InboxOperator], Awaitable[T]]) -> T:
    """Do something to the inbox of a database."""

    async def run() -> T:
        operator = InboxOperator(url)
        try:
            return await work(operator)
        finally:
            await operator.aclose()

    return asyncio.run(run())
