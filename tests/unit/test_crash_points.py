"""Crash points: where they are, which one is armed, and what they leave alone."""

from __future__ import annotations

import pytest

from retryproof import AsyncIdempotency, Idempotency, current_operation, errors
from retryproof.stores.memory import MemoryStore
from retryproof.stores.threaded import InThread
from retryproof.testing.crash import CrashPoints

ROUND = {"before claim": 1, "after claim": 1, "before complete": 1, "after complete": 1}


class Died(BaseException):
    """In place of SIGKILL."""


def die() -> None:
    raise Died


def test_a_wrapped_store_reaches_a_point_before_and_after_each_call() -> None:
    crash = CrashPoints()
    engine = Idempotency(crash.wrap(MemoryStore()))
    assert engine.run("k", lambda: current_operation().step("one", lambda key: 1), scope="s").value == 1
    assert crash.reached == {**ROUND, "before checkpoint": 1, "after checkpoint": 1}


async def test_a_wrapped_async_store_does_as_well() -> None:
    crash = CrashPoints()
    store = crash.wrap(InThread(MemoryStore()))
    assert (await AsyncIdempotency(store).run("k", lambda: 1, scope="s")).value == 1
    assert crash.reached == ROUND
    await store.aclose()


@pytest.mark.parametrize(("armed", "number"), [("here", 1), ("here:1", 1), ("here:3", 3)])
def test_the_armed_point_is_deadly_the_nth_time(armed: str, number: int) -> None:
    crash = CrashPoints(armed, die=die)
    for _ in range(number - 1):
        crash.reach("here")
    crash.reach("elsewhere")
    with pytest.raises(Died):
        crash.reach("here")
    crash.reach("here")


def test_the_environment_arms_a_point() -> None:
    assert CrashPoints.from_environment({"RETRYPROOF_CRASH": "before claim:2"})._count == 2
    CrashPoints.from_environment({}).reach("before claim")


@pytest.mark.parametrize("armed", ["claim:zero", "claim:0", "claim:"])
def test_a_number_that_is_none_is_refused(armed: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="number"):
        CrashPoints(armed)
