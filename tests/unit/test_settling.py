"""How an attempt is settled, command by command, and what a new record's token is."""

from dataclasses import replace

import pytest

from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Cancelled,
    Claim,
    Complete,
    Found,
    Linger,
    Look,
    Pause,
    Raised,
    Release,
    Reply,
    Returned,
    Run,
    Unreachable,
    WorkOutcome,
)
from retryproof.core.flow import Busy, Completed, Conclusion, Failed, Flow, attempt
from retryproof.core.policy import Policy
from retryproof.core.record import Record, State, decide

LEASE = 10.0
CLAIM = Claim(
    id=b"i" * 32, fingerprint=b"\0\0same", nonce=b"n" * 16, lease=LEASE, retention=60.0, unsettled_retention=60.0
)
DOWN = Unreachable(OSError("gone"))


def settle(outcome: WorkOutcome, policy: Policy, now: float = 1.0) -> tuple[Flow, object]:
    """A flow whose work came to this, and its first command after that."""
    flow = attempt(CLAIM, policy, 0.0)
    assert next(flow) is CLAIM
    run = flow.send((Acquired(7, 1, 0, CLAIM.nonce), 0.0))
    assert isinstance(run, Run)
    return flow, flow.send((outcome, now))


def conclude(flow: Flow, reply: Reply, now: float) -> Conclusion:
    with pytest.raises(StopIteration) as stop:
        flow.send((reply, now))
    conclusion: Conclusion = stop.value.value
    return conclusion


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [(Returned(b"result"), Complete), (Returned(None), Complete), (Raised(), Release), (Cancelled(), Release)],
    ids=str,
)
def test_c10_what_the_store_does_not_take_in_time_is_left_to_the_background(
    outcome: WorkOutcome, kind: type[Complete | Release]
) -> None:
    """The caller of a result gets it, marked; a failure is not said to be given back."""
    flow, command = settle(outcome, Policy(complete_timeout=1.0, release_on_cancel=True))
    assert isinstance(command, kind)
    for now in (1.0, 1.1, 1.3):
        pause = flow.send((DOWN, now))
        assert isinstance(pause, Pause)
        assert flow.send((None, now + pause.seconds)) == command
    linger = flow.send((DOWN, 1.7))  # the next pause would end too late
    assert isinstance(linger, Linger)
    assert linger.last == command
    conclusion = conclude(flow, None, 1.7)
    if kind is Complete:
        assert isinstance(outcome, Returned)
        assert conclusion == Completed(linger.hold, outcome.result, stored=False)
    else:
        assert conclusion == Failed(linger.hold, released=False)


@pytest.mark.parametrize("late", [LEASE, LEASE + 1.0])
@pytest.mark.parametrize("outcome", [Returned(b"result"), Raised()], ids=str)
def test_c6_past_its_own_count_of_the_lease_it_settles_as_before(outcome: WorkOutcome, late: float) -> None:
    early, command = settle(outcome, Policy(), now=LEASE - 0.1)
    assert isinstance(command, Complete | Release)
    flow, same = settle(outcome, Policy(), now=late)
    assert same == command
    assert type(conclude(flow, DONE, late)) is type(conclude(early, DONE, LEASE))


@pytest.mark.parametrize("outcome", [Returned(b"result"), Raised()], ids=str)
def test_c8_who_lost_the_lease_looks_for_the_winner(outcome: WorkOutcome) -> None:
    flow, _ = settle(outcome, Policy())
    assert flow.send((LOST, 1.0)) == Look(CLAIM.id)
    winner, _ = decide(None, replace(CLAIM, nonce=b"w" * 16), 1)
    assert conclude(flow, Found(winner), 1.0) == Busy(0.0, overtaken=True)


def test_c10_who_finds_the_record_gone_gets_its_own_result_all_the_same() -> None:
    flow, _ = settle(Returned(b"result"), Policy())
    flow.send((LOST, 1.0))
    conclusion = conclude(flow, Found(None), 1.0)
    assert isinstance(conclusion, Completed)
    assert (conclusion.result, conclusion.stored, conclusion.gone) == (b"result", False, True)


def test_c10_who_finds_the_record_gone_gets_its_own_error_all_the_same() -> None:
    flow, _ = settle(Raised(), Policy())
    flow.send((LOST, 1.0))
    assert isinstance(conclude(flow, Found(None), 1.0), Failed)


@pytest.mark.parametrize("outcome", [Raised(unknown=True), Cancelled()], ids=str)
def test_c5_what_may_have_had_its_effect_is_not_given_back(outcome: WorkOutcome) -> None:
    flow = attempt(CLAIM, Policy(), 0.0)
    next(flow)
    run = flow.send((Acquired(7, 1, 0, CLAIM.nonce), 0.0))
    assert isinstance(run, Run)
    assert conclude(flow, outcome, 1.0) == Failed(run.hold, released=False)


@pytest.mark.parametrize("clock", ["on", "back"])
def test_c2_a_token_never_comes_back_where_an_expired_record_is_replaced(clock: str) -> None:
    """The store's clock may have been set back since."""
    record, _ = decide(None, CLAIM, 1_000)
    assert isinstance(record, Record)
    now = 2_000 if clock == "on" else 500
    over = replace(record, state=State.COMPLETED, expires_at=0)
    born, reply = decide(over, CLAIM, now)
    assert isinstance(born, Record)
    assert isinstance(reply, Acquired)
    assert born.token == reply.token == max(1_001, now)
    assert (born.attempt, born.deaths, born.birth, born.checkpoints) == (1, 0, CLAIM.nonce, {})
