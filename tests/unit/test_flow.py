"""Single paths through the state machine, told by hand; the explorer goes through all of them."""

from dataclasses import replace

import pytest

from retryproof.core import flow
from retryproof.core.commands import (
    DONE,
    LOST,
    NOT_BEGUN,
    Acquired,
    Cancelled,
    Claim,
    Command,
    Complete,
    Disown,
    Linger,
    Mismatch,
    Pause,
    Paused,
    Raised,
    Release,
    Renew,
    Reply,
    Returned,
    Run,
    Running,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.core.policy import Policy

CLAIM = Claim(
    id=b"i" * 32, fingerprint=b"\1\1same", nonce=b"n" * 16, lease=10.0, retention=100.0, unsettled_retention=1_000.0
)
ACQUIRED = Acquired(token=7, attempt=1, first_seen=1, birth=CLAIM.nonce)
DOWN = Unreachable(StoreUnavailable("no answer"))


class Attempt:
    """An attempt that is told replies; keeps the command it is at, or its conclusion."""

    def __init__(self, policy: Policy | None = None, claim: Claim = CLAIM, known: bytes | None = None) -> None:
        self.conclusion: flow.Conclusion | None = None
        self._flow = flow.attempt(claim, policy or Policy(), 0.0, lambda stored: known)
        self.command: Command | None = next(self._flow)

    def tell(self, reply: Reply, now: float = 0.0) -> Command | None:
        """The next command, or None at the end."""
        try:
            self.command = self._flow.send((reply, now))
        except StopIteration as stop:
            self.command, self.conclusion = None, stop.value
        return self.command


def test_c4_a_result_is_concluded_only_when_it_is_stored() -> None:
    attempt = Attempt()
    assert isinstance(attempt.tell(ACQUIRED), Run)
    attempt.tell(Returned(b"result"))
    assert attempt.conclusion is None
    attempt.tell(DONE)
    assert isinstance(attempt.conclusion, flow.Completed)
    assert (attempt.conclusion.result, attempt.conclusion.stored) == (b"result", True)


def test_c3_a_claim_without_an_answer_is_sent_once_more_under_its_nonce() -> None:
    attempt = Attempt()
    assert attempt.tell(DOWN, 0.5) == CLAIM
    assert attempt.tell(DOWN, 1.0) == Disown(CLAIM)
    attempt.tell(None, 1.0)
    assert isinstance(attempt.conclusion, flow.Down)
    assert not attempt.conclusion.overtaken


def test_a_store_that_took_all_its_time_is_not_asked_again() -> None:
    assert Attempt(Policy(store_timeout=2.0)).tell(DOWN, 2.0) == Disown(CLAIM)


def test_c6_the_lease_counts_from_before_the_first_sending() -> None:
    attempt = Attempt()
    attempt.tell(DOWN, 1.5)
    run = attempt.tell(ACQUIRED, 3.0)
    assert isinstance(run, Run)
    assert run.hold.deadline == 10.0


def test_c6_a_waiter_counts_its_lease_from_its_first_sending_which_may_have_been_applied_late() -> None:
    attempt = Attempt(Policy(wait=60.0, poll=6.0))
    attempt.tell(Running(3.0), 0.0)
    attempt.tell(Paused(), 6.0)
    run = attempt.tell(ACQUIRED, 6.0)
    assert isinstance(run, Run)
    assert run.hold.deadline == 10.0


def test_c6_a_holder_past_its_lease_completes_at_once_since_nonce_and_token_decide() -> None:
    attempt = Attempt()
    attempt.tell(ACQUIRED)
    assert isinstance(attempt.tell(Returned(b"result"), 11.0), Complete)
    attempt.tell(DONE, 11.5)
    assert isinstance(attempt.conclusion, flow.Completed)


def test_c6_work_that_may_not_begin_is_renewed_once_and_given_back_when_that_is_late_as_well() -> None:
    attempt = Attempt()
    attempt.tell(ACQUIRED, 11.0)
    assert isinstance(attempt.tell(NOT_BEGUN, 11.0), Renew)
    assert isinstance(attempt.tell(DONE, 22.0), Run)
    given_back = attempt.tell(NOT_BEGUN, 22.0)
    assert isinstance(given_back, Linger)
    assert isinstance(given_back.last, Release)
    attempt.tell(None, 22.0)
    assert isinstance(attempt.conclusion, flow.Down)
    assert not attempt.conclusion.overtaken


def test_c3_a_complete_repeated_past_the_lease_is_asked_for_itself() -> None:
    attempt = Attempt()
    attempt.tell(ACQUIRED)
    first = attempt.tell(Returned(b"result"), 9.0)
    assert isinstance(attempt.tell(DOWN, 9.9), Pause)
    assert attempt.tell(Paused(), 10.1) == first
    attempt.tell(DONE, 10.1)
    assert isinstance(attempt.conclusion, flow.Completed)


def test_c3_a_release_repeated_past_the_lease_is_known_to_be_released() -> None:
    attempt = Attempt()
    attempt.tell(ACQUIRED)
    attempt.tell(Raised(), 9.0)
    attempt.tell(DOWN, 9.9)
    assert isinstance(attempt.tell(Paused(), 10.1), Release)
    attempt.tell(DONE, 10.1)
    assert isinstance(attempt.conclusion, flow.Failed)
    assert attempt.conclusion.released


def test_c3_a_repeated_release_that_lost_was_done_before_somebody_took_the_record() -> None:
    """Its caller gets what the work raised, not that another attempt took over."""
    attempt = Attempt()
    attempt.tell(ACQUIRED)
    attempt.tell(Raised(), 1.0)
    attempt.tell(DOWN, 1.0)
    attempt.tell(Paused(), 1.05)
    attempt.tell(LOST, 1.1)
    assert isinstance(attempt.conclusion, flow.Failed)
    assert attempt.conclusion.released


def test_c10_past_the_complete_timeout_the_caller_gets_the_result_and_it_lingers() -> None:
    attempt = Attempt(Policy(complete_timeout=0.1))
    attempt.tell(ACQUIRED)
    command = attempt.tell(Returned(b"result"))
    attempt.tell(DOWN, 0.0)
    attempt.tell(Paused(), 0.05)
    lingering = attempt.tell(DOWN, 0.05)
    assert isinstance(lingering, Linger)
    assert lingering.last == command
    attempt.tell(None, 0.05)
    assert isinstance(attempt.conclusion, flow.Completed)
    assert not attempt.conclusion.stored


@pytest.mark.parametrize(
    ("outcome", "policy", "released"),
    [
        (Raised(), Policy(), True),
        (Raised(unknown=True), Policy(), False),
        (Cancelled(), Policy(), False),
        (Cancelled(), Policy(release_on_cancel=True), True),
    ],
    ids=["raised", "unknown", "cancelled", "cancelled and released"],
)
def test_c5_what_releases(outcome: Reply, policy: Policy, released: bool) -> None:
    attempt = Attempt(policy)
    attempt.tell(ACQUIRED)
    command = attempt.tell(outcome)
    assert isinstance(command, Release) is released
    if released:
        attempt.tell(DONE)
    assert isinstance(attempt.conclusion, flow.Failed)
    assert attempt.conclusion.released is released


def test_c18_a_duplicate_waits_and_no_longer_than_the_policy_says() -> None:
    attempt = Attempt(Policy(wait=1.0, poll=0.7))
    assert attempt.tell(Running(5.0), 0.0) == Pause(0.7, waiting=True)
    assert attempt.tell(Paused(), 0.75) == CLAIM
    assert attempt.tell(Running(4.0), 0.75) == Pause(0.25, waiting=True)
    assert attempt.tell(Paused(), 1.0) == CLAIM
    attempt.tell(Running(3.0), 1.0)
    assert attempt.conclusion == flow.Busy(3.0)


def test_c18_a_waiter_that_may_wait_no_more_is_told_that_it_runs() -> None:
    attempt = Attempt(Policy(wait=1.0))
    attempt.tell(Running(5.0))
    attempt.tell(Paused(on=False))
    assert attempt.conclusion == flow.Busy(5.0)


def test_c21_an_earlier_fingerprint_is_claimed_under_its_own_algorithm() -> None:
    attempt = Attempt(known=b"\1\0same")
    assert attempt.tell(Mismatch(b"\1\0same")) == replace(CLAIM, fingerprint=b"\1\0same")
    assert isinstance(attempt.tell(ACQUIRED), Run)


def test_c21_a_fingerprint_of_an_unknown_algorithm_is_neither_run_nor_a_mismatch() -> None:
    attempt = Attempt(known=None)
    attempt.tell(Mismatch(b"\x09\x09later"))
    assert isinstance(attempt.conclusion, flow.Foreign)


@pytest.mark.parametrize("stored", [b"\1\1other", b"\1\1"])
def test_other_input_is_a_mismatch(stored: bytes) -> None:
    attempt = Attempt()
    attempt.tell(Mismatch(stored))
    assert attempt.conclusion == flow.Mismatched()


def test_a_reply_that_does_not_belong_to_its_command_is_an_error() -> None:
    with pytest.raises(TypeError, match="broke the protocol"):
        Attempt().tell(DONE)


def test_the_table_leads_only_to_states_and_conclusions() -> None:
    states = {flow.START, flow.RUNNING, flow.RENEWING, flow.SETTLING, flow.OVERTAKEN}
    led = {to for leads in flow.TABLE.values() for to in leads}
    assert {to for to in led if to not in states} <= {
        "Completed", "Replayed", "Busy", "Failed", "Mismatched", "Refused", "Down", "Foreign",
    }  # fmt: skip
    assert {state for state, _ in flow.TABLE} == states


def test_c3_a_claim_that_went_unanswered_is_disowned_before_its_caller_is_told_busy() -> None:
    """Its sending may still arrive once the holder has gone, and would then hold the operation for nobody."""
    steps = flow.attempt(CLAIM, Policy(), 0.0)
    assert next(steps) == CLAIM
    assert steps.send((DOWN, 0.1)) == CLAIM
    assert steps.send((Running(5.0), 0.2)) == Disown(CLAIM)
    with pytest.raises(StopIteration) as stop:
        steps.send((None, 0.2))
    assert stop.value.value == flow.Busy(5.0)
