"""A policy that makes no sense is an error when it is made, in words that say what to change."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from retryproof import Policy
from retryproof.core.errors import ConfigurationError

SECONDS = ["lease", "max_run", "retention", "unsettled_retention", "wait", "poll", "complete_timeout", "store_timeout"]


def test_the_defaults_are_those_of_the_rules() -> None:
    policy = Policy()
    assert (policy.lease, policy.max_run, policy.retention) == (10.0, 900.0, 86_400.0)
    assert (policy.unsettled_retention, policy.wait, policy.on_abandoned) == (30 * 86_400.0, 0.0, "rerun")
    assert (policy.max_attempts, policy.max_result) == (5, 1_048_576)
    assert (policy.complete_timeout, policy.store_timeout) == (5.0, 2.0)
    assert not policy.release_on_cancel


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [-1, -0.001, math.inf, -math.inf, math.nan, "10", None, True, 10**12])
def test_a_duration_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Policy(**{name: value})


@pytest.mark.parametrize("name", ["lease", "max_run", "retention", "unsettled_retention", "poll", "store_timeout"])
def test_a_duration_of_zero_is_refused_where_it_makes_no_sense(name: str) -> None:
    with pytest.raises(ConfigurationError, match="more than zero"):
        Policy(**{name: 0})  # type: ignore[arg-type]  # the name is one of the durations


def test_zero_is_a_duration_where_it_means_at_once() -> None:
    policy = Policy(wait=0, complete_timeout=0)
    assert (policy.wait, policy.complete_timeout) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"lease": 60, "retention": 30},
        {"lease": 60, "unsettled_retention": 30},
        {"lease": 60, "max_run": 30},
        {"lease": 0.005},
    ],
    ids=str,
)
def test_a_lease_that_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="lease"):
        Policy(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_attempts": 1.5},
        {"max_attempts": True},
        {"max_waiters": -1},
        {"max_result": -1},
        {"max_result": "1 MiB"},
    ],
    ids=str,
)
def test_a_count_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="whole number"):
        Policy(**options)


@pytest.mark.parametrize(
    "options", [{"on_abandoned": "retry"}, {"on_abandoned": ["rerun"]}, {"on_lease_lost": ""}], ids=str
)
def test_an_unknown_choice_is_refused_and_the_known_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be one of '"):
        Policy(**options)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Policy().lease = 1.0  # type: ignore[misc]  # that is what is tried


def test_equal_policies_are_equal_and_hash_alike() -> None:
    assert {Policy(lease=5), Policy(lease=5.0)} == {Policy(lease=5)}


def test_a_run_that_outlasts_the_unsettled_retention_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must not be reaped"):
        Policy(max_run=7200.0, unsettled_retention=3600.0)
