"""The state machine: one attempt at one operation, as a generator without I/O.

Theory. Two rules make a retry safe. An operation has at most one unexpired claim. Every write of a holder is fenced, so
that a holder that lost its claim changes nothing. Everything else follows: a caller gets a result only after it is
stored; after a lost answer, the attempt asks again with the same nonce; an outcome that nobody can know is reported as
unknown.

`attempt` yields commands and receives `(reply, now)`; `now` is the monotonic clock of the code that performs the
commands (the pump, `drive.py`), in seconds. It returns a conclusion. TABLE is the whole automaton. The explorer checks
it against the code, and the documentation's diagram is drawn from it.

Most attempts need only a few of its steps. `after_claim`, `to_settle` and `after_settling` are these steps as plain
functions: the machine uses them, and callers may use them directly. If one of them does not decide, the caller starts
the machine at that point, with the reply that it has: `attempt` and `settle` take the first reply, `ended` begins at
the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, Literal, NoReturn

from retryproof.core.commands import (
    Abandoned,
    Acquired,
    Cancelled,
    Claim,
    Command,
    Committed,
    Complete,
    Disown,
    Done,
    Finished,
    Found,
    LeaseLost,
    Linger,
    Look,
    Lost,
    Mismatch,
    NotBegun,
    Pause,
    Paused,
    Raised,
    Release,
    Reply,
    Returned,
    Run,
    Running,
    Stopped,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.core.hold import Hold
from retryproof.core.policy import Policy
from retryproof.core.record import MICROSECONDS, Record, State
from retryproof.core.value import value

Flow = Generator[Command, tuple[Reply, float], "Conclusion"]
Told = tuple[Reply, float]
"""A reply, and when it came."""

FIRST_BACKOFF = 0.05
"""Seconds before a failed settling is repeated; doubled each time, up to LAST_BACKOFF."""
LAST_BACKOFF = 1.0
ALGORITHM = 2
"""How many bytes at the start of a fingerprint name its algorithm."""


# Conclusions


@value
class Completed:
    """This attempt ran. Its result is stored; or, if `stored` is False, is being stored in the background (C10).

    gone: the record is gone, so that the result will never be stored; its caller gets it all the same.
    """

    hold: Hold
    result: bytes | None
    stored: bool = True
    gone: bool = False


@value
class Replayed:
    """The operation was done before; `overtaken`: this attempt ran too, and lost its lease."""

    finished: Finished
    overtaken: bool = False


@value
class Busy:
    """Another attempt is running, or was just released; try again after `left` seconds."""

    left: float
    overtaken: bool = False


@value
class Failed:
    """The work raised or was cancelled; `released`: whether another attempt may run at once."""

    hold: Hold
    released: bool


@value
class Mismatched:
    """The key was used before, with other input."""


@value
class Refused:
    """An attempt died, and no other may run; the reasons are those of Abandoned."""

    reason: Literal["refused", "poisoned", "committed"]
    attempt: int


@value
class Down:
    """The store gave no answer. Unless `overtaken`, nothing was run."""

    error: Exception
    overtaken: bool = False


@value
class Foreign:
    """The record's fingerprint was made by an algorithm that this release does not know (C21)."""

    fingerprint: bytes


Conclusion = Completed | Replayed | Busy | Failed | Mismatched | Refused | Down | Foreign


# The table

START, RUNNING, RENEWING, SETTLING, OVERTAKEN = "claiming", "running", "renewing", "settling", "overtaken"

TABLE: dict[tuple[str, str], tuple[str, ...]] = {
    (START, "Acquired"): (RUNNING,),
    (START, "Running"): (START, "Busy"),
    (START, "Finished"): ("Replayed",),
    (START, "Mismatch"): (START, "Mismatched", "Foreign"),
    (START, "Abandoned"): ("Refused",),
    (START, "Unreachable"): (START, "Down"),
    (RUNNING, "Returned"): (SETTLING,),
    (RUNNING, "Committed"): ("Completed",),
    (RUNNING, "Raised"): (SETTLING, "Failed"),
    (RUNNING, "Cancelled"): (SETTLING, "Failed"),
    (RUNNING, "Stopped"): ("Failed",),
    (RUNNING, "LeaseLost"): (OVERTAKEN,),
    (RUNNING, "NotBegun"): (RENEWING, "Down"),
    (RENEWING, "Done"): (RUNNING,),
    (RENEWING, "Lost"): (OVERTAKEN,),
    (RENEWING, "Unreachable"): ("Down",),
    (SETTLING, "Done"): ("Completed", "Failed"),
    (SETTLING, "Lost"): (OVERTAKEN, "Failed"),
    (SETTLING, "Unreachable"): (SETTLING, "Completed", "Failed"),
    (OVERTAKEN, "Found"): ("Replayed", "Busy", "Completed", "Failed"),
    (OVERTAKEN, "Unreachable"): ("Down",),
}
"""(state, reply) -> what may follow: a state, or a conclusion."""


# The steps of the common case


def after_claim(claim: Claim, reply: Reply, since: float, asked: float, policy: Policy) -> Hold | Replayed | None:
    """The conclusion or hold, if the reply to a claim decides it; None: the machine decides.

    since: when the claim was sent for the first time. A claim may be sent several times with its nonce. Any of them may
        be the one that was applied, after any delay, so the lease is counted from the first.
    asked: when it was sent for the last time. A waiter's time to run begins when it may run (C18).
    """
    if type(reply) is Acquired:
        return Hold(claim, reply, since, asked + policy.max_run)
    return Replayed(reply) if type(reply) is Finished else None


def to_settle(hold: Hold, outcome: Reply, policy: Policy) -> Complete | Release | Completed | Failed | None:
    """The command for the store after an outcome, or a conclusion that needs none; None: the machine decides."""
    if type(outcome) is Returned:
        return hold.complete(outcome.result)
    match outcome:
        case Committed(result):
            return Completed(hold, result)
        case Raised(unknown=True) | Stopped():  # the effect may have happened: the record stays as it is
            return Failed(hold, released=False)
        case Cancelled() if not policy.release_on_cancel:
            return Failed(hold, released=False)
        case Raised() | Cancelled():
            return hold.release()
        case _:
            return None


def after_settling(hold: Hold, command: Complete | Release, reply: Reply) -> Completed | Failed | None:
    """The conclusion, if the reply to a settling command decides it; None: the machine decides."""
    if type(reply) is not Done:
        return None
    return Completed(hold, command.result) if type(command) is Complete else Failed(hold, released=True)


# The machine


def attempt(
    claim: Claim,
    policy: Policy,
    now: float,
    refingerprint: Callable[[bytes], bytes | None] = lambda stored: None,
    told: Told | None = None,
) -> Flow:
    """One attempt: claim, run, settle.

    now: when the claim was or will be sent. told: the reply to it, if it has come already.
    refingerprint: the input's fingerprint by the algorithm of a stored one, or None if that algorithm is not known; the
        first two bytes of a fingerprint name its algorithm (C21).
    """
    claimed = yield from _claim(claim, policy, now, refingerprint, told)
    if not isinstance(claimed, Hold):
        return claimed
    del claim, refingerprint, told  # every garbage collection during the work visits what outlives the claim
    outcome, now = yield Run(claimed)
    return (yield from ended(claimed, outcome, policy, now))


def ended(hold: Hold, outcome: Reply, policy: Policy, now: float) -> Flow:
    """The rest of an attempt, from the outcome of its `Run`."""
    if isinstance(outcome, NotBegun):
        outcome, now = yield from _begin_late(hold, now)
    step = to_settle(hold, outcome, policy)
    if isinstance(step, Complete | Release):
        return (yield from settle(hold, step, policy, now))
    if step is not None:
        return step
    match outcome:
        case LeaseLost():
            return (yield from _overtaken(hold, Failed(hold, released=False)))
        case Lost():  # before anything was begun
            return (yield from _overtaken(hold, Busy(0.0, overtaken=True)))
        case Unreachable(error):  # nothing was begun, so the next caller may run at once
            yield Linger(hold, hold.release())
            return Down(error)
        case _:
            _unexpected(outcome)


def _begin_late(hold: Hold, now: float) -> Generator[Command, tuple[Reply, float], tuple[Reply, float]]:
    """Renew once, if it is too late to begin the work, and then call the work; return its outcome (C6).

    Lost: the work did not begin, since another attempt took over. Unreachable: it did not begin either, since the store
    gave no answer, or was too late again.
    """
    sent = now
    reply, now = yield hold.renew()
    match _fence_reply(reply):
        case Done():
            hold.renewed(sent)
        case Lost() | Unreachable() as other:
            return other, now
    outcome, now = yield Run(hold)
    if isinstance(outcome, NotBegun):
        late = f"The work was not begun: the store's answers take longer than the lease of {hold.lease:g} s."
        return Unreachable(StoreUnavailable(late)), now
    return outcome, now


def _claim(
    claim: Claim, policy: Policy, now: float, refingerprint: Callable[[bytes], bytes | None], told: Told | None
) -> Generator[Command, tuple[Reply, float], Hold | Conclusion]:
    """Claim until there is an answer; a duplicate waits as long as the policy allows (C18)."""
    began = sent = now
    doubted = unanswered = False
    while True:
        asked = now
        reply, now = told or (yield claim)
        told = None
        decided = after_claim(claim, reply, began, asked, policy)
        if decided is not None:
            return decided
        match reply:
            case Running(left):
                if now - began < policy.wait:
                    paused, now = yield Pause(min(policy.poll, began + policy.wait - now), waiting=True)
                    if paused == Paused():
                        sent, doubted = now, False
                        continue
                if unanswered:  # an earlier sending of this claim may still arrive, after the holder has gone
                    yield Disown(claim)
                return Busy(left)
            case Mismatch(stored):
                if stored[:ALGORITHM] == claim.fingerprint[:ALGORITHM]:
                    return Mismatched()
                other = refingerprint(stored)
                if other is None or other[:ALGORITHM] != stored[:ALGORITHM]:
                    return Foreign(stored)
                claim, sent = replace(claim, fingerprint=other), now
            case Abandoned(reason, number):
                return Refused(reason, number)
            case Unreachable(error, left):
                unanswered = unanswered or left
                # Once more under the same nonce: a pooled connection may have died idle, a reply may have been lost.
                # If the store used its whole time-out, do not ask again: the caller has waited long enough.
                if doubted or not left or now - sent >= policy.store_timeout:
                    if unanswered:
                        yield Disown(claim)
                    return Down(error)
                doubted = True
            case _:
                _unexpected(reply)


def settle(hold: Hold, command: Complete | Release, policy: Policy, now: float, told: Told | None = None) -> Flow:
    """Store the result before anybody sees it (C4), or release the operation (C5).

    now: when the command was or will be sent. told: the reply to it, if it has come already.
    Settling needs no live lease: nonce and token decide (C6). After `complete_timeout` the caller gets the result all
    the same, and the background continues (C10).
    """
    began, delay, doubted = now, FIRST_BACKOFF, False
    while True:
        reply, now = told or (yield command)
        told = None
        conclusion = after_settling(hold, command, reply)
        if conclusion is not None:
            return conclusion
        if isinstance(reply, Lost):  # do not answer with this outcome: callers never see two results (C8)
            if isinstance(command, Complete):
                return (yield from _overtaken(hold, Completed(hold, command.result, stored=False, gone=True)))
            if doubted:  # an earlier sending released it, and another attempt has it now: no overtaking (C3)
                return Failed(hold, released=True)
            return (yield from _overtaken(hold, Failed(hold, released=True)))
        doubted = True
        if not isinstance(reply, Unreachable):
            _unexpected(reply)
        if now - began + delay > policy.complete_timeout:
            yield Linger(hold, command)
            if isinstance(command, Complete):
                return Completed(hold, command.result, stored=False)
            return Failed(hold, released=False)
        _, now = yield Pause(delay)
        delay = min(2 * delay, LAST_BACKOFF)


def _fence_reply(reply: Reply) -> Done | Lost | Unreachable:
    match reply:
        case Done() | Lost() | Unreachable():
            return reply
        case _:
            _unexpected(reply)


def _overtaken(hold: Hold, gone: Conclusion) -> Flow:
    """The lease was lost: answer with the result that the winner stored, or that it is still running (C8).

    gone: the conclusion if there is no record any more, so that nobody took over. In that case, "ask again" would lead
        to a second effect (C10).
    """
    found, _ = yield Look(hold.id)
    match found:
        case Found(record):
            return gone if record is None else _standing(record, hold)
        case Unreachable(error):
            return Down(error, overtaken=True)
        case _:
            _unexpected(found)


def _standing(record: Record, hold: Hold) -> Replayed | Busy:
    if record.birth != hold.birth or record.state is State.RELEASED:
        return Busy(0.0, overtaken=True)
    if record.state is State.IN_PROGRESS:
        return Busy(max(0.0, (record.lease_until - record.read_at) / MICROSECONDS), overtaken=True)
    return Replayed(Finished(record.result, record.attempt, record.first_seen, record.trace), overtaken=True)


def _unexpected(reply: Any) -> NoReturn:
    raise TypeError(f"{reply!r} is no reply to the command before it; a store or a pump broke the protocol.")
