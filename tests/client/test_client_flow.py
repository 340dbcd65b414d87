"""The client's decisions, without a server: one table a rule."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from typing import Any

import pytest

from retryproof.client import RetryBudget, RetryPolicy
from retryproof.client.flow import (
    Answered,
    AttemptEnd,
    Broken,
    ClientCall,
    Resumed,
    Send,
    Stop,
    Wait,
    asks_for_retry,
    pause_before,
    problem_code,
    retry_after,
    retrying,
)
from retryproof.core.errors import ConfigurationError, InvalidKey
from retryproof.core.operation_key import current_operation_key, operation_key

POLICY = RetryPolicy(backoff=1.0, max_backoff=8.0, deadline=100.0)
KEYED = ClientCall("POST", "k", started=0.0)
BARE = ClientCall("POST", None, started=0.0)


def answered(status: int, headers: dict[str, str] | None = None, code: str | None = None, now: float = 0.0) -> Answered:
    return Answered(status, headers or {}, now, wall_clock=0.0, code=code)


def outcome(
    call: ClientCall, replies: Iterable[AttemptEnd], policy: RetryPolicy = POLICY, budget: RetryBudget | None = None
) -> Stop:
    """Run one call over these replies; pauses take no time."""
    flow = retrying(call, policy, budget or RetryBudget(burst=math.inf), lambda: 0.0)
    command = next(flow)
    now = 0.0
    for reply in replies:
        now = reply.now
        command = flow.send(reply)
        if isinstance(command, Wait):
            command = flow.send(Resumed(now + command.seconds))
    assert isinstance(command, Stop)
    return command


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_k2_retries_a_passing_failure_with_a_key(status: int) -> None:
    assert outcome(KEYED, [answered(status), answered(200)]) == Stop(2, "final")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_k2_does_not_retry_an_answered_post_without_a_key(status: int) -> None:
    assert outcome(BARE, [answered(status)]) == Stop(1, "unsafe")


@pytest.mark.parametrize("status", [200, 201, 302, 400, 401, 403, 404, 409, 410, 422, 501, 505])
def test_k2_takes_any_other_status_as_final(status: int) -> None:
    assert outcome(KEYED, [answered(status)]) == Stop(1, "final")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "put"])
def test_k2_retries_an_idempotent_method_without_a_key(method: str) -> None:
    assert outcome(ClientCall(method, None, 0.0), [Broken(True, 0.0), answered(200)]) == Stop(2, "final")


def test_k2_retries_a_connection_error_always() -> None:
    assert outcome(BARE, [Broken(False, 0.0), answered(200)]) == Stop(2, "final")


def test_k2_does_not_retry_a_post_without_a_key_that_broke_after_sending() -> None:
    assert outcome(BARE, [Broken(False, 0.0), Broken(True, 0.0)]) == Stop(2, "unsafe")


@pytest.mark.parametrize(
    ("code", "retried"), [("in-progress", True), ("outcome-unknown", False), ("other", False), (None, False)]
)
def test_k2_retries_a_conflict_only_while_the_twin_is_running(code: str | None, retried: bool) -> None:
    assert asks_for_retry(answered(409, code=code), POLICY) is retried


@pytest.mark.parametrize(
    ("status", "headers", "code", "retried"),
    [
        (409, {"stripe-should-retry": "true"}, None, True),
        (400, {"stripe-should-retry": "TRUE "}, None, True),
        (503, {"stripe-should-retry": "false"}, None, False),
        (422, {"transient-error": "true"}, None, True),
        (500, {"transient-error": "false"}, None, False),
        (500, {"transient-error": "maybe"}, None, True),
        (200, {"stripe-should-retry": "true"}, None, False),
        (409, {"stripe-should-retry": "true"}, "outcome-unknown", False),
    ],
)
def test_k2_obeys_the_advice_of_the_server(
    status: int, headers: dict[str, str], code: str | None, retried: bool
) -> None:
    assert asks_for_retry(answered(status, headers, code), POLICY) is retried


def test_k2_advice_does_not_make_an_unsafe_retry_safe() -> None:
    assert outcome(BARE, [answered(500, {"stripe-should-retry": "true"})]) == Stop(1, "unsafe")


def test_k3_stops_after_the_attempts_of_the_policy() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert outcome(KEYED, [answered(503)] * 3, policy) == Stop(3, "attempts")


def test_k3_starts_no_retry_past_the_deadline() -> None:
    assert outcome(KEYED, [answered(503, now=99.0), answered(503, now=100.0)]) == Stop(2, "deadline")


def test_k3_starts_no_retry_after_a_pause_that_took_too_long() -> None:
    flow = retrying(KEYED, POLICY, RetryBudget(), lambda: 0.0)
    next(flow)
    assert isinstance(flow.send(answered(503)), Wait)
    assert flow.send(Resumed(101.0)) == Stop(1, "deadline")


def test_k3_tells_a_retry_how_much_time_is_left() -> None:
    flow = retrying(KEYED, POLICY, RetryBudget(), lambda: 0.0)
    assert next(flow) == Send(1, None)
    flow.send(answered(503, now=30.0))
    assert flow.send(Resumed(40.0)) == Send(2, 60.0)


@pytest.mark.parametrize(("attempt", "ceiling"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (5000, 8.0)])
def test_k3_backs_off_exponentially_with_full_jitter(attempt: int, ceiling: float) -> None:
    drawn = iter([0.0, 0.5])
    pauses = [pause_before(attempt, POLICY, Broken(True, 0.0), drawn.__next__) for _ in range(2)]
    assert pauses == [0.0, ceiling / 2]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 -0000", 40.0),
        ("-3", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_k3_reads_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, wall_clock=60.0) == seconds


def test_k3_caps_retry_after_and_adds_jitter_to_it() -> None:
    reply = answered(503, {"retry-after": "9" * 400})
    assert pause_before(1, POLICY, reply, lambda: 0.5) == POLICY.max_retry_after + 0.5


def test_k3_a_spent_budget_stops_retries() -> None:
    budget = RetryBudget(ratio=0.1, per_second=0.0, burst=2.0)
    assert outcome(KEYED, [answered(503)] * 3, budget=budget) == Stop(3, "budget")
    assert outcome(KEYED, [answered(503)], budget=budget) == Stop(1, "budget")


def test_k3_ten_calls_buy_one_retry() -> None:
    budget = RetryBudget(ratio=0.1, per_second=0.0, burst=1.0)
    budget.withdraw(0.0)
    for _ in range(10):
        budget.deposit()
    assert (budget.withdraw(0.0), budget.withdraw(0.0)) == (True, False)


def test_k3_time_refills_the_budget_up_to_its_burst() -> None:
    budget = RetryBudget(ratio=0.0, per_second=1.0, burst=2.0)
    assert [budget.withdraw(0.0) for _ in range(3)] == [True, True, False]
    assert budget.withdraw(1.0)
    assert [budget.withdraw(1000.0) for _ in range(3)] == [True, True, False]


def test_k3_an_outage_is_not_amplified() -> None:
    budget = RetryBudget(ratio=0.1, per_second=0.0, burst=20.0)
    attempts = 0
    for _ in range(1000):
        flow = retrying(KEYED, POLICY, budget, lambda: 0.0)
        command = next(flow)
        while not isinstance(command, Stop):
            attempts += isinstance(command, Send)
            command = flow.send(Broken(False, 0.0) if isinstance(command, Send) else Resumed(0.0))
    assert 1000 < attempts <= 1000 * 1.1 + 20


@pytest.mark.parametrize(
    ("content_type", "body", "code"),
    [
        ("application/problem+json", b'{"code": "in-progress"}', "in-progress"),
        ("Application/Problem+JSON; charset=utf-8", b'{"code": "x"}', "x"),
        ("application/json", b'{"code": "in-progress"}', None),
        ("application/problem+json", b"{", None),
        ("application/problem+json", b"[]", None),
        ("application/problem+json", b'{"code": 1}', None),
        ("application/problem+json", b"\xff", None),
        (None, b'{"code": "in-progress"}', None),
    ],
)
def test_reads_the_code_of_a_problem_document(content_type: str | None, body: bytes, code: str | None) -> None:
    assert problem_code(content_type, body) == code


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_attempts": 1.5},
        {"max_attempts": True},
        {"deadline": 0},
        {"deadline": math.nan},
        {"backoff": -1},
        {"backoff": 9, "max_backoff": 1},
        {"max_retry_after": math.inf},
        {"retry_ratio": -0.1},
        {"header": "Bad Header"},
        {"methods": "POST"},
        {"methods": ["PO ST"]},
        {"statuses": [200]},
    ],
)
def test_refuses_a_policy_that_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RetryPolicy(**options)


def test_a_policy_is_a_value() -> None:
    assert RetryPolicy(methods=["post"]) == RetryPolicy(methods={"POST"})
    assert pickle.loads(pickle.dumps(POLICY)) == POLICY


def test_k1_a_block_makes_a_key_and_ends_with_it() -> None:
    with operation_key() as key:
        current = current_operation_key()
        assert current is not None
        assert current.key == key
        assert len(key) == 36
    assert current_operation_key() is None


def test_k1_an_inner_block_hides_the_outer_one() -> None:
    with operation_key("outer"), operation_key("inner"):
        current = current_operation_key()
        assert current is not None
        assert current.key == "inner"


@pytest.mark.parametrize("key", ["", "a b", 'a"b', "a\\b", "a,b", "a;b", "é", "a\n", "x" * 256])
def test_k1_refuses_a_key_that_servers_could_read_differently(key: str) -> None:
    with pytest.raises(InvalidKey), operation_key(key):
        pass


def test_k1_accepts_every_other_visible_character() -> None:
    visible = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"\\,;')
    with operation_key(visible) as key:
        assert key == visible
