"""What a failure counts towards, and when a message is given up: pure (T6)."""

from dataclasses import replace
from typing import Any, get_args
from uuid import uuid4

import pytest

from retryproof.core.message import UNCOUNTED, Message, queue_of
from retryproof.outbox.policy import COUNTS, RelayPolicy, conclude
from retryproof.publishers import DELIVERED, UNTRIED, Failed, Outcome
from retryproof.publishers.base import FailureKind

POLICY = RelayPolicy()
SECOND = 1_000_000
NOW = 100 * 3_600 * SECOND


def message(key: str = "k", **more: Any) -> Message:
    id = uuid4()
    return replace(Message(id, "t", b"", key=key, queue=queue_of(key, id)), **more)


def test_t6_each_kind_of_failure_has_its_row() -> None:
    assert set(COUNTS) == {*get_args(FailureKind), "refusal", "death"}


@pytest.mark.parametrize(
    ("failure", "before", "dead"),
    [
        (Failed("400"), {"answers": 14}, False),
        (Failed("400"), {"answers": 15}, True),
        (Failed("no connection", kind="unreachable"), {"answers": 15, "attempts": 10_000}, False),
        (Failed("no connection", kind="unreachable"), {"failed_at": NOW - 19 * 3_600 * SECOND}, False),
        (Failed("no connection", kind="unreachable"), {"failed_at": NOW - 20 * 3_600 * SECOND}, True),
        (Failed("400"), {"failed_at": NOW - 20 * 3_600 * SECOND}, True),
        (Failed("410", permanent=True), {}, True),
        (Failed("no route", kind="unsent"), {"answers": 99, "failed_at": 0}, False),
    ],
)
def test_t6_a_message_is_given_up_by_what_its_failures_count_towards(
    failure: Failed, before: dict[str, Any], dead: bool
) -> None:
    conclusion, totals = conclude([message(**before)], [failure], POLICY, now=NOW)
    assert (bool(conclusion.dead), totals.dead) == (dead, int(dead))
    assert bool(conclusion.failed) != dead


def test_t6_an_answer_counts_and_a_receiver_out_of_reach_does_not() -> None:
    answered, silent, waiting = message("a", attempts=3, answers=1), message("b", attempts=3, answers=1), message("c")
    outcomes: list[Outcome] = [
        Failed("500"),
        Failed("503", kind="unreachable"),
        Failed("no route", retry_after=30.0, kind="unsent"),
    ]
    conclusion, totals = conclude([answered, silent, waiting], outcomes, POLICY, now=NOW)
    assert [(f.attempts, f.answers) for f in conclusion.failed] == [(4, 2), (4, 1), (0, UNCOUNTED)]
    assert conclusion.failed[2].delay == 30 * SECOND
    assert (totals.failed, totals.untried) == (2, 1)


def test_t6_pauses_grow_from_a_second_to_an_hour_and_heed_retry_after() -> None:
    longest = [max(POLICY.delay(attempts) for _ in range(300)) for attempts in (1, 8, 12, 40)]
    assert [limit * 0.9 < found <= limit for found, limit in zip(longest, (1, 128, 2_048, 3_600), strict=True)] == [
        True
    ] * 4
    conclusion, _ = conclude([message()], [Failed("429", retry_after=7_000.0, kind="unreachable")], POLICY, now=NOW)
    assert conclusion.failed[0].delay == 7_000 * SECOND


def test_t6_answers_take_hours_until_they_are_too_many() -> None:
    """With full jitter the mean is half of the limits: two minutes of errors must not empty an outbox."""
    mean = sum(min(POLICY.max_backoff, POLICY.backoff * 2**n) / 2 for n in range(POLICY.max_attempts - 1))
    assert mean > 3_600
    assert POLICY.give_up_after < 86_400


def test_t6_only_the_first_failure_of_a_chain_counts() -> None:
    conclusion, totals = conclude(
        [message(), message(), message("b")], [Failed("400"), UNTRIED, DELIVERED], POLICY, now=NOW
    )
    assert (len(conclusion.failed), len(conclusion.done), totals.untried) == (1, 1, 1)
