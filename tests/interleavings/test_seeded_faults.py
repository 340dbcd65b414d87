"""The explorer finds what it is for: each test takes one safeguard away, and the invariant that rests on it breaks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from retryproof import attempt as straight
from retryproof.core import flow, twin
from retryproof.core import record as table
from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Cancelled,
    Claim,
    Command,
    Complete,
    Look,
    Pause,
    Raised,
    Release,
    Reply,
    Run,
)
from retryproof.core.hold import Hold
from retryproof.core.policy import Policy
from retryproof.core.record import Record, State
from tests.interleavings.callers import Rules, Written
from tests.interleavings.explorer import Scenario, explore
from tests.interleavings.invariants import Violation
from tests.interleavings.scenarios import PAIRS

Attempt = Callable[[Claim, Policy, float, Any], flow.Flow]

SAME = PAIRS["the same request twice"]
OTHER = PAIRS["other input"]
REFUSED = PAIRS["a policy that refuses"]


def settle_without_the_fence(record: Record | None, command: Complete | Release, now: int) -> Written:
    if record is not None:
        command = replace(command, nonce=record.nonce, token=record.token)
    return table.settle(record, command, now)


def settle_fenced_by_the_token_of_a_release(record: Record | None, command: Complete | Release, now: int) -> Written:
    """A stale holder may release, as if that could do no harm."""
    if record is not None and isinstance(command, Release):
        return settle_without_the_fence(record, command, now)
    return table.settle(record, command, now)


def settle_without_repeats(record: Record | None, command: Complete | Release, now: int) -> Written:
    if record is not None and record.settled:
        return None, LOST
    return table.settle(record, command, now)


def settle_that_forgets_earlier_attempts(record: Record | None, command: Complete | Release, now: int) -> Written:
    written, reply = table.settle(record, command, now)
    return written and replace(written, attempt=1), reply


def disown_that_settles(claim: Claim, held: Acquired) -> Release:
    """As if nothing had been known of the operation before the claim that nobody wants."""
    return Release(claim.id, claim.nonce, held.token, settles=True)


def settle_that_says_done_and_stores_nothing(record: Record | None, command: Complete | Release, now: int) -> Written:
    return None, DONE


def decide_without_the_nonce(record: Record | None, claim: Claim, now: int) -> Written:
    return table.decide(record and replace(record, nonce=b""), claim, now)


def decide_without_the_nonce_of_a_release(record: Record | None, claim: Claim, now: int) -> Written:
    if record is not None and record.state is State.RELEASED:
        record = replace(record, nonce=b"")
    return table.decide(record, claim, now)


def decide_without_the_fingerprint(record: Record | None, claim: Claim, now: int) -> Written:
    return table.decide(record and replace(record, fingerprint=claim.fingerprint), claim, now)


def decide_without_the_lease(record: Record | None, claim: Claim, now: int) -> Written:
    return table.decide(record and replace(record, lease_until=0), claim, now)


def decide_with_a_token_that_stands_still(record: Record | None, claim: Claim, now: int) -> Written:
    written, reply = table.decide(record, claim, now)
    if written is not None and record is not None and isinstance(reply, Acquired):
        return replace(written, token=record.token), replace(reply, token=record.token)
    return written, reply


def decide_that_drops_what_is_over(record: Record | None, claim: Claim, now: int) -> Written:
    if record is not None and not record.settled and now >= record.lease_until:
        record = None
    return table.decide(record, claim, now)


def decide_that_runs_what_was_released(record: Record | None, claim: Claim, now: int) -> Written:
    """A policy that refuses takes a clean failure for the end of every doubt."""
    if record is not None and record.state is State.RELEASED:
        claim = replace(claim, on_abandoned="rerun")
    return table.decide(record, claim, now)


def decide_that_forgets_checkpoints(record: Record | None, claim: Claim, now: int) -> Written:
    return table.decide(record and replace(record, checkpoints={}), claim, now)


def decide_that_runs_again_what_is_completed(record: Record | None, claim: Claim, now: int) -> Written:
    return table.decide(record and replace(record, expires_at=0), claim, now)


Change = Callable[[Reply], Reply]
End = Callable[[Command, Hold], flow.Conclusion | None]
Enter = Callable[[Hold, float], None]


def _attempt(
    change: Change = lambda reply: reply,
    end: End = lambda command, hold: None,
    enter: Enter = lambda hold, now: None,
) -> Attempt:
    """The real attempt, but for what it is told, where it ends, and what it holds when its handler begins."""

    def attempt(claim: Claim, policy: Policy, now: float, refingerprint: Any) -> flow.Flow:
        inner = flow.attempt(claim, policy, now, refingerprint)
        command = next(inner)
        hold: Hold | None = None
        while True:
            reply, now = yield command
            try:
                command = inner.send((change(reply), now))
            except StopIteration as stop:
                conclusion: flow.Conclusion = stop.value
                return conclusion
            if isinstance(command, Run):
                hold = command.hold
                enter(hold, now)
            ended = end(command, hold) if hold is not None else None
            if ended is not None:
                return ended

    return attempt


def shown_before_it_is_stored(command: Command, hold: Hold) -> flow.Conclusion | None:
    return flow.Completed(hold, command.result) if isinstance(command, Complete) else None


def shown_although_overtaken(command: Command, hold: Hold) -> flow.Conclusion | None:
    return flow.Completed(hold, b"its own") if isinstance(command, Look) else None


def released_when_cancelled(reply: Reply) -> Reply:
    return Raised() if isinstance(reply, Cancelled) else reply


def attempt_that_never_ends(claim: Claim, policy: Policy, now: float, refingerprint: Any) -> flow.Flow:
    if claim.nonce == b"last":  # the explorer's own, which looks whether others can still get through
        return (yield from flow.attempt(claim, policy, now, refingerprint))
    while True:
        yield claim
        yield Pause(0.0)


def told_only_of_what_lingers(hold: Hold, last: twin.Last | None, claim: Claim, heard: Reply, now: float) -> Reply:
    return None if last is None else twin.told(hold, last, claim, heard, now)


FAULTS: dict[str, tuple[Rules, Scenario, str]] = {
    "no fence": (Rules(settle=settle_without_the_fence), SAME, "I2|I3"),
    "no fence for a release": (Rules(settle=settle_fenced_by_the_token_of_a_release), SAME, "I2|I3"),
    "no repeat of a complete": (Rules(settle=settle_without_repeats), SAME, "C3: a current or repeated complete"),
    "nothing is stored": (Rules(settle=settle_that_says_done_and_stores_nothing), SAME, "I5"),
    "no nonce": (Rules(decide=decide_without_the_nonce), SAME, "C3: a repeated claim gets another answer"),
    "no nonce after a release": (
        Rules(decide=decide_without_the_nonce_of_a_release),
        SAME,
        "C3: a repeated claim changes",
    ),
    "no mismatch check": (Rules(decide=decide_without_the_fingerprint), OTHER, "I4"),
    "no lease": (Rules(decide=decide_without_the_lease), SAME, "I1"),
    "a token that stands still": (Rules(decide=decide_with_a_token_that_stands_still), SAME, "C2"),
    "unsettled is dropped": (Rules(decide=decide_that_drops_what_is_over), SAME, "I7"),
    "unknown, then failed": (Rules(settle=settle_that_forgets_earlier_attempts), SAME, "I7: an operation counts"),
    "unknown, then failed, then refused": (
        Rules(decide=decide_that_runs_what_was_released),
        PAIRS["one that refuses beside others"],
        "C7",
    ),
    "a disowned claim": (
        Rules(disown=disown_that_settles),
        PAIRS["a claim without an answer"],
        "I7: an operation counts",
    ),
    "checkpoints are forgotten": (
        Rules(decide=decide_that_forgets_checkpoints),
        PAIRS["with steps and renewals"],
        "C13, C14|C3",
    ),
    "completed runs again": (Rules(decide=decide_that_runs_again_what_is_completed), SAME, "I3"),
    "seen before stored": (Rules(attempt=_attempt(end=shown_before_it_is_stored)), SAME, "I5"),
    "its own result": (Rules(attempt=_attempt(end=shown_although_overtaken)), SAME, "I5|I10"),
    "a lease counted from the reply": (Rules(attempt=_attempt(enter=Hold.renewed)), SAME, "I1: two"),
    "start under a lease that is over": (Rules(may_begin=lambda hold, now: True), SAME, "I1: a handler begins"),
    "released when cancelled": (Rules(attempt=_attempt(change=released_when_cancelled)), REFUSED, "C7|I7"),
    "a twin while a result lingers": (
        Rules(twin_first=lambda hold, last, now: None, twin_told=lambda hold, last, claim, heard, now: None),
        PAIRS["in one process, with a store out of reach"],
        "C10: a claim leaves",
    ),
    "a twin while its operation runs": (
        Rules(twin_told=told_only_of_what_lingers),
        PAIRS["in one process, with a store out of reach"],
        "C10: a claim leaves",
    ),
    "no end": (Rules(attempt=attempt_that_never_ends), SAME, "a path without end"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_explorer_finds(name: str) -> None:
    rules, scenario, broken = FAULTS[name]
    with pytest.raises(Violation, match=f"^({broken})"):
        explore(scenario, rules)


def test_a_violation_names_the_steps_that_lead_to_it() -> None:
    with pytest.raises(Violation, match=r"(?s)after:\nstart\n.*A begins"):
        explore(OTHER, Rules(decide=decide_without_the_fingerprint))


def decides_without_the_fence(hold: Hold, command: Complete | Release, reply: Reply) -> flow.Completed | None:
    """A lost lease taken for a stored result."""
    return flow.Completed(hold, command.result) if isinstance(command, Complete) else None


def starts_the_machine_without_the_reply(*arguments: Any) -> flow.Flow:
    """So that the claim is sent once more."""
    return flow.attempt(*arguments[:4])


def counts_the_lease_from_the_answer(
    claim: Claim, reply: Reply, since: float, asked: float, policy: Policy
) -> Hold | flow.Replayed | None:
    return flow.after_claim(claim, reply, since + 1, asked, policy)


def does_nothing(*arguments: Any) -> None:
    """A step that was forgotten."""


STRAIGHT_FAULTS = {
    "after_settling": decides_without_the_fence,
    "machine": starts_the_machine_without_the_reply,
    "after_claim": counts_the_lease_from_the_answer,
    "see_to": does_nothing,
    "leave_settling_to": does_nothing,
}


@pytest.mark.parametrize("name", STRAIGHT_FAULTS)
def test_the_straight_way_is_held_to_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight, name, STRAIGHT_FAULTS[name])
    with pytest.raises(Violation, match=r"attempt|cancellation|interruption"):
        explore(SAME)


def test_a_cancellation_that_loses_the_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """C4: what was on its way goes on in a task of its own."""
    monkeypatch.setattr(straight.LoopAttempt, "_adopt", does_nothing)
    with pytest.raises(Violation):
        explore(SAME)
