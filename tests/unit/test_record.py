"""What `core.record` says beyond the table, which the conformance suite goes through on every store."""

from dataclasses import replace

import pytest

from retryproof.core.commands import DONE, LOST, Abandoned, Acquired, Claim, Complete, Release, Renew, Running
from retryproof.core.record import Record, State, decide, microseconds, renew, settle
from retryproof.testing import ManualClock

NOW = 1_000_000_000
CLAIM = Claim(
    id=b"i" * 32, fingerprint=b"\1\1", nonce=b"n" * 16, lease=10.0, retention=100.0, unsettled_retention=1_000.0
)


def _claimed(claim: Claim = CLAIM, record: Record | None = None, now: int = NOW) -> tuple[Record, Acquired]:
    written, reply = decide(record, claim, now)
    assert written is not None
    assert isinstance(reply, Acquired)
    return written, reply


def _settled(record: Record, command: Complete | Release, now: int = NOW) -> Record:
    written, reply = settle(record, command, now)
    assert reply == DONE
    assert written is not None
    return written


def test_a_token_is_the_time_and_grows_when_the_clock_goes_back() -> None:
    record, first = _claimed()
    assert first.token == NOW
    released = _settled(record, Release(CLAIM.id, CLAIM.nonce, first.token))
    _, second = _claimed(replace(CLAIM, nonce=b"m" * 16), released, NOW - 5_000_000)
    assert second.token == NOW + 1


def test_a_lease_ends_at_its_last_microsecond() -> None:
    record, _ = _claimed()
    assert record.live(record.lease_until - 1)
    assert not record.live(record.lease_until)


def test_c12_retention_ends_at_its_last_microsecond_and_only_what_is_settled_expires() -> None:
    record, acquired = _claimed()
    assert not record.expired(record.expires_at + 1)
    done = _settled(record, Complete(CLAIM.id, CLAIM.nonce, acquired.token, b""))
    assert done.expires_at == NOW + microseconds(CLAIM.retention)
    assert not done.expired(done.expires_at - 1)
    assert done.expired(done.expires_at)


@pytest.mark.parametrize(
    ("result", "state"), [(b"", State.COMPLETED), (b"0", State.COMPLETED), (None, State.TOMBSTONE)]
)
def test_only_none_makes_a_tombstone(result: bytes | None, state: State) -> None:
    record, acquired = _claimed()
    assert _settled(record, Complete(CLAIM.id, CLAIM.nonce, acquired.token, result)).state is state


def test_c3_a_late_duplicate_of_a_released_claim_takes_nothing() -> None:
    record, acquired = _claimed()
    released = _settled(record, Release(CLAIM.id, CLAIM.nonce, acquired.token))
    written, reply = decide(released, CLAIM, NOW + 1)
    assert written is None
    assert not isinstance(reply, Acquired)


def test_t1_what_was_committed_without_its_result_is_unsettled_and_an_operators_alone() -> None:
    record, acquired = _claimed()
    released = _settled(record, Release(CLAIM.id, CLAIM.nonce, acquired.token))
    later, retry = NOW + 1_000_000_000, replace(CLAIM, nonce=b"m" * 16)
    for left in (replace(record, committed=True), replace(released, committed=True)):
        assert not left.settled
        assert decide(left, retry, later) == (None, Abandoned("committed", 1))
        assert isinstance(decide(left, replace(retry, on_abandoned="settle"), later)[1], Acquired)
    assert isinstance(decide(replace(record, committed=True), retry, NOW)[1], Running)


def test_c2_nonce_and_token_must_both_be_current() -> None:
    record, acquired = _claimed()
    for nonce, token in ((CLAIM.nonce, acquired.token + 1), (b"x" * 16, acquired.token)):
        assert settle(record, Complete(CLAIM.id, nonce, token, b""), NOW) == (None, LOST)
        assert renew(record, Renew(CLAIM.id, nonce, token, 10.0), NOW) == (None, LOST)


def test_the_numbers_of_states_are_stored_and_stay() -> None:
    assert {state.name: state.value for state in State} == {
        "IN_PROGRESS": 1,
        "RELEASED": 2,
        "COMPLETED": 3,
        "TOMBSTONE": 4,
    }


def test_durations_are_rounded_to_the_microsecond() -> None:
    assert [microseconds(seconds) for seconds in (0, 1e-6, 0.3, 86_400.0)] == [0, 1, 300_000, 86_400_000_000]


def test_a_manual_clock_stands_still_until_it_is_moved_and_never_goes_back() -> None:
    clock = ManualClock()
    start = clock()
    clock.advance(1.5)
    assert (clock() - start, clock.seconds()) == (1_500_000, clock() / 1_000_000)
    with pytest.raises(ValueError, match="turn the clock back"):
        clock.advance(-1)


def test_completing_changes_nothing_but_what_the_result_settles() -> None:
    """The record is made anew, field by field: none may be forgotten."""
    running = Record(
        id=b"i",
        state=State.IN_PROGRESS,
        fingerprint=b"f",
        birth=b"b",
        nonce=b"n",
        token=7,
        attempt=2,
        deaths=1,
        counts=True,
        first_seen=3,
        lease_until=4,
        expires_at=5,
        retention=6.0,
        tenant=b"t",
        trace="trace",
        checkpoints={"step": b"kept"},
        read_at=8,
        committed=True,
    )
    written, _ = settle(running, Complete(b"i", b"n", 7, b"result"), now=100)
    assert written == replace(
        running, state=State.COMPLETED, result=b"result", checkpoints={}, lease_until=100, expires_at=6_000_100
    )
