"""Settling beside attempts that move at the same time: the record that was looked at, or nothing (O1, I1, I3)."""

import json
import os
import time

import pytest

from retryproof.cli.command import Refused
from retryproof.cli.settlement import LEASE, UNSETTLED_RETENTION, Decision, check_settleable, settle
from retryproof.cli.shown import state_of
from retryproof.core.commands import LOST, Abandoned, Acquired, Checkpoint, Claim, Complete, Done, Release, Running
from retryproof.core.record import SETTLED_BY_HAND, Record, State
from retryproof.reaper import reap_all
from retryproof.stores import MemoryStore
from retryproof.stores.keeper import Keeper
from tests.cli.conftest import FINGERPRINT, claim, found

DONE_WITH = Decision(True, b"result")
NEVER = Decision(False)
ENTRY = {"by": "ada"}


class Clock:
    now = 1_000_000_000

    def __call__(self) -> int:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += round(seconds * 1_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


def died(store: MemoryStore, clock: Clock) -> Record:
    claimed, _ = claim(store, lease=10.0)
    clock.forward(11.0)
    return found(store, claimed.id)


def again(record: Record, **more: object) -> Claim:
    return Claim(
        id=record.id,
        fingerprint=FINGERPRINT,
        nonce=os.urandom(16),
        lease=10.0,
        retention=60.0,
        unsettled_retention=60.0,
        **more,  # type: ignore[arg-type]  # options by name
    )


@pytest.mark.parametrize("settlement", [DONE_WITH, NEVER])
def test_i1_a_retry_that_was_faster_keeps_the_operation(store: MemoryStore, clock: Clock, settlement: Decision) -> None:
    record = died(store, clock)
    retry = again(record)
    (held,) = store.claim([retry])
    assert isinstance(held, Acquired)

    with pytest.raises(Refused, match="taken up by a retry"):
        settle(store, record, settlement, ENTRY)

    assert store.complete([Complete(record.id, retry.nonce, held.token, b"r")]) == [Done()]


@pytest.mark.parametrize("settlement", [DONE_WITH, NEVER])
def test_i3_a_retry_that_finished_meanwhile_stays_as_it_is(
    store: MemoryStore, clock: Clock, settlement: Decision
) -> None:
    record = died(store, clock)
    retry = again(record)
    (held,) = store.claim([retry])
    assert isinstance(held, Acquired)
    store.complete([Complete(record.id, retry.nonce, held.token, b"r")])

    with pytest.raises(Refused, match="changed while you decided"):
        settle(store, record, settlement, ENTRY)

    assert found(store, record.id).result == b"r"


@pytest.mark.parametrize("settlement", [DONE_WITH, NEVER])
def test_an_attempt_that_began_and_died_after_the_look_is_not_settled(
    store: MemoryStore, clock: Clock, settlement: Decision
) -> None:
    record = died(store, clock)
    store.claim([again(record)])
    clock.forward(11.0)

    with pytest.raises(Refused, match="changed while you decided"):
        settle(store, record, settlement, ENTRY)

    assert found(store, record.id).state is State.IN_PROGRESS
    assert isinstance(store.claim([again(record)])[0], Running)
    clock.forward(LEASE + 1)
    check_settleable(found(store, record.id))


@pytest.mark.parametrize("settlement", [DONE_WITH, NEVER])
def test_a_record_that_is_gone_is_not_made_anew(store: MemoryStore, clock: Clock, settlement: Decision) -> None:
    record = died(store, clock)
    store.evict([record.id])

    with pytest.raises(Refused, match="gone"):
        settle(store, record, settlement, ENTRY)

    assert store.get([record.id]) == [None]


def failed(store: MemoryStore, key: str = "k") -> Record:
    """An attempt kept something, and then failed and said so."""
    claimed, held = claim(store, key)
    store.checkpoint([Checkpoint(claimed.id, claimed.nonce, held.token, "charge", b"ch_1")])
    store.release([Release(claimed.id, claimed.nonce, held.token)])
    return found(store, claimed.id)


def test_o1_what_failed_after_it_had_kept_something_can_be_settled(store: MemoryStore, clock: Clock) -> None:
    record = failed(store)
    check_settleable(record)
    settle(store, record, DONE_WITH, ENTRY)
    assert (found(store, record.id).state, found(store, record.id).result) == (State.COMPLETED, b"result")


def test_i3_what_failed_and_went_on_meanwhile_is_not_settled(store: MemoryStore, clock: Clock) -> None:
    record = failed(store)
    retry = again(record)
    (held,) = store.claim([retry])
    assert isinstance(held, Acquired)
    store.checkpoint([Checkpoint(record.id, retry.nonce, held.token, "receipt", b"re_1")])
    store.release([Release(record.id, retry.nonce, held.token)])
    with pytest.raises(Refused, match="changed while you decided"):
        settle(store, record, DONE_WITH, ENTRY)


def test_c12_the_end_of_what_an_operator_released_is_no_unknown_outcome(store: MemoryStore, clock: Clock) -> None:
    settle(store, died(store, clock), NEVER, ENTRY)
    settle(store, failed(store, "k2"), NEVER, ENTRY)
    clock.forward(UNSETTLED_RETENTION + 1)
    totals = reap_all(store, events=[])
    assert (totals.settled, totals.unsettled) == (1, 1), "what was kept beside the operator's word is still told"


def fail_again(store: MemoryStore, record: Record) -> None:
    """One more attempt, which fails cleanly."""
    retry = again(record)
    (held,) = store.claim([retry])
    assert isinstance(held, Acquired)
    store.release([Release(record.id, retry.nonce, held.token)])


def test_c12_what_ended_unknown_and_then_failed_is_shown_as_abandoned_and_can_be_settled(
    store: MemoryStore, clock: Clock
) -> None:
    record = died(store, clock)
    fail_again(store, record)
    record = found(store, record.id)
    assert (record.state, state_of(record)) == (State.RELEASED, "abandoned")
    check_settleable(record)
    settle(store, record, NEVER, ENTRY)
    assert state_of(found(store, record.id)) == "released"
    assert isinstance(store.claim([again(record, on_abandoned="refuse")])[0], Acquired)


def test_c12_an_operators_word_does_not_cover_what_ended_unknown_after_it(store: MemoryStore, clock: Clock) -> None:
    record = died(store, clock)
    settle(store, record, NEVER, ENTRY)
    store.claim([again(record)])  # and dies
    clock.forward(11.0)
    fail_again(store, record)
    clock.forward(UNSETTLED_RETENTION + 1)
    totals = reap_all(store, events=[])
    assert (totals.settled, totals.unsettled) == (0, 1)


def test_c12_a_claim_that_the_keeper_gives_back_leaves_what_ended_unknown(store: MemoryStore, clock: Clock) -> None:
    record = died(store, clock)
    claim = again(record)
    store.claim([claim])  # its answer is lost
    keeper = Keeper(lambda: store, owns=False, max_batch=10)
    keeper.disown(claim)
    end = time.monotonic() + 10
    while not keeper.idle and time.monotonic() < end:
        time.sleep(0.005)
    keeper.close()
    released = found(store, record.id)
    assert (released.state, released.settled) == (State.RELEASED, False)
    assert isinstance(store.claim([again(record, on_abandoned="refuse")])[0], Abandoned)
    clock.forward(2 * 86_400)
    assert [ended.id for ended in store.reap().unsettled] == [record.id]


def test_c2_the_dead_attempts_late_result_is_fenced_off(store: MemoryStore, clock: Clock) -> None:
    claimed, held = claim(store, lease=10.0)
    clock.forward(11.0)
    settle(store, found(store, claimed.id), DONE_WITH, ENTRY)

    assert store.complete([Complete(claimed.id, claimed.nonce, held.token, b"late")]) == [LOST]
    assert found(store, claimed.id).result == b"result"


def test_c12_retention_starts_when_it_is_settled(store: MemoryStore, clock: Clock) -> None:
    record = died(store, clock)
    settle(store, record, DONE_WITH, ENTRY)

    settled = found(store, record.id)
    assert settled.expires_at == clock.now + round(record.retention * 1_000_000)


def test_o1_a_released_record_says_who_released_it(store: MemoryStore, clock: Clock) -> None:
    record = died(store, clock)
    settle(store, record, NEVER, ENTRY)

    released = found(store, record.id)
    assert released.state is State.RELEASED
    assert json.loads(released.checkpoints[SETTLED_BY_HAND]) == ENTRY


def test_c15_a_settlement_that_dies_half_way_counts_as_no_death(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = died(store, clock)
    deaths_if_it_dies = record.deaths + 1

    def die(commands: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "complete", die)
    with pytest.raises(KeyboardInterrupt):
        settle(store, record, DONE_WITH, ENTRY)
    clock.forward(LEASE + 1)

    left = found(store, record.id)
    check_settleable(left)
    assert left.deaths + left.counts == deaths_if_it_dies


def test_c7_a_refused_operation_is_settled_all_the_same(store: MemoryStore, clock: Clock) -> None:
    record = died(store, clock)
    (refused,) = store.claim([again(record, on_abandoned="refuse")])
    assert isinstance(refused, Abandoned)

    settle(store, found(store, record.id), DONE_WITH, ENTRY)

    assert found(store, record.id).state is State.COMPLETED
