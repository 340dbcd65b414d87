"""What a twin is told in the process that holds its operation (C10): the table of `core.twin`, entry by entry."""

from dataclasses import replace

import pytest

from retryproof.core import twin
from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Claim,
    Finished,
    Mismatch,
    Reply,
    Running,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.core.hold import NEVER, Hold

CLAIM = Claim(
    id=b"i" * 32, fingerprint=b"\1\1same", nonce=b"n" * 16, lease=10.0, retention=100.0, unsettled_retention=1_000.0
)
TWIN = replace(CLAIM, nonce=b"t" * 16)
OTHER = replace(TWIN, fingerprint=b"\1\1other")
SILENCE = Unreachable(StoreUnavailable("no answer"), sent=False)
FROM_MEMORY = Finished(b"paid", 1, 5, "trace", stored=False)


def held() -> Hold:
    return Hold(CLAIM, Acquired(token=7, attempt=1, first_seen=5, birth=CLAIM.nonce, trace="trace"), 0.0)


def test_a_live_lease_answers_without_a_word_to_the_store() -> None:
    hold = held()
    assert twin.first(hold, None, 4.0) is None
    assert twin.told(hold, None, TWIN, None, 4.0) == Running(6.0)
    assert twin.told(hold, None, OTHER, None, 4.0) == Mismatch(CLAIM.fingerprint)


def test_a_lease_that_is_over_is_renewed_first() -> None:
    hold = held()
    assert twin.first(hold, None, 10.0) == hold.renew()
    assert twin.told(hold, None, TWIN, SILENCE, 11.0) == Running(0.0)
    assert twin.told(hold, None, OTHER, SILENCE, 11.0) == Mismatch(CLAIM.fingerprint)
    assert twin.told(hold, None, TWIN, LOST, 10.0) is None
    hold.renewed(10.0)
    assert twin.told(hold, None, TWIN, DONE, 12.0) == Running(8.0)


@pytest.mark.parametrize(
    ("heard", "told"), [(DONE, None), (LOST, None), (SILENCE, FROM_MEMORY)], ids=["done", "lost", "no answer"]
)
def test_a_result_that_lingers_is_stored_first_and_else_given_from_memory(heard: Reply, told: Reply) -> None:
    hold = held()
    last = hold.complete(b"paid")
    assert twin.first(hold, last, 4.0) == last
    assert twin.told(hold, last, TWIN, heard, 4.0) == told
    assert twin.told(hold, last, OTHER, heard, 4.0) == (told and Mismatch(CLAIM.fingerprint))


def test_a_failure_that_lingers_is_given_back_before_a_twin_claims() -> None:
    hold = held()
    last = hold.release()
    assert twin.first(hold, last, 4.0) == last
    assert twin.told(hold, last, TWIN, DONE, 4.0) is None
    assert twin.told(hold, last, TWIN, SILENCE, 4.0) == SILENCE


def test_c6_one_that_is_not_renewed_any_more_speaks_no_more() -> None:
    hold = held()
    hold.due = NEVER
    assert twin.first(hold, None, 20.0) is None
    assert twin.told(hold, None, TWIN, None, 20.0) is None
