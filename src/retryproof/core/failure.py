"""What an exception says of the effect: that there was none, or that nobody knows (C5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

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

    An exception that was raised `from` one that does not know the outcome does not know it either; who has found out
    raises `from None`. What it was raised from does not make a cancellation of it: `asyncio.timeout` raises so.
    unknown_on: further exceptions that say what OutcomeUnknown says.
    """
    if any(isinstance(found, (OutcomeUnknown, *unknown_on)) for found in _with_causes(error)):
        return Raised(unknown=True)
    if any(not isinstance(leaf, Exception) or _is_time_limit(leaf) for leaf in _leaves(error)):
        return Cancelled()
    return Raised()


def unknown_in(error: BaseException) -> OutcomeUnknown | None:
    """The first OutcomeUnknown in an exception, a group of them, or what they were raised from."""
    return next((found for found in _with_causes(error) if isinstance(found, OutcomeUnknown)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it holds as a group, and what led to it: what it was raised from, or while handling."""
    return _walk(error, lambda found: (found.__cause__, found.__context__))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it holds as a group, and what they were raised from."""
    return _walk(error, lambda found: (found.__cause__,))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it holds as a group."""
    return _walk(error, lambda found: ())


def _walk(
    error: BaseException, before: Callable[[BaseException], Iterable[BaseException | None]]
) -> Iterator[BaseException]:
    """Each exception once, in the order of depth; the chains of exceptions may lead back."""
    seen: set[int] = set()
    left = deque([error])
    while left:
        found = left.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, BaseExceptionGroup):
            left.extend(found.exceptions)
        left.extend(earlier for earlier in before(found) if earlier is not None)


def _is_time_limit(error: BaseException) -> bool:
    return any((kind.__module__, kind.__name__) in _TIME_LIMITS for kind in type(error).__mro__)
