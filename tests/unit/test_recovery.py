"""A step as a generator: what it asks of the store and of its caller, and what an attempt keeps (T3, C6, C10, C14)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any
from uuid import UUID

import pytest

from retryproof import Policy, errors
from retryproof.core.codec import JsonCodec, encode_value
from retryproof.core.commands import DONE, LOST, Acquired, Checkpoint, Claim, Found, Look, Renew, Unreachable
from retryproof.core.hold import Hold
from retryproof.drive import clock
from retryproof.recovery import ENDED, Recovery, StepCall, stepping

KEY = UUID(int=7)
NO_ANSWER = Unreachable(TimeoutError("no answer"))


def recovery(kept: Mapping[str, bytes] | None = None, limit: int | None = None, patience: float = 60.0) -> Recovery:
    claim = Claim(b"i" * 32, b"f" * 33, b"n" * 16, 10.0, 60.0, 60.0, "rerun", 5, b"", "")
    acquired = Acquired(token=3, attempt=2, first_seen=1, birth=b"b" * 16, checkpoints=dict(kept or {}))
    return Recovery(Hold(claim, acquired, clock()), Policy(complete_timeout=patience), limit)


def taken(found: Recovery, name: str = "charge", *, held: bool = False) -> Generator[Any, Any, Any]:
    return stepping(found, name, JsonCodec(), KEY, held=held)


def end(steps: Generator[Any, Any, Any], reply: Any) -> Any:
    with pytest.raises(StopIteration) as stopped:
        steps.send(reply)
    return stopped.value.value


def test_a_step_calls_its_function_and_keeps_the_result_fenced() -> None:
    found = recovery()
    steps = taken(found)
    assert next(steps) == StepCall(KEY)
    command = steps.send({"paid": 5})
    assert isinstance(command, Checkpoint)
    assert (command.name, command.token) == ("charge", 3)
    assert end(steps, DONE) == {"paid": 5}
    assert found.hold.checkpoints == {"charge": command.value}


def test_t3_a_step_of_an_earlier_attempt_asks_for_nothing() -> None:
    assert end(taken(recovery({"charge": encode_value(JsonCodec(), 5)})), None) == 5


def test_a_name_is_used_once_and_free_again_where_nothing_was_begun() -> None:
    found = recovery()
    with pytest.raises(errors.ConfigurationError, match="Nothing was called"):
        next(taken(found, held=True))
    next(taken(found))
    with pytest.raises(errors.ConfigurationError, match="used twice"):
        next(taken(found))


def test_nothing_begins_after_the_end() -> None:
    found = recovery()
    found.hold.refuses = ENDED
    with pytest.raises(errors.ConfigurationError, match="has ended"):
        next(taken(found))


def test_c6_past_its_lease_a_step_renews_before_it_calls() -> None:
    found = recovery()
    found.hold.deadline = 0.0
    steps = taken(found)
    assert isinstance(next(steps), Renew)
    assert steps.send(DONE) == StepCall(KEY)
    assert found.hold.deadline > 0.0


@pytest.mark.parametrize(
    ("reply", "raised"), [(LOST, errors.LeaseLost), (NO_ANSWER, errors.StoreUnavailable)], ids=["lost", "no answer"]
)
def test_c6_without_a_lease_nothing_is_called(reply: Any, raised: type[Exception]) -> None:
    found = recovery()
    found.hold.deadline = 0.0
    steps = taken(found)
    next(steps)
    with pytest.raises(raised):
        steps.send(reply)
    assert found.hold.lost is (raised is errors.LeaseLost)


def test_c14_a_result_over_the_limit_is_handed_on_and_its_name_kept() -> None:
    found = recovery(limit=3)
    steps = taken(found)
    next(steps)
    steps.send("long")
    assert end(steps, DONE) == "long"
    again = recovery(found.hold.checkpoints)
    with pytest.raises(errors.ResultOmitted):
        next(taken(again))


def test_a_result_that_the_store_does_not_answer_for_is_sent_again() -> None:
    steps = taken(recovery())
    next(steps)
    first = steps.send(5)
    assert steps.send(NO_ANSWER) == first
    assert end(steps, DONE) == 5


def test_a_result_that_could_not_be_kept_is_said() -> None:
    steps = taken(recovery(patience=0.0))
    next(steps)
    steps.send(5)
    with pytest.raises(errors.StoreUnavailable, match="could not be stored"):
        steps.send(NO_ANSWER)


def test_c10_where_the_record_is_gone_the_attempt_goes_on() -> None:
    found = recovery()
    steps = taken(found)
    next(steps)
    steps.send(5)
    assert isinstance(steps.send(LOST), Look)
    assert end(steps, Found(None)) == 5
    assert not found.hold.lost


def test_who_lost_its_lease_while_it_called_is_told() -> None:
    found = recovery()
    steps = taken(found)
    next(steps)
    steps.send(5)
    steps.send(LOST)
    with pytest.raises(errors.LeaseLost):
        steps.send(NO_ANSWER)
    assert found.hold.lost
