"""When a client retries: one generator, without I/O or clock (K1 to K3).

`retrying` yields `Send`, `Pause` and at last `Stop`. The caller performs each command, and sends back the reply:

    command         reply
    Send            Answered (an HTTP response) or Broken (no whole response)
    Wait           Resumed
    Stop            none: the last reply is the result

How far the failed attempt came decides whether the request may be sent again. An attempt that never reached the server
(`Broken.sent` is False) had no effect. Any other attempt may have had its effect. It is repeated only if that is
harmless: with a key, or with a method that is idempotent by RFC 9110.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Literal, assert_never

from retryproof.client.budget import RetryBudget
from retryproof.client.policy import RetryPolicy

IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})

# A server's own advice about retries: Stripe, Adyen.
ADVICE_HEADERS = ("stripe-should-retry", "transient-error")

StopReason = Literal["final", "unsafe", "attempts", "deadline", "budget"]


@dataclass(frozen=True, slots=True)
class ClientCall:
    """One logical operation: its method, its key if it has one, and the monotonic time at which it began."""

    method: str
    key: str | None
    started: float

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after an attempt that may have had its effect."""
        return self.key is not None or self.method.upper() in IDEMPOTENT_METHODS


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request. `time_left`: how long a retry may take; None for the first attempt, which keeps its limits."""

    attempt: int
    time_left: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait. Before that, the response and the connection of the failed attempt are released."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The last reply is the result. `reason` says why it is not tried again."""

    attempts: int
    reason: StopReason


@dataclass(frozen=True, slots=True)
class Answered:
    """A response: header names in lower case, `code` of its problem document, monotonic and Unix time of arrival."""

    status: int
    headers: Mapping[str, str]
    now: float
    wall_clock: float
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """No whole response. `sent` is False only if nothing of the request can have reached the server."""

    sent: bool
    now: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """A pause is over."""

    now: float


ClientCommand = Send | Wait | Stop
AttemptEnd = Answered | Broken | Resumed
CallFlow = Generator[ClientCommand, AttemptEnd, None]


def retrying(call: ClientCall, policy: RetryPolicy, budget: RetryBudget, random: Callable[[], float]) -> CallFlow:
    """Drive one call to its end; `random` gives numbers in [0, 1)."""
    ends_at = call.started + policy.deadline
    budget.deposit()
    time_left: float | None = None
    attempt = 1
    while True:
        reply = yield Send(attempt, time_left)
        if isinstance(reply, Resumed):
            raise TypeError("Send is answered by Answered or Broken")
        reason = _refusal(call, policy, reply)
        if reason is None and attempt >= policy.max_attempts:
            reason = "attempts"
        pause = pause_before(attempt, policy, reply, random) if reason is None else 0.0
        if reason is None and reply.now + pause >= ends_at:
            reason = "deadline"
        # Last, so that a retry that does not happen takes no token.
        if reason is None and not budget.withdraw(reply.now):
            reason = "budget"
        if reason is not None:
            yield Stop(attempt, reason)
            return
        resumed = yield Wait(pause)
        # A pause may take longer than planned (a busy loop, a suspended machine).
        if resumed.now >= ends_at:
            yield Stop(attempt, "deadline")
            return
        time_left = ends_at - resumed.now
        attempt += 1


def _refusal(call: ClientCall, policy: RetryPolicy, reply: Answered | Broken) -> StopReason | None:
    match reply:
        case Broken(sent=False):
            return None
        case Broken():
            return None if call.repeatable else "unsafe"
        case Answered():
            if not asks_for_retry(reply, policy):
                return "final"
            return None if call.repeatable else "unsafe"
        case _:
            assert_never(reply)


def asks_for_retry(answer: Answered, policy: RetryPolicy) -> bool:
    """Whether another attempt makes sense after this answer, if it is safe (K2)."""
    if answer.status < 400:
        return False
    # An operator has to settle it first, whatever a server in between advises.
    if answer.code == "outcome-unknown":
        return False
    for name in ADVICE_HEADERS:
        match answer.headers.get(name, "").strip().lower():
            case "true":
                return True
            case "false":
                return False
    return answer.status in policy.statuses or (answer.status == 409 and answer.code == "in-progress")


def pause_before(attempt: int, policy: RetryPolicy, reply: Answered | Broken, random: Callable[[], float]) -> float:
    """Seconds to wait after attempt number `attempt`: what the server asked for, plus full jitter.

    The jitter is added to `Retry-After`, since a thousand clients may get the same number.
    """
    asked = retry_after(reply.headers.get("retry-after"), reply.wall_clock) if isinstance(reply, Answered) else None
    # The exponent is bounded: 2.0 ** 1024 overflows.
    ceiling = min(policy.max_backoff, policy.backoff * 2.0 ** min(attempt - 1, 64))
    return min(asked or 0.0, policy.max_retry_after) + random() * ceiling


def retry_after(value: str | None, wall_clock: float) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date); None if it is absent or malformed."""
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        # "-0000" gives a naive time in UTC (RFC 5322, 3.3).
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - wall_clock)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def problem_code(content_type: str | None, body: bytes) -> str | None:
    """The `code` of a problem document (RFC 9457), or None if there is none."""
    if (content_type or "").partition(";")[0].strip().lower() != "application/problem+json":
        return None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    code = document.get("code") if isinstance(document, dict) else None
    return code if isinstance(code, str) else None
