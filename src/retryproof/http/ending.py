"""How a run of an app ends: a table that says what is recorded and what is sent. Pure.

    what happened × how far the response was × the work is joined or not  ->  record, and what is sent to a client that
                                                                              is there, or has left

Theory. The record may only say what is known. A complete response says that the work is done. An incomplete one (the
app returned in the middle, was stopped, or sent another length than it announced) says nothing: the outcome is unknown,
unless the work was joined to a transaction, which is rolled back. A handler that raises has failed, whether its client
has left or not. And the response may not say more than the record: after its head was sent, either the complete
response follows, or the connection is cut.

If the server has gone too (it cancelled, and did not wait), nothing is sent, and nothing is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from retryproof.http.recorder import COMPLETE, HELD, NO_HEAD, REACHES, STREAMING, WRONG
from retryproof.http.semantics import StoreWhen

# What happened. "Answered" and "declined" mean that the response came to its end, or that the app returned before.

ANSWERED = "answered"
"""What the response says is kept (H8)."""
ANSWERED_FAILURE = "answered a failure that is kept"
"""A 5xx, where the policy keeps those: the work of a transaction does not go with it (T1)."""
DECLINED = "answered what is not kept"
"""An error that the policy does not keep."""
DECLINED_SUCCESS = "answered a success that is not kept"
RAISED = "raised"
RAISED_KEPT = "raised, and failures are kept"
UNKNOWN = "outcome unknown"
"""The handler raised OutcomeUnknown or the like; or said so, and answered no error: nobody sees a success that is not
stored (C5)."""
UNKNOWN_ANSWERED = "outcome unknown, and an error answered"
"""As a framework does that makes a response of an exception."""
UNKNOWN_RAISED = "outcome unknown, and something else raised"
CANCELLED = "cancelled"
"""From outside, or by an exit of the process."""
STOPPED = "stopped without its client"
"""By `on_departure="stop"`, at `max_run`, or since too many run without a client (H11)."""
LEASE_LOST = "lease lost"
"""Another attempt took over, and the app was cancelled for it."""
TOO_LATE = "lease over before it began"
"""The app was not called, since the lease was not to be renewed (C6)."""
NOT_BEGUN = "nothing begun"
"""As a proxy says whose upstream was not reached: what was never begun is given back, whatever is answered."""

HAPPENINGS = (
    ANSWERED,
    ANSWERED_FAILURE,
    DECLINED,
    DECLINED_SUCCESS,
    RAISED,
    RAISED_KEPT,
    UNKNOWN,
    UNKNOWN_ANSWERED,
    UNKNOWN_RAISED,
    CANCELLED,
    STOPPED,
    LEASE_LOST,
    TOO_LATE,
    NOT_BEGUN,
)

ALONE, JOINED = "alone", "joined"
"""Whether the work is part of a transaction that the operation has joined."""
WORKS = (ALONE, JOINED)

# What the record gets.

COMPLETED = "the response"
"""Done, with what can be kept of the response; the rest is omitted. Joined work is committed with it."""
COMPLETED_ALONE = "the response, and the work is rolled back"
FAILURE = "a failure, and the work is rolled back"
"""Done, with the problem `handler-failed` as its response."""
RELEASED = "released"
"""Another attempt may run at once; joined work is rolled back."""
LEFT_UNKNOWN = "unknown"
"""It stays for `on_abandoned`; joined work is rolled back all the same."""
LEFT_CANCELLED = "unknown, or released by policy"
"""As `Policy.release_on_cancel` says."""
LOST = "nothing"
"""It belongs to another attempt, whose answer is looked for, or is given back where no work began; joined work is
rolled back."""
RECORDS = (COMPLETED, COMPLETED_ALONE, FAILURE, RELEASED, LEFT_UNKNOWN, LEFT_CANCELLED, LOST)

# What is sent. Where the head has gone, a problem is a cut: it can no longer be said.

RESPONSE = "the response"
PROBLEM = "a problem"
CUT = "cut"
"""The connection ends without a clean end of the response."""
RAISE = "raised again"
"""What the app raised goes on, to outer layers and to the server. (A cancellation of the layer's own does not.)"""
PROBLEM_AND_RAISE = "a problem, raised again"
WINNERS = "the answer of who has it"
"""The other attempt's response, that it still runs, or that the store gave no answer. Where nobody has it, since the
record is gone, the outcome is unknown."""
NOTHING = "nothing"
SENDINGS = (RESPONSE, PROBLEM, CUT, RAISE, PROBLEM_AND_RAISE, WINNERS, NOTHING)


class Ending(NamedTuple):
    """What the record gets, and what is sent to a client that is there, and to one that has left."""

    record: str
    there: str
    left: str


class Row(NamedTuple):
    """A line of the table; it speaks of each combination of these."""

    happened: tuple[str, ...]
    reach: tuple[str, ...]
    work: tuple[str, ...]
    ending: Ending


_UNFINISHED = (HELD, STREAMING)
ANSWERS = (ANSWERED, ANSWERED_FAILURE, DECLINED, DECLINED_SUCCESS)

ROWS: tuple[Row, ...] = (
    # A whole response. It waits for the record, all of it or its last part. Outer layers see it, whoever has left.
    Row((ANSWERED,), (COMPLETE,), WORKS, Ending(COMPLETED, RESPONSE, RESPONSE)),
    Row((ANSWERED_FAILURE,), (COMPLETE,), WORKS, Ending(COMPLETED_ALONE, RESPONSE, RESPONSE)),
    Row((DECLINED,), (COMPLETE,), WORKS, Ending(RELEASED, RESPONSE, RESPONSE)),
    Row((DECLINED_SUCCESS,), (COMPLETE,), (ALONE,), Ending(RELEASED, RESPONSE, RESPONSE)),
    Row((DECLINED_SUCCESS,), (COMPLETE,), (JOINED,), Ending(RELEASED, PROBLEM, PROBLEM)),
    # No whole response, and the app has returned. A server answers for an app that says nothing.
    Row(ANSWERS, (NO_HEAD,), (ALONE,), Ending(LEFT_UNKNOWN, NOTHING, NOTHING)),
    Row(ANSWERS, (NO_HEAD,), (JOINED,), Ending(RELEASED, NOTHING, NOTHING)),
    Row(ANSWERS, (*_UNFINISHED, WRONG), (ALONE,), Ending(LEFT_UNKNOWN, CUT, NOTHING)),
    Row(ANSWERS, (*_UNFINISHED, WRONG), (JOINED,), Ending(RELEASED, CUT, NOTHING)),
    # Exceptions. They go on, so that outer layers and the server see them as without the layer.
    Row((RAISED,), REACHES, WORKS, Ending(RELEASED, RAISE, RAISE)),
    Row((RAISED_KEPT,), REACHES, WORKS, Ending(FAILURE, PROBLEM_AND_RAISE, RAISE)),
    # The handler says that nobody knows.
    Row((UNKNOWN,), REACHES, WORKS, Ending(LEFT_UNKNOWN, PROBLEM, PROBLEM)),
    Row((UNKNOWN_ANSWERED,), (COMPLETE,), WORKS, Ending(LEFT_UNKNOWN, RESPONSE, RESPONSE)),
    Row((UNKNOWN_ANSWERED,), (NO_HEAD, *_UNFINISHED, WRONG), WORKS, Ending(LEFT_UNKNOWN, CUT, NOTHING)),
    Row((UNKNOWN_RAISED,), REACHES, WORKS, Ending(LEFT_UNKNOWN, RAISE, RAISE)),
    # Cancellations.
    Row((CANCELLED,), REACHES, WORKS, Ending(LEFT_CANCELLED, RAISE, RAISE)),
    Row((STOPPED,), REACHES, (ALONE,), Ending(LEFT_UNKNOWN, CUT, RAISE)),
    Row((STOPPED,), REACHES, (JOINED,), Ending(RELEASED, CUT, RAISE)),
    Row((LEASE_LOST,), REACHES, WORKS, Ending(LOST, WINNERS, WINNERS)),
    # No work at all.
    Row((TOO_LATE,), REACHES, WORKS, Ending(LOST, WINNERS, WINNERS)),
    Row((NOT_BEGUN,), (COMPLETE,), WORKS, Ending(RELEASED, RESPONSE, RESPONSE)),
    Row((NOT_BEGUN,), (NO_HEAD,), WORKS, Ending(RELEASED, RAISE, RAISE)),
    Row((NOT_BEGUN,), (*_UNFINISHED, WRONG), WORKS, Ending(RELEASED, CUT, NOTHING)),
)


def table(rows: tuple[Row, ...] = ROWS) -> Mapping[tuple[str, str, str], Ending]:
    """The rows by combination; ValueError where two speak of the same one."""
    made: dict[tuple[str, str, str], Ending] = {}
    for row in rows:
        for happened in row.happened:
            for reach in row.reach:
                for work in row.work:
                    if (happened, reach, work) in made:
                        raise ValueError(f"Two rows speak of {happened!r}, {reach!r}, {work!r}.")
                    made[happened, reach, work] = row.ending
    return made


TABLE = table()


def answer_of(status: int, *, kept: bool) -> str:
    """What it means that the app answered with this status, which the policy keeps or not."""
    if kept:
        return ANSWERED if status < 500 else ANSWERED_FAILURE
    return DECLINED if status >= 400 else DECLINED_SUCCESS


def answers_of(store_when: StoreWhen) -> Mapping[int, str]:
    """`answer_of` each status, where `store_when` looks at the status alone."""
    return {status: answer_of(status, kept=store_when(status, ())) for status in range(100, 600)}
