"""When the keeper's thread looks: in time for every lease (C6), and not once for each operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from retryproof.core.record import Record
from retryproof.stores.keeper import Keeper
from retryproof.stores.opened import Opened
from tests.engine.support import SECONDS, Turnstile, hold_of, make_claim, wait_until


@pytest.fixture
def store() -> Turnstile:
    return Turnstile()


@pytest.fixture
def keeper(store: Turnstile) -> Iterator[Keeper]:
    keeper = Keeper(lambda: store, owns=False, max_batch=16)
    yield keeper
    keeper.close()


def test_short_operations_wake_the_thread_once_for_all_of_them(
    store: Turnstile, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[None] = []
    notify = keeper._mutex.notify

    def count() -> None:
        woken.append(None)
        notify()

    monkeypatch.setattr(keeper._mutex, "notify", count)
    for number in range(200):
        hold = hold_of(store, make_claim(f"short {number}", lease=10.0))
        keeper.watch(hold)
        keeper.unwatch(hold)
    assert len(woken) <= 5  # the first, and where the thread was just looking


@pytest.mark.parametrize("lease", [0.3, 60.0], ids=["as short", "long"])
def test_c6_an_operation_after_short_ones_is_renewed_in_time(store: Turnstile, keeper: Keeper, lease: float) -> None:
    """The thread was asked to look by an operation that has ended, later or earlier than this one is due."""
    for number in range(20):
        short = hold_of(store, make_claim(f"short {number}", lease=lease))
        keeper.watch(short)
        keeper.unwatch(short)
    kept = hold_of(store, make_claim("kept", lease=0.3))
    keeper.watch(kept)
    wait_until(lambda: bool(store.renewals))
    assert not kept.lost


def test_a_thread_that_was_asked_to_look_late_ends_all_the_same(
    store: Turnstile, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retryproof.stores.keeper.IDLE_SECONDS", 0.05)
    short = hold_of(store, make_claim("short", lease=0.3))
    keeper.watch(short)
    keeper.unwatch(short)
    thread = keeper._thread
    if thread is not None:
        thread.join(SECONDS)
        assert not thread.is_alive()
    again = hold_of(store, make_claim("again", lease=0.3))
    keeper.watch(again)
    wait_until(lambda: bool(store.renewals))


def test_c6_after_an_outage_leases_are_renewed_though_many_claims_wait_to_be_released() -> None:
    """The store answers to those look-ups themselves, which makes no other look-up due."""

    class Counted(Turnstile):
        looks = 0

        def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
            self.looks += 1
            return super().get(ids)

    store = Counted()
    opened = Opened(store)
    keeper = opened.background
    keeper._fail()  # as after a call without an answer
    for number in range(100):
        keeper.disown(make_claim(f"gone {number}"))
    wait_until(lambda: store.looks > 0)
    held = hold_of(store, make_claim(lease=0.3))
    deadline = held.deadline
    keeper.watch(held)
    wait_until(lambda: held.deadline > deadline + 0.3)  # renewed twice or more
    assert not keeper._troubled
    assert store.looks < 50
    keeper.unwatch(held)
    opened.close()
