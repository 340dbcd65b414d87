"""Plans in the transaction that a caller has open, in either colour: adapt, check, perform, explain.

Inbox, outbox and upserts work in this way. Each says in its own words what a wrong connection is told, and which
errors of a driver mean a wrong use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from retryproof.core.errors import ConfigurationError
from retryproof.drive import apump, pump
from retryproof.sql.callers import BlockingConnection, LoopConnection, adapt, refused
from retryproof.sql.plan import Plan, Straight

T = TypeVar("T")


def unexplained(error: Exception) -> ConfigurationError | None:
    """No error means a wrong use."""
    return None


class InTransaction:
    """Performs plans in the caller's transaction.

    awaited: what an awaited connection is told that was given to a method that blocks; blocking: the reverse.
    explain: a driver's error as a wrong use in our words, or None where it is none.
    """

    def __init__(
        self,
        *,
        awaited: str,
        blocking: str,
        explain: Callable[[Exception], ConfigurationError | None] = unexplained,
    ) -> None:
        self._awaited = awaited
        self._blocking = blocking
        self._explain = explain

    def perform(self, connection: object, plan: Callable[[str], Plan[T] | Straight], *, check: bool = True) -> T:
        """Perform a plan on a connection that blocks. plan: makes it, given the name of the connection's dialect.

        check: whether a connection without a usable open transaction is refused, by ConfigurationError.
        """
        adapted = adapt(connection)
        if adapted.on_loop:
            raise ConfigurationError(self._awaited)
        blocking: BlockingConnection = adapted  # type: ignore[assignment]  # its colour was just checked
        if check:
            blocking.check_open()
        try:
            steps = plan(blocking.dialect)
            if isinstance(steps, Straight):
                if rows := blocking.execute(steps):
                    return rows  # type: ignore[return-value]  # T is what a Straight gives
                steps = steps.otherwise(steps)
            return pump(steps, blocking.execute)
        except Exception as error:
            if (explained := self._explain(error)) is not None:
                raise explained from error
            raise

    async def aperform(self, connection: object, plan: Callable[[str], Plan[T] | Straight], *, check: bool = True) -> T:
        """`perform` on a connection of the event loop."""
        adapted = adapt(connection)
        if not adapted.on_loop:
            raise ConfigurationError(self._blocking)
        on_loop: LoopConnection = adapted  # type: ignore[assignment]  # as above
        if check and on_loop.ASKS:
            await on_loop.check_open()
        elif check and (reason := on_loop.unusable()) is not None:
            raise refused(reason, on_loop.ADVICE)
        try:
            steps = plan(on_loop.dialect)
            if isinstance(steps, Straight):
                if rows := await on_loop.execute(steps):
                    return rows  # type: ignore[return-value]  # as above
                steps = steps.otherwise(steps)
            return await apump(steps, on_loop.execute)
        except Exception as error:
            if (explained := self._explain(error)) is not None:
                raise explained from error
            raise
