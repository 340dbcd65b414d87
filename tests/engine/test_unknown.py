"""What an attempt says that does not know whether it had its effect (C5)."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded  # type: ignore[import-untyped]  # it has no types
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.commands import Cancelled, Raised
from retryproof.core.failure import outcome_of
from retryproof.core.record import State
from retryproof.stores.memory import MemoryStore
from tests.engine.conftest import MakeCaller

UNKNOWN = errors.OutcomeUnknown("the bank hung up")


class Gateway(Exception):
    """An error of a payment library."""


def states(store: MemoryStore) -> list[State]:
    return [record.state for record in store.scan(limit=10)]


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        ExceptionGroup("tasks", [ValueError("a"), UNKNOWN]),
        ExceptionGroup("tasks", [ExceptionGroup("inner", [UNKNOWN]), ValueError("a")]),
        Gateway("read time-out"),
        ExceptionGroup("tasks", [Gateway("read time-out")]),
        SoftTimeLimitExceeded(),
        JobTimeoutException("too long"),
        ExceptionGroup("tasks", [ValueError("a"), JobTimeoutException("too long")]),
    ],
    ids=["group", "nested", "named", "named in a group", "celery", "rq", "rq in a group"],
)
def test_c5_what_may_have_had_its_effect_keeps_its_record(make_caller: MakeCaller, error: Exception) -> None:
    """Under `refuse` nothing runs again."""
    store, effects = MemoryStore(), list[int]()
    caller = make_caller(store, on_abandoned="refuse", unknown_on=(Gateway,), lease=0.05)
    with pytest.raises(type(error)):
        caller.run("k", raising(error))
    assert states(store) == [State.IN_PROGRESS]
    with pytest.raises((errors.InProgress, errors.OutcomeUnknown)):
        caller.run("k", lambda: effects.append(1))
    assert effects == []


def test_c5_any_other_exception_gives_the_operation_back(make_caller: MakeCaller) -> None:
    store = MemoryStore()
    caller = make_caller(store, unknown_on=(Gateway,))
    with pytest.raises(ExceptionGroup):
        caller.run("k", raising(ExceptionGroup("tasks", [ValueError("a"), TimeoutError()])))
    assert states(store) == [State.RELEASED]


async def test_c5_a_task_group_says_what_its_task_says() -> None:
    store = MemoryStore()
    engine = AsyncIdempotency(store)

    async def charge() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(raising(UNKNOWN)))

    with pytest.raises(ExceptionGroup):
        await engine.run("k", charge, scope="s")
    assert states(store) == [State.IN_PROGRESS]


def test_c5_what_the_handler_said_counts_whatever_it_raises(make_caller: MakeCaller) -> None:
    store = MemoryStore()
    caller = make_caller(store, release_on_cancel=True)

    def charge() -> None:
        current_operation().outcome_unknown()
        raise ValueError("a framework's own")

    with pytest.raises(ValueError, match="own"):
        caller.run("k", charge)
    assert states(store) == [State.IN_PROGRESS]
    assert caller.events.kinds == ["unknown"]


def test_c5_what_the_handler_said_counts_although_it_returns(make_caller: MakeCaller) -> None:
    """A value that is not stored is nobody's result (I5)."""
    store = MemoryStore()

    def charge() -> int:
        current_operation().outcome_unknown()
        return 7

    with pytest.raises(errors.OutcomeUnknown):
        make_caller(store).run("k", charge)
    assert states(store) == [State.IN_PROGRESS]


def test_c5_rqs_own_time_limit_by_its_signal_is_no_failure() -> None:
    store = MemoryStore()

    def charge() -> None:
        with UnixSignalDeathPenalty(1, JobTimeoutException):  # type: ignore[no-untyped-call]  # RQ has no types here
            signal.raise_signal(signal.SIGALRM)

    with pytest.raises(JobTimeoutException):
        Idempotency(store).run("k", charge, scope="s")
    assert states(store) == [State.IN_PROGRESS]


def test_c5_a_time_limit_is_a_cancellation_so_the_policy_may_release_it(make_caller: MakeCaller) -> None:
    store = MemoryStore()
    with pytest.raises(SoftTimeLimitExceeded):
        make_caller(store, release_on_cancel=True).run("k", raising(SoftTimeLimitExceeded()))
    assert states(store) == [State.RELEASED]


def raised_from(error: Exception, cause: BaseException | None, context: BaseException | None = None) -> Exception:
    """As `raise error from cause` leaves it, where `context` was being handled."""
    error.__cause__, error.__context__ = cause, context or cause
    return error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError(), Raised()),
        (UNKNOWN, Raised(unknown=True)),
        (KeyboardInterrupt(), Cancelled()),
        (asyncio.CancelledError(), Cancelled()),
        (BaseExceptionGroup("g", [ValueError(), KeyboardInterrupt()]), Cancelled()),
        (BaseExceptionGroup("g", [UNKNOWN, KeyboardInterrupt()]), Raised(unknown=True)),
        (raised_from(ValueError("from"), UNKNOWN), Raised(unknown=True)),
        (
            raised_from(ValueError("twice"), raised_from(OSError(), ExceptionGroup("g", [UNKNOWN]))),
            Raised(unknown=True),
        ),
        (ExceptionGroup("g", [raised_from(ValueError(), UNKNOWN)]), Raised(unknown=True)),
        (raised_from(ValueError("from None"), None, UNKNOWN), Raised()),  # by `from None`
        (raised_from(TimeoutError(), asyncio.CancelledError()), Raised()),  # as asyncio.timeout does
    ],
    ids=repr,
)
def test_c5_what_exceptions_mean(error: BaseException, outcome: object) -> None:
    assert outcome_of(error) == outcome


@pytest.mark.parametrize("given", [TimeoutError, [TimeoutError], ("TimeoutError",), (int,), (TimeoutError(),)])
def test_c5_unknown_on_is_checked_when_it_is_given(given: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="unknown_on"):
        Policy(unknown_on=given)


def test_a_policy_with_exceptions_pickles() -> None:
    policy = Policy(unknown_on=(TimeoutError,))
    assert pickle.loads(pickle.dumps(policy)) == policy
