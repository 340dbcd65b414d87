"""H8, H10, H11, T1: how a run ends, as a table without a server."""

from itertools import product

import pytest

from retryproof.http import ending
from retryproof.http.ending import (
    ANSWERED,
    CUT,
    HAPPENINGS,
    JOINED,
    LEFT_UNKNOWN,
    RAISED,
    RECORDS,
    RELEASED,
    RESPONSE,
    ROWS,
    SENDINGS,
    STOPPED,
    TABLE,
    UNKNOWN,
    WORKS,
    Row,
    answer_of,
    table,
)
from retryproof.http.recorder import COMPLETE, HELD, REACHES


def test_every_combination_has_an_ending_and_only_one() -> None:
    assert set(TABLE) == set(product(HAPPENINGS, REACHES, WORKS))
    with pytest.raises(ValueError, match="Two rows"):
        table((*ROWS, Row((RAISED,), (HELD,), (JOINED,), TABLE[RAISED, HELD, JOINED])))


def test_every_word_of_the_table_is_one_of_those_that_are_explained() -> None:
    assert {found.record for found in TABLE.values()} == set(RECORDS)
    assert {found.there for found in TABLE.values()} | {found.left for found in TABLE.values()} == set(SENDINGS)


def test_h11_only_a_whole_response_is_ever_done() -> None:
    done = (ending.COMPLETED, ending.COMPLETED_ALONE)
    assert {reach for (_, reach, _), found in TABLE.items() if found.record in done} == {COMPLETE}
    assert {found.there for found in TABLE.values() if found.record in done} == {RESPONSE}


def test_h10_what_is_not_whole_never_ends_cleanly() -> None:
    unfinished = [found for (_, reach, _), found in TABLE.items() if reach != COMPLETE]
    assert RESPONSE not in {found.there for found in unfinished} | {found.left for found in unfinished}


def test_h10_joined_work_that_is_not_whole_is_rolled_back_and_may_run_again() -> None:
    for happened, reach in product((ANSWERED, STOPPED), REACHES):
        alone, joined = (TABLE[happened, reach, work] for work in WORKS)
        if alone.record == LEFT_UNKNOWN:
            assert joined.record == RELEASED
        assert alone.there == joined.there


def test_h11_what_raises_has_raised_whoever_left() -> None:
    assert {TABLE[RAISED, reach, work].record for reach, work in product(REACHES, WORKS)} == {RELEASED}


def test_c5_what_was_never_begun_is_given_back_whatever_is_answered() -> None:
    never = [TABLE[ending.NOT_BEGUN, reach, work] for reach, work in product(REACHES, WORKS)]
    assert {found.record for found in never} == {RELEASED}
    assert TABLE[ending.NOT_BEGUN, COMPLETE, JOINED].there == RESPONSE


def test_c5_an_unknown_outcome_is_never_released_or_done() -> None:
    says = (UNKNOWN, ending.UNKNOWN_ANSWERED, ending.UNKNOWN_RAISED)
    assert {TABLE[said, reach, work].record for said, reach, work in product(says, REACHES, WORKS)} == {LEFT_UNKNOWN}
    assert TABLE[UNKNOWN, COMPLETE, JOINED].there == ending.PROBLEM  # nobody sees a success that is not stored
    assert TABLE[UNKNOWN, HELD, JOINED].there != CUT


@pytest.mark.parametrize(
    ("status", "kept", "happened"),
    [
        (201, True, ending.ANSWERED),
        (404, True, ending.ANSWERED),
        (500, True, ending.ANSWERED_FAILURE),
        (399, False, ending.DECLINED_SUCCESS),
        (409, False, ending.DECLINED),
        (503, False, ending.DECLINED),
    ],
)
def test_t1_what_an_answer_is(status: int, kept: bool, happened: str) -> None:
    assert answer_of(status, kept=kept) == happened
