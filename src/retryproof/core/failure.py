"""What an exception says about the effect: there was none, or nobody knows (C5)."""

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
"""Time limits that a signal raises, wherever the work is: they cancel it. But they are subclasses of `Exception`, whose
type alone would say that nothing was done. They are recognised by module and name: the core imports no task queue."""


def outcome_of(error: BaseException, unknown_on: tuple[type[BaseException], ...] = ()) -> Raised | Cancelled:
    """The outcome of work that raised this exception; for a group, the worst outcome of its exceptions.

    If an exception was raised `from` one with an unknown outcome, its outcome is unknown too. Code that has found out
    the outcome raises `from None`. But an exception that was raised from a cancellation is no cancellation itself:
    `asyncio.timeout` raises in this way.
    unknown_on: further exceptions that mean the same as OutcomeUnknown.
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
    """An exception, the exceptions of its group, and those that it was raised from, or raised while handling."""
    return _walk(error, lambda found: (found.__cause__, found.__context__))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, the exceptions of its group, and those that they were raised from."""
    return _walk(error, lambda found: (found.__cause__,))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An exception, and the exceptions of its group."""
    return _walk(error, lambda found: ())


def _walk(
    error: BaseException, before: Callable[[BaseException], Iterable[BaseException | None]]
) -> Iterator[BaseException]:
    """Each exception once, in the order of depth. Chains of exceptions may contain cycles."""
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
