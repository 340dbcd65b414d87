"""The end of an app's run, by the table: what is recorded, and what is sent. Pure.

    settlement.take_head(201, headers)                  # and parts
    outcome = settlement.end(settlement.answered())     # or happened(error): what the app raised
    conclusion = attempt.finish(outcome)
    settlement.sending(conclusion, gone=False)          # to be performed

The table is `ending`; this finds the row.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, assert_never

from retryproof.attempt import HeldAttempt
from retryproof.core.codec import Unencodable, pack_response
from retryproof.core.commands import Cancelled, LeaseLost, Raised, Returned, WorkOutcome
from retryproof.core.errors import IdempotencyError, OutcomeUnknown, StoreUnavailable
from retryproof.core.failure import causes, outcome_of, unknown_in
from retryproof.core.flow import Busy, Completed, Conclusion, Down, Failed, Foreign, Mismatched, Refused, Replayed
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.http import ending as endings
from retryproof.http.departed import is_of_departure
from retryproof.http.ending import ALONE, JOINED, TABLE, Ending, answer_of
from retryproof.http.options import Departure, HeadDeparture, Options
from retryproof.http.problem import (
    HANDLER_FAILED,
    OUTCOME_UNKNOWN,
    STORE_UNAVAILABLE,
    TRANSACTION_FAILED,
    Problem,
    render,
)
from retryproof.http.recorder import COMPLETE, NO_HEAD, WRONG, Recorder
from retryproof.http.semantics import Header, Headers, ReadHeaders, refused_before, settles, settles_always
from retryproof.operation import ENDED, Operation, lease_lost

logger = logging.getLogger("retryproof.http")

FAIL_OPEN = (
    "fail_open runs a handler without a record when the store is down, and in a transaction there is no such thing: "
    "use one or the other on a route."
)
"""Why the operation of a route that fails open takes no transaction."""
_FAILED = Problem(
    HANDLER_FAILED, "The handler failed. The policy of this service keeps failures, so a retry gets the same answer."
)
_NOT_KEPT = Problem(
    TRANSACTION_FAILED,
    "The response is one that this service does not keep, so what was done with it was rolled back. Nothing was done.",
)
_UNKNOWN = "The service does not know whether it was done. Retrying does not help; ask the operator."
_DONE = Returned(None)
_NOBODY_KNOWS = Raised(unknown=True)
_PROBLEMS = (endings.PROBLEM, endings.PROBLEM_AND_RAISE)
_RAISING = (endings.RAISE, endings.PROBLEM_AND_RAISE)
OWN = (Completed, Failed)
"""Conclusions of attempts that still held their operations."""

Sending: TypeAlias = str | Problem | Conclusion | IdempotencyError | None
"""What is to be sent: RESPONSE, the app's own; a problem, or what a conclusion means, in its place; an error that cuts
the connection; or nothing."""


def limit_of(policy: Policy, own: int | None) -> int:
    """How many bytes of a response are stored. own: the store's limit."""
    most = policy.max_result
    return most if own is None or most < own else own


_PLAIN = frozenset(
    happened
    for (happened, reach, work), ending in TABLE.items()
    if (reach, work) == (COMPLETE, ALONE) and ending == Ending(endings.COMPLETED, endings.RESPONSE, endings.RESPONSE)
)
"""What happens most: a whole response that is stored and sent."""


def plain_answer(
    operation: Operation, options: Options, status: int, read: ReadHeaders, body: bytes, limit: int
) -> Returned | None:
    """What the record gets of a whole response that came in one part, where that is plain; None: a Settlement decides.

    The operation takes no transaction any more. read: its headers, as `read_headers` says.
    """
    if type(body) is not bytes:  # a buffer: the length of a memoryview counts items
        return None
    headers, announced, is_events = read
    if options.answers.get(status) not in _PLAIN or is_events or (announced is not None and announced != len(body)):
        return None
    if operation.end(_DONE) is not _DONE or (operation.joins is not None and operation.joined):
        return None
    try:
        encoded = pack_response(status, headers, body)
    except Unencodable:
        return None
    return Returned(encoded) if len(encoded) <= limit else None


class Settlement(Recorder):
    """One run of an app under its claim, from the head of its response to what is sent last.

    headed: the head was taken. begun: False where the app, a proxy, says that it began nothing.
    joined: the work is part of a transaction; known at the end. raises: whether what the app raised goes on, once `end`
    and `sending` have said so.
    """

    headed = False
    begun = True
    raises = False
    joined = False
    ending: Ending | None = None
    problem: Problem | None = None
    _refused_before = False

    def __init__(self, attempt: HeldAttempt[Any, Any], options: Options, limit: int) -> None:
        super().__init__(limit, options.not_kept)
        self._attempt = attempt
        self._options = options

    # The response

    def take_head(self, status: int, headers: Iterable[Any], *, trailers: bool = False) -> Headers | None:
        """Take the head; the headers to hand on, or None where they are no pairs of bytes: the server will say so."""
        self.headed = True
        answered = sys.exception()
        if answered is not None:  # frameworks answer an exception while they handle it
            self.hear(answered)
        try:
            return self.head(status, headers, trailers=trailers)
        except (TypeError, ValueError, AttributeError):
            logger.debug("The headers of a response are no pairs of bytes, and are not kept.")
            return None

    def retake_head(self, status: int, headers: Headers) -> None:
        """Take a head that was sent before, while no exception was handled."""
        self.headed = True
        self.head(status, headers)

    def hear(self, answered: BaseException) -> None:
        """Hear the exception that the app answers with this response."""
        self._attempt.operation.hear(answered)
        self._refused_before = self._options.store_when is settles_always and refused_before(answered)

    def begin_again(self) -> None:
        """The app puts another response in the place of this one, of which nothing was handed on."""
        super().begin_again()
        self.headed = False

    def departure(self, decide: HeadDeparture) -> Departure:
        """What `on_departure` says of this head; where it fails, the work is not stopped for it."""
        try:
            answer: object = decide(self.status, self.headers or ())
        except Exception:
            logger.exception("on_departure= failed on status %s; the handler runs to its end.", self.status)
            return "finish"
        if answer == "stop" or answer == "finish":
            return answer
        logger.error("on_departure= returned %r, not 'finish' or 'stop'; the handler runs to its end.", answer)
        return "finish"

    def stream(self) -> bool:
        """A part has come that is not the last, and is to be handed on; whether the head goes before it."""
        if self.streamed:
            return False
        if self._refused_before or not self._is_final(self.status, self.headers or ()):
            self.keep_nothing()
        self.hand_on()
        return True

    def _is_final(self, status: int, headers: Sequence[Header]) -> bool:
        """What `store_when` says; where it fails, the default rule: the handler has run, and somebody must decide."""
        try:
            answer: object = self._options.store_when(status, headers)
        except Exception:
            logger.exception("store_when= failed on status %s; the default rule decides.", status)
            return settles(status, headers)
        if isinstance(answer, bool):
            return answer
        logger.error("store_when= returned %s, not a bool; the default rule decides.", type(answer).__name__)
        return settles(status, headers)

    # What happened

    def answered(self) -> str:
        """The app has answered, or returned before: what the response says, as far as it is."""
        if not self.begun:
            return endings.NOT_BEGUN
        status = self.status
        if self._says_unknown():
            return endings.UNKNOWN if status < 400 else endings.UNKNOWN_ANSWERED
        happened = self._options.answers.get(status)
        if happened is None or self._refused_before:
            kept = self.reach is NO_HEAD or (not self._refused_before and self._is_final(status, self.headers or ()))
            happened = answer_of(status, kept=kept)
        return happened

    def happened(self, error: BaseException, stopped: str = "", *, told_to_stop: bool = False) -> str:
        """What it means that the app raised this.

        stopped: what happened, where it ended since we stopped it. told_to_stop: it was told that its client has left,
        and was to stop then.
        """
        if stopped:
            unknown = stopped == endings.STOPPED and self._says_unknown()
            return endings.UNKNOWN_RAISED if unknown else stopped
        if not self.begun:
            return endings.NOT_BEGUN
        outcome = self._outcome_of(error)
        if isinstance(outcome, Raised) and outcome.unknown:
            # What stops the process goes on, even where it came in a group with what is unknown.
            return endings.UNKNOWN if isinstance(error, Exception) else endings.UNKNOWN_RAISED
        if self._says_unknown():
            return endings.UNKNOWN_RAISED
        if isinstance(outcome, Cancelled):  # SystemExit and its like as well: the effect may have happened
            return endings.CANCELLED
        if told_to_stop and is_of_departure(error):
            return endings.STOPPED
        return endings.RAISED_KEPT if self._is_final(HANDLER_FAILED.status, ()) else endings.RAISED

    def _outcome_of(self, error: BaseException) -> WorkOutcome:
        """What the app's exception says of the effect (C5).

        Once the head has gone a framework cannot answer what is raised, and raises one of its own from it, which says
        no more of the effect than the first did.
        """
        unknown_on = self._attempt.policy.unknown_on
        if self.headed and any(outcome_of(found, unknown_on) == _NOBODY_KNOWS for found in causes(error)):
            return _NOBODY_KNOWS
        return outcome_of(error, unknown_on)

    def _says_unknown(self) -> bool:
        """Whether the handler said that nobody knows, whatever became of that (C5)."""
        return self._attempt.operation.said(_DONE) is not _DONE

    # The end

    def end(self, happened: str, error: BaseException | None = None) -> WorkOutcome:
        """Look up what this end means; what the record is to get. The operation takes no transaction any more."""
        operation = self._attempt.operation
        operation.refuses_transactions = ENDED  # before it is asked what was joined
        joined = self.joined = operation.joined
        ending = self.ending = TABLE[happened, self.reach, JOINED if joined else ALONE]
        if ending.there in _PROBLEMS:
            self.problem = self._problem_of(happened, error)
        match ending.record:
            case endings.COMPLETED | endings.COMPLETED_ALONE:
                return Returned(self.encoded())
            case endings.FAILURE:
                return Returned(self._failure().encoded())
            case endings.RELEASED:
                return Raised()
            case endings.LEFT_UNKNOWN:
                return _NOBODY_KNOWS
            case endings.LEFT_CANCELLED:
                return Cancelled()
            case endings.LOST:
                return LeaseLost()
            case _:
                raise TypeError(f"{ending.record!r} is nothing that a record gets.")

    def _problem_of(self, happened: str, error: BaseException | None) -> Problem:
        if happened == endings.RAISED_KEPT:
            return _FAILED
        digest = short_digest(self._attempt.hold.id)
        if happened == endings.DECLINED_SUCCESS:
            return replace(_NOT_KEPT, operation=digest)
        said = None if error is None else unknown_in(error)
        logger.warning(
            "A handler does not know the outcome of operation %s.",
            digest,
            exc_info=error if said is not error else None,
        )
        return Problem(OUTCOME_UNKNOWN, _UNKNOWN if said is None else said.message, operation=digest)

    @property
    def rolls_back(self) -> bool:
        """Whether the response is kept without the joined work, as for a failure: nobody takes a 500 for done (T1)."""
        return self.ending is not None and self.ending.record in (endings.COMPLETED_ALONE, endings.FAILURE)

    def transaction_failed(self, outcome: WorkOutcome, error: BaseException) -> None:
        """The joined transaction has ended like this, instead of being committed."""
        digest = short_digest(self._attempt.hold.id)
        logger.error("The transaction of operation %s failed.", digest, exc_info=error)
        self.problem = replace(_refusal(outcome, error), operation=digest)

    def _failure(self) -> Recorder:
        """The answer that a failure gets where the policy keeps failures; its first caller gets the same."""
        status, headers, body = render(_FAILED, self._options.docs_url)
        failure = Recorder(self.limit, self._options.not_kept)
        failure.head(status, headers)
        failure.part(body, more=False)
        return failure

    # What is sent

    def sending(self, conclusion: Conclusion, *, gone: bool) -> Sending:
        """The operation is settled, by this run or by another: what is to be sent, and in `raises` what goes on.

        gone: the client is, or the server.
        """
        ending = self.ending
        sent = endings.WINNERS if ending is None else ending.left if gone else ending.there
        self.raises = sent in _RAISING
        if not isinstance(conclusion, OWN):
            # The caller gets the answer of who took over, or none that could be a second one (C8).
            if self.streamed:
                return _cut_by(conclusion, self._attempt.hold)
            self.hand_on()
            return conclusion
        problem = self.problem
        if problem is None and sent == endings.WINNERS:  # nobody has it: stopped since its record is gone (C10)
            problem = Problem(OUTCOME_UNKNOWN, _UNKNOWN, operation=short_digest(self._attempt.hold.id))
        if problem is not None:
            if not self.streamed:
                self.hand_on()
                return problem
            # Where the head has gone, what the app raised cuts the connection by itself.
            return None if self.raises else _cut_instead(problem)
        if sent == endings.RESPONSE:
            return endings.RESPONSE
        return self._incomplete() if sent == endings.CUT else None

    def _incomplete(self) -> OutcomeUnknown:
        what = (
            f"the app announced {self.announced} bytes and sent {self.came}"
            if self.reach is WRONG
            else "the app stopped before its end"
        )
        message = f"The response was cut: {what}. It is not kept, and whether it was done is not known."
        return OutcomeUnknown(message, digest=short_digest(self._attempt.hold.id))


def _refusal(outcome: WorkOutcome, error: BaseException) -> Problem:
    """What a caller is told whose handler succeeded and whose transaction did not."""
    if not isinstance(outcome, Raised) or not outcome.unknown:
        return Problem(TRANSACTION_FAILED, "Nothing was done. Try again with the same key.")
    if isinstance(error, OutcomeUnknown):
        return Problem(OUTCOME_UNKNOWN, "Whether it was done, and how much of it, is for an operator to find out.")
    if isinstance(error, StoreUnavailable):
        detail = "Whether it was done is not known yet. Ask again with the same key."
        return Problem(STORE_UNAVAILABLE, detail, retry_after=max(1, round(error.retry_after or 1)))
    return Problem(TRANSACTION_FAILED, "The service is at fault: whether it was done is not known.")


def _cut_instead(problem: Problem) -> IdempotencyError:
    """The error that cuts the connection where it is too late for a problem."""
    unknown = problem.kind is OUTCOME_UNKNOWN
    return (OutcomeUnknown if unknown else StoreUnavailable)(f"The response was cut: {problem.detail}")


def _cut_by(conclusion: Conclusion, hold: Hold) -> IdempotencyError:
    """The error that cuts the connection of who was overtaken."""
    match conclusion:
        case Down(error):
            cut = StoreUnavailable("The response was cut: it could not be stored.", digest=short_digest(hold.id))
            cut.__cause__ = error
            return cut
        case Completed() | Failed() | Replayed() | Busy() | Mismatched() | Refused() | Foreign():
            return lease_lost(hold)
        case _:
            assert_never(conclusion)
