"""What an exception says of the effect: that there was none, or that nobody knows (C5)."""

from __future__ import annotations

from collections.abc import Iterator

from retryproof.core.commands import Cancelled, Raised
from retryproof.core.errors import OutcomeUnknown

_TIME_LIMITS = {
    ("billiard.exceptions", "SoftTimeLimitExceeded"),  # Celery's, by SIGUSR1
    ("billiard.exceptions", "TimeLimitExceeded"),
    ("rq.timeouts", "BaseTimeoutException"),  # RQ's, by SIGALRM
}
"""Time limits that a signal raises, wherever the work happens to be: they cancel it. Yet they are `Exception`s, which
by their type alone would say that nothing was done. Known by module and name: the core imports no task queue."""


def outcome_of(error: BaseException, unknown_on: tuple[type[BaseException], ...] = ()) -> Raised | Cancelled:
    """What the work came to that raised this; a group says what the worst of its exceptions says.

    unknown_on: further exceptions that say what OutcomeUnknown says.
    """
    leaves = list(_leaves(error))
    if any(isinstance(leaf, (OutcomeUnknown, *unknown_on)) for leaf in leaves):
        return Raised(unknown=True)
    if any(not isinstance(leaf, Exception) or _is_time_limit(leaf) for leaf in leaves):
        return Cancelled()
    return Raised()


def unknown_in(error: BaseException) -> OutcomeUnknown | None:
    """The first OutcomeUnknown in an exception or a group of them."""
    return next((leaf for leaf in _leaves(error) if isinstance(leaf, OutcomeUnknown)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it holds as a group, and what led to it."""
    seen: set[int] = set()
    left = [error]
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, BaseExceptionGroup):
            left.extend(found.exceptions)
        left.extend(before for before in (found.__cause__, found.__context__) if before is not None)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those in it where it is a group, the groups themselves among them."""
    waiting = [error]
    while waiting:
        leaf = waiting.pop(0)
        yield leaf
        if isinstance(leaf, BaseExceptionGroup):
            waiting.extend(leaf.exceptions)


def _is_time_limit(error: BaseException) -> bool:
    return any((kind.__module__, kind.__name__) in _TIME_LIMITS for kind in type(error).__mro__)
