"""One run of the app under a claim: its response is stored before its end is seen (H10), whoever leaves (H11).

The app runs in a task of its own. What it sends passes through `_send`, which settles the operation when the last
message arrives and only then lets that message go. So a response with one body message is held entirely, a stream all
but its end, and background tasks run after the operation was settled, as they run after the response without the layer.
How far the response is stands in `recorder`, and what an end means in the table of `ending`; this file performs it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, assert_never

from retryproof import operation
from retryproof.attempt import LoopAttempt
from retryproof.core.commands import Cancelled, LeaseLost, Outcome, Raised, Returned
from retryproof.core.errors import IdempotencyError, OutcomeUnknown, StoreUnavailable
from retryproof.core.failure import causes, outcome_of, unknown_in
from retryproof.core.flow import (
    Busy,
    Completed,
    Conclusion,
    Down,
    Failed,
    Foreign,
    Mismatched,
    Refused,
    Replayed,
)
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.drive import clock
from retryproof.http import ending as endings
from retryproof.http.client_link import ClientLink
from retryproof.http.departed import Departed, is_of_departure
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
from retryproof.http.recorder import NO_HEAD, WRONG, Recorder
from retryproof.http.semantics import Header, refused_before, settles, settles_always
from retryproof.http.types import App, Message, Scope

logger = logging.getLogger("retryproof.http")

_PARTS_A_TURN = 16
"""Parts of a stream after which the loop has its turn, while its client is there."""
_PARTS = frozenset(
    {"http.response.body", "http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"}
)

_settling: set[asyncio.Task[Conclusion]] = set()
"""Tasks that the loop must not lose."""
_FAIL_OPEN = (
    "fail_open runs a handler without a record when the store is down, and in a transaction there is no such thing: "
    "use one or the other on a route."
)
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
_TOO_LONG = "it ran past max_run, and its client has left"


def _refusal(outcome: Outcome, error: BaseException) -> Problem:
    """What a caller is told whose handler succeeded and whose transaction did not."""
    if not isinstance(outcome, Raised) or not outcome.unknown:
        return Problem(TRANSACTION_FAILED, "Nothing was done. Try again with the same key.")
    if isinstance(error, OutcomeUnknown):
        return Problem(OUTCOME_UNKNOWN, "Whether it was done, and how much of it, is for an operator to find out.")
    if isinstance(error, StoreUnavailable):
        detail = "Whether it was done is not known yet. Ask again with the same key."
        return Problem(STORE_UNAVAILABLE, detail, retry_after=max(1, round(error.retry_after or 1)))
    return Problem(TRANSACTION_FAILED, "The service is at fault: whether it was done is not known.")


class Owner(Protocol):
    """The exchange that an execution belongs to."""

    options: Options
    policy: Policy
    link: ClientLink

    @property
    def app(self) -> App: ...

    def departed(self) -> Departed:
        """The runs that go on without their clients."""

    async def answer(self, conclusion: Conclusion) -> None:
        """Send what a conclusion other than one's own means to the caller."""

    def ended(self, task: asyncio.Task[None]) -> None:
        """The app has returned or raised; called once, in its task."""


class Execution:
    """The app's run for one request."""

    __slots__ = (
        "_alone",
        "_attempt",
        "_conclusion",
        "_deserted",
        "_ending",
        "_head",
        "_hold",
        "_last",
        "_link",
        "_loop",
        "_on_departure",
        "_operation",
        "_options",
        "_over",
        "_overran",
        "_owner",
        "_policy",
        "_problem",
        "_recorder",
        "_refused",
        "_rest",
        "_scope",
        "_settling",
        "_stopped",
        "_streamed",
        "_task",
        "_tell_overrun",
    )

    def __init__(
        self,
        owner: Owner,
        scope: Scope,
        *,
        attempt: LoopAttempt,
        max_result: int,
        fails_open: bool,
        on_departure: Departure | HeadDeparture,
    ) -> None:
        self._owner = owner
        self._scope = scope
        self._link = owner.link
        self._options = owner.options
        self._policy = owner.policy
        self._attempt = attempt
        self._hold = attempt.hold
        self._on_departure = on_departure
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._deserted = False  # by its server: nobody waits for what the app raises
        self._task: asyncio.Task[None] | None = None
        # The response as the app makes it, and what is held of it.
        self._recorder = Recorder(max_result)
        self._refused = False  # by the framework, before the handler began
        self._streamed = 0  # parts
        self._head: Message | None = None
        self._last: Message | None = None
        # Where the operation stands.
        self._stopped = ""  # what happened, when we cancelled the app
        self._overran = False
        self._alone = False  # it goes on without its client
        self._tell_overrun: Callable[[Hold], None] | None = None
        self._settling = False
        self._rest: asyncio.Task[Conclusion] | None = None
        self._conclusion: Conclusion | None = None
        self._operation = attempt.operation
        if fails_open:
            self._operation.refuses_transactions = _FAIL_OPEN
        self._ending: Ending | None = None
        self._problem: Problem | None = None  # said in place of the response

    # The server's task

    def start(self) -> asyncio.Task[None]:
        """Start the app in its own task; the hold must be watched already."""
        hold, link = self._hold, self._link
        self._tell_overrun = hold.on_overrun
        hold.on_overrun = self._on_overrun
        link.on_left = self._on_left
        link.stops = link.tells = self._on_departure == "stop"
        self._task = self._loop.create_task(self._run())
        return self._task

    async def outlast(self) -> None:
        """Wait for the end of the run, or for the cut of its connection; raises what the app raised.

        A first cancellation waits all the same, and goes on afterwards. A second one does not wait: the run goes on in
        the background, and nothing is sent any more.
        """
        try:
            await self._over
        except asyncio.CancelledError:
            self._deserted = True
            if self._task is not None and not self._task.done():
                logger.warning(
                    "The server has cancelled operation %s, which goes on; if it is killed, its outcome is unknown.",
                    short_digest(self._hold.id),
                )
                self._on_left()
                try:
                    await asyncio.wait({self._task})
                except asyncio.CancelledError:
                    self._link.detached = True
            raise

    def _end(self, error: BaseException | None) -> None:
        """The app has returned or raised."""
        hold = self._hold
        hold.on_lost = self._link.on_left = None  # leaves no cycle to the garbage collector
        hold.on_overrun = self._tell_overrun
        self._attempt.leave()
        if self._alone:
            self._owner.departed().discard(self)
        if self._task is not None:
            self._owner.ended(self._task)
        if self._deserted or self._over.done():
            if isinstance(error, Exception):
                logger.error("A handler failed after its request was over.", exc_info=error)
        elif error is None:
            self._over.set_result(None)
        elif isinstance(error, asyncio.CancelledError):
            self._over.cancel()
        else:
            self._over.set_exception(error)

    # What befalls it from outside

    def _on_lost(self) -> None:
        """Another attempt took over; called from the keeper's thread."""
        try:
            self._loop.call_soon_threadsafe(self._cancel, endings.LEASE_LOST)
        except RuntimeError:  # the loop is closed, and the run has ended with it
            return

    def _on_overrun(self, hold: Hold) -> None:
        """Its lease is not renewed any more; called from the keeper's thread."""
        if self._tell_overrun is not None:
            self._tell_overrun(hold)
        try:
            self._loop.call_soon_threadsafe(self._run_over)
        except RuntimeError:  # as above
            return

    def _run_over(self) -> None:
        """From here on it may run for its client alone (H11)."""
        if self._settling:
            return
        self._overran = True
        if self._link.left or self._deserted:
            self.stop(_TOO_LONG)
        else:
            self._link.watch()

    def _on_left(self) -> None:
        """The client is gone, or the server is."""
        if self._settling:
            return
        if self._overran:
            self.stop(_TOO_LONG)
        else:
            self._alone = True
            self._owner.departed().add(self)

    def stop(self, why: str) -> None:
        """Cancel the app, which nobody waits for: its outcome is unknown."""
        if self._cancel(endings.STOPPED):
            digest = short_digest(self._hold.id)
            logger.warning("The handler of operation %s was stopped: %s. Its outcome is unknown.", digest, why)

    def _cancel(self, happened: str) -> bool:
        if self._task is None or self._settling or self._stopped or self._task.done():
            return False
        self._stopped = happened
        return self._task.cancel()

    # The app's task

    async def _run(self) -> None:
        operation.enter(self._operation)
        error: BaseException | None = None
        try:
            if not self._hold.may_begin(clock()) and not await self._renewed():
                self._end(None)
                return
            if self._policy.on_lease_lost == "cancel":
                self._hold.on_lost = self._on_lost
                if self._hold.lost:  # told meanwhile, in the keeper's thread
                    self._on_lost()
            try:
                await self._owner.app(self._scope, self._link.receive, self._send)
            except BaseException as raised:  # noqa: BLE001  # raised again, as the table says
                error = raised
            if self._conclusion is not None or await self._settled_before():
                raises = True
            else:
                raises = await self._finish(self._happened(error), error)
            if error is not None and raises:
                raise error
        except BaseException as raised:  # noqa: BLE001  # handed to the server's task, which raises it
            self._end(raised)
        else:
            self._end(None)
        finally:
            error = None  # its traceback leads here

    async def _renewed(self) -> bool:
        """Whether the app may begin after all; else another attempt has it, or the store gave no answer (C6)."""
        self._conclusion = await self._attempt.renew()
        if self._conclusion is None:
            return True
        self._settling = True
        self._operation.refuses_transactions = operation.ENDED
        await self._answer_overtaken()  # the table's NOT_BEGUN
        return False

    def _happened(self, error: BaseException | None) -> str:
        """What an end of the app is, in the words of the table."""
        if error is None:
            return self._answered()
        if self._stopped == endings.STOPPED or (self._stopped and isinstance(error, asyncio.CancelledError)):
            unknown = self._stopped == endings.STOPPED and self._says_unknown()
            return endings.UNKNOWN_RAISED if unknown else self._stopped
        outcome = self._outcome_of(error)
        if isinstance(outcome, Raised) and outcome.unknown:
            # What stops the process goes on, even where it came in a group with what is unknown.
            return endings.UNKNOWN if isinstance(error, Exception) else endings.UNKNOWN_RAISED
        if self._says_unknown():
            return endings.UNKNOWN_RAISED
        if isinstance(outcome, Cancelled):  # SystemExit and its like as well: the effect may have happened
            return endings.CANCELLED
        if self._link.stops and self._link.left and is_of_departure(error):
            return endings.STOPPED
        return endings.RAISED_KEPT if self._is_final(HANDLER_FAILED.status, ()) else endings.RAISED

    def _outcome_of(self, error: BaseException) -> Outcome:
        """What the app's exception says of the effect (C5).

        Once the head has gone a framework cannot answer what is raised, and raises one of its own from it, which says
        no more of the effect than the first did.
        """
        unknown_on = self._policy.unknown_on
        if self._head is not None and any(outcome_of(found, unknown_on) == _NOBODY_KNOWS for found in causes(error)):
            return _NOBODY_KNOWS
        return outcome_of(error, unknown_on)

    def _answered(self) -> str:
        """What the response says, as far as it is."""
        recorder = self._recorder
        if self._says_unknown():
            return endings.UNKNOWN if recorder.status < 400 else endings.UNKNOWN_ANSWERED
        return answer_of(recorder.status, kept=recorder.reach is NO_HEAD or self._settles())

    def _says_unknown(self) -> bool:
        """Whether the handler said that nobody knows, whatever became of that (C5)."""
        return self._operation.said(_DONE) is not _DONE

    async def _settled_before(self) -> bool:
        """Whether the last message has come before; one whose sender was cancelled on the way is seen to its end."""
        if self._rest is not None and self._conclusion is None:
            self._conclusion = await asyncio.shield(self._rest)
            await self._conclude()
        return self._settling

    # The app's response

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if self._settling:
            if self._conclusion is None or isinstance(self._conclusion, Completed | Failed):
                await self._link.send(message)  # after the end; the server knows what to say
        elif kind == "http.response.start":
            if self._head is not None:  # in the words of servers, which would say so after the wrong head
                raise RuntimeError("Unexpected ASGI message 'http.response.start': the response has started already.")
            self._take_head(message)
        elif self._head is None or kind not in _PARTS:
            await self._link.send(message)  # early hints, pushes, debug; and what is out of order
        elif self._take(kind, message):
            self._last = message
            await self._finish(self._answered(), None)
        else:
            await self._stream(message)

    def _take(self, kind: str, message: Message) -> bool:
        """Take a part of the response; whether it is the last."""
        if kind == "http.response.body":
            return self._recorder.part(message.get("body", b""), more=message.get("more_body", False))
        if kind == "http.response.trailers":
            return self._recorder.trailers(more=message.get("more_trailers", False))
        return self._recorder.unseen(more=message.get("more_body", False))

    def _take_head(self, message: Message) -> None:
        headers = message.get("headers", ())
        if not isinstance(headers, list | tuple):  # ASGI says an iterable, which may be good for one look
            headers = list(headers)
        status = message["status"]
        try:
            headers = self._recorder.head(status, headers, trailers=bool(message.get("trailers")))
        except (TypeError, ValueError, AttributeError):  # headers that are none; the server will say so
            logger.debug("The headers of a response are no pairs of bytes, and are not kept.")
        self._head = {**message, "headers": headers}
        answered = sys.exception()
        if answered is not None:  # frameworks answer an exception while they handle it
            self._operation.hear(answered)
            self._refused = self._options.store_when is settles_always and refused_before(answered)
        if callable(self._on_departure):
            self._on_departure = self._departure(self._on_departure)
            if self._on_departure == "stop":
                self._link.stop_without_client()

    def _departure(self, decide: HeadDeparture) -> Departure:
        """What `on_departure` says of this head; where it fails, the work is not stopped for it."""
        try:
            answer: object = decide(self._recorder.status, self._recorder.headers or ())
        except Exception:
            logger.exception("on_departure= failed on status %s; the handler runs to its end.", self._recorder.status)
            return "finish"
        if answer == "stop" or answer == "finish":
            return answer
        logger.error("on_departure= returned %r, not 'finish' or 'stop'; the handler runs to its end.", answer)
        return "finish"

    async def _stream(self, message: Message) -> None:
        """Let go of a part that is not the last."""
        recorder, link = self._recorder, self._link
        if recorder.reach is WRONG:  # what is too long is never whole: it is cut when the app ends
            await asyncio.sleep(0)
            return
        if not recorder.streamed:
            if not self._settles():
                recorder.keep_nothing()
            link.watch()
            recorder.hand_on()
            if self._head is not None:
                await link.send(self._head)
        # An app that never waits, and whose server takes what it says to nobody, would hold the loop; and in a loop
        # that is held nobody hears that the client has left.
        self._streamed += 1
        if link.left or self._streamed % _PARTS_A_TURN == 0:
            await asyncio.sleep(0)
        await link.send(message)

    # Settling

    def _settles(self) -> bool:
        return not self._refused and self._is_final(self._recorder.status, self._recorder.headers or ())

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

    async def _finish(self, happened: str, error: BaseException | None) -> bool:
        """Settle as the table says, and send what it says; whether what the app raised goes on."""
        ending = TABLE[happened, self._recorder.reach, JOINED if self._operation.joined else ALONE]
        ours = bool(self._stopped) and isinstance(error, asyncio.CancelledError)
        if ours and self._task is not None:
            self._task.uncancel()
        self._ending = ending
        if ending.there in _PROBLEMS:
            self._problem = self._problem_of(happened, error)
        await self._settle(ending.record)
        sent = await self._conclude()
        return sent in _RAISING and not ours

    def _problem_of(self, happened: str, error: BaseException | None) -> Problem:
        if happened == endings.RAISED_KEPT:
            return _FAILED
        digest = short_digest(self._hold.id)
        if happened == endings.DECLINED_SUCCESS:
            return replace(_NOT_KEPT, operation=digest)
        said = None if error is None else unknown_in(error)
        logger.warning(
            "A handler does not know the outcome of operation %s.",
            digest,
            exc_info=error if said is not error else None,
        )
        return Problem(OUTCOME_UNKNOWN, _UNKNOWN if said is None else said.message, operation=digest)

    async def _settle(self, record: str) -> None:
        self._settling = True
        link = self._link
        link.stops = False  # the app has nothing left to stop for
        if self._alone:
            self._owner.departed().discard(self)
        reply = self._outcome(record)
        if self._operation.joined:
            # In a task of its own: no cancellation may part the commit from what follows.
            alone = record in (endings.COMPLETED_ALONE, endings.FAILURE)
            self._rest = self._loop.create_task(self._end_transaction(reply, alone=alone))
            _settling.add(self._rest)
            self._rest.add_done_callback(_settling.discard)
            self._conclusion = await asyncio.shield(self._rest)
        else:
            self._operation.refuses_transactions = operation.ENDED
            self._conclusion = await self._finish_attempt(reply)
        link.tell()

    def _outcome(self, record: str) -> Outcome:
        """What the core is told for what the record is to get."""
        match record:
            case endings.COMPLETED | endings.COMPLETED_ALONE:
                return Returned(self._encoded(self._recorder))
            case endings.FAILURE:
                return Returned(self._encoded(self._failure()))
            case endings.RELEASED:
                return Raised()
            case endings.LEFT_UNKNOWN:
                return Raised(unknown=True)
            case endings.LEFT_CANCELLED:
                return Cancelled()
            case endings.LOST:
                return LeaseLost()
            case _:
                raise TypeError(f"{record!r} is nothing that a record gets.")

    def _encoded(self, recorder: Recorder) -> bytes | None:
        options = self._options
        return recorder.encoded(set_cookie=options.keep_set_cookie, mark=options.replay_header)

    def _failure(self) -> Recorder:
        """The answer that a failure gets where the policy keeps failures; its first caller gets the same."""
        status, headers, body = render(_FAILED, self._options.docs_url)
        failure = Recorder(self._recorder.limit)
        failure.head(status, headers)
        failure.part(body, more=False)
        return failure

    async def _end_transaction(self, reply: Outcome, *, alone: bool) -> Conclusion:
        """Commit the handler's transaction with its response, or roll it back and call that no success (T1).

        alone: the response is kept without the work, as for a failure: nobody takes a 500 for done.
        """
        if alone:
            settled = await operation.asettle(self._operation, Raised())
            if settled[1] is None:
                settled = (reply, None)
        else:
            settled = await operation.asettle(self._operation, reply)
        outcome, error = settled
        if error is not None:
            digest = short_digest(self._hold.id)
            logger.error("The transaction of operation %s failed.", digest, exc_info=error)
            self._problem = replace(_refusal(outcome, error), operation=digest)
        return await self._finish_attempt(outcome)

    async def _finish_attempt(self, outcome: Outcome) -> Conclusion:
        try:
            return await self._attempt.finish(outcome)
        except asyncio.CancelledError:
            self._rest = self._attempt.rest or self._rest
            raise

    # What is sent once it is settled

    async def _conclude(self) -> str:
        """The operation is settled, or was settled by another: send what its ending says, or answer for the other.

        Returns what the ending says.
        """
        ending = self._ending
        if ending is None:
            return endings.NOTHING
        sent = ending.left if self._link.left or self._deserted else ending.there
        if not isinstance(self._conclusion, Completed | Failed):
            await self._answer_overtaken()
        elif self._problem is not None:
            # Where the head has gone, what the app raised cuts the connection by itself.
            if not (sent in _RAISING and self._recorder.streamed):
                await self._refuse(self._problem)
        elif sent == endings.WINNERS:  # nobody has it: the app was stopped since its record is gone (C10)
            await self._refuse(Problem(OUTCOME_UNKNOWN, _UNKNOWN, operation=short_digest(self._hold.id)))
        elif sent == endings.RESPONSE:
            recorder, link = self._recorder, self._link
            if not recorder.streamed and self._head is not None:
                recorder.streamed = True
                await link.send(self._head)
            if self._last is not None:
                await link.send(self._last)
        elif sent == endings.CUT:
            self._cut(self._incomplete())
        return sent

    async def _refuse(self, problem: Problem) -> None:
        """Say what went wrong in place of the response; where that has begun, cut it."""
        if self._recorder.streamed:
            unknown = problem.kind is OUTCOME_UNKNOWN
            self._cut((OutcomeUnknown if unknown else StoreUnavailable)(f"The response was cut: {problem.detail}"))
            return
        self._recorder.hand_on()
        status, headers, body = render(problem, self._options.docs_url)
        await self._link.send({"type": "http.response.start", "status": status, "headers": headers})
        await self._link.send({"type": "http.response.body", "body": body})

    async def _answer_overtaken(self) -> None:
        """Another attempt took over: the caller gets its answer, or none that could be a second one (C8)."""
        conclusion = self._conclusion
        if conclusion is None:
            return
        if not self._recorder.streamed:
            self._recorder.hand_on()
            await self._owner.answer(conclusion)
        else:
            self._cut(_cut_by(conclusion, self._hold))

    def _cut(self, error: IdempotencyError) -> None:
        """Make the server cut the connection, by an error: a clean end would be a whole response."""
        if not self._deserted and not self._over.done():
            self._over.set_exception(error)

    def _incomplete(self) -> OutcomeUnknown:
        recorder = self._recorder
        what = (
            f"the app announced {recorder.announced} bytes and sent {recorder.came}"
            if recorder.reach is WRONG
            else "the app stopped before its end"
        )
        message = f"The response was cut: {what}. It is not kept, and whether it was done is not known."
        return OutcomeUnknown(message, digest=short_digest(self._hold.id))


def _cut_by(conclusion: Conclusion, hold: Hold) -> IdempotencyError:
    """The error that makes the server cut the connection."""
    digest = short_digest(hold.id)
    match conclusion:
        case Down(error):
            cut = StoreUnavailable("The response was cut: it could not be stored.", digest=digest)
            cut.__cause__ = error
            return cut
        case Completed() | Failed() | Replayed() | Busy() | Mismatched() | Refused() | Foreign():
            return operation.lease_lost(hold)
        case _:
            assert_never(conclusion)
