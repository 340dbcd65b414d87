"""The protocol under every interleaving; what the explorer checks at each step stands in `invariants.py`.

Invariants I1 to I5, I7 and I10, rules C2, C3, C7, C13 and C14; and that every path ends.
"""

from collections.abc import Mapping
from functools import cache

import pytest

from retryproof.core import flow
from tests.interleavings.callers import Edge
from tests.interleavings.explorer import Report, Scenario, explore
from tests.interleavings.scenarios import PAIRS, TRIOS

CONCLUSIONS = {"Completed", "Replayed", "Busy", "Failed", "Mismatched", "Refused", "Down", "Foreign"}


@cache
def _explored(name: str) -> Report:
    return explore(PAIRS[name])


def _table() -> set[Edge]:
    return {(state, reply, led) for (state, reply), leads in flow.TABLE.items() for led in leads}


@pytest.mark.parametrize("name", PAIRS)
def test_invariants_hold_for_two_callers(name: str) -> None:
    report = _explored(name)
    assert report.worlds > 1
    assert report.edges <= _table()


def test_every_entry_of_the_table_is_taken_and_no_other() -> None:
    reports = [_explored(name) for name in PAIRS]
    assert set().union(*(report.edges for report in reports)) == _table()
    assert set().union(*(report.conclusions for report in reports)) == CONCLUSIONS


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRIOS)
def test_invariants_hold_for_three_callers(name: str) -> None:
    _check(TRIOS, name)


def _check(scenarios: Mapping[str, Scenario], name: str) -> None:
    report = explore(scenarios[name], ways=False)
    assert report.worlds > 10_000
    assert report.edges <= _table()
