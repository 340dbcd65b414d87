"""One run of an ASGI app under a claim: its response is stored before its end is seen (H10), whoever leaves (H11).

The app runs in a task of its own. What it sends passes through `_send`, which settles the operation when the last
message arrives and only then lets that message go. So a response with one body message is held entirely, a stream all
but its end, and background tasks run after the operation was settled, as they run after the response without the layer.
What an end means stands in `settlement`, and the bookkeeping of the claim in `attempt`; this file performs them:

    RUNNING --max_run is over--> OVERDUE       a run without its client is stopped from here on
    RUNNING, OVERDUE --the last message, or the app has returned or raised--> SETTLING --> SETTLED
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from retryproof import operation
from retryproof.attempt import LoopAttempt
from retryproof.core.commands import Raised, WorkOutcome
from retryproof.core.errors import IdempotencyError
from retryproof.core.flow import Completed, Conclusion, Failed
from retryproof.core.hold import Hold
from retryproof.drive import clock
from retryproof.http import ending as endings
from retryproof.http.admission import Admission
from retryproof.http.answers import refusal
from retryproof.http.asgi_answers import AsgiEngine, send_answer, send_conclusion
from retryproof.http.client_link import ClientLink
from retryproof.http.problem import Problem
from retryproof.http.recorder import WRONG, is_interim
from retryproof.http.settlement import FAIL_OPEN, Settlement
from retryproof.http.types import AsgiMessage, AsgiScope
from retryproof.stores.opened import AsyncOpened, AsyncView

logger = logging.getLogger("retryproof.http")

RUNNING, OVERDUE, SETTLING, SETTLED = "running", "past max_run", "settling", "settled"
"""Where a run stands. SETTLED: there is a conclusion, and what it means was sent."""

_PARTS_A_TURN = 16
"""Parts of a stream after which the loop has its turn, while its client is there."""
_PARTS = frozenset(
    {"http.response.body", "http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"}
)
_OWN = (Completed, Failed)
"""Conclusions by which the run still had its operation."""
_REPEATABLE = (list, tuple)
_settling: set[asyncio.Task[Conclusion]] = set()
"""Tasks that the loop must not lose."""
_TOO_LONG = "it ran past max_run, and its client has left"


class AsgiRun:
    """The app's run for one request. Once made, `over` is to be waited for.

    over: the end of the run, or the cut of its connection; raises what the app raised.
    """

    # What a run begins with: set where it is otherwise.
    _stopped = ""  # what happened, when we cancelled the app
    _streamed = 0  # parts
    _rest: asyncio.Task[Conclusion] | None = None  # of a joined transaction
    _conclusion: Conclusion | None = None

    def __init__(
        self,
        engine: AsgiEngine,
        opened: AsyncOpened | AsyncView,
        admission: Admission,
        attempt: LoopAttempt,
        scope: AsgiScope,
        link: ClientLink,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._attempt = attempt
        self._scope = scope
        self._link = link
        self._state = RUNNING
        self._deserted = False  # by its server: nobody waits for what the app raises
        self._head: AsgiMessage | None = None  # these two are held
        self._last: AsgiMessage | None = None
        self._settlement = Settlement(attempt, engine.options, opened.capabilities.max_result)
        if admission.fails_open:
            attempt.operation.refuses_transactions = FAIL_OPEN
        attempt.hold.on_overrun = self._on_overrun
        link.on_left = self._on_left
        departure = self._on_departure = admission.on_departure
        link.stops = link.tells = departure == "stop"
        loop = self._loop = opened.loop
        self.over: asyncio.Future[None] = loop.create_future()
        task = self._task = loop.create_task(self._run())
        engine.running.add(task)

    # The server's task

    async def desert(self) -> None:
        """The server has cancelled its task, which waits for the end all the same, and goes on being cancelled then.

        A second cancellation does not wait: the run goes on in the background, and nothing is sent any more.
        """
        self._deserted = True
        if self._task.done():
            return
        logger.warning(
            "The server has cancelled operation %s, which goes on; if it is killed, its outcome is unknown.",
            self._admission.operation,
        )
        self._on_left()
        try:
            await asyncio.wait({self._task})
        except asyncio.CancelledError:
            self._link.detached = True

    # What befalls it from outside

    def _on_lost(self) -> None:
        """Another attempt took over; called from the keeper's thread."""
        try:
            self._loop.call_soon_threadsafe(self._cancel, endings.LEASE_LOST)
        except RuntimeError:  # the loop is closed, and the run has ended with it
            return

    def _on_overrun(self, hold: Hold) -> None:
        """Its lease is not renewed any more; called from the keeper's thread."""
        self._engine.attempts.overran(hold)
        try:
            self._loop.call_soon_threadsafe(self._run_over)
        except RuntimeError:  # as above
            return

    def _run_over(self) -> None:
        """From here on it may run for its client alone (H11)."""
        if self._state is not RUNNING:
            return
        self._state = OVERDUE
        if self._link.left or self._deserted:
            self.stop(_TOO_LONG)
        else:
            self._link.watch()

    def _on_left(self) -> None:
        """The client is gone, or the server is."""
        if self._state is OVERDUE:
            self.stop(_TOO_LONG)
        elif self._state is RUNNING:
            self._engine.departed.add(self)

    def stop(self, why: str) -> None:
        """Cancel the app, which nobody waits for: its outcome is unknown."""
        if self._cancel(endings.STOPPED):
            digest = self._admission.operation
            logger.warning("The handler of operation %s was stopped: %s. Its outcome is unknown.", digest, why)

    def _cancel(self, happened: str) -> bool:
        if self._state not in (RUNNING, OVERDUE) or self._stopped or self._task.done():
            return False
        self._stopped = happened
        return self._task.cancel()

    # The app's task

    async def _run(self) -> None:
        attempt, engine, link = self._attempt, self._engine, self._link
        hold = attempt.hold
        operation.enter(attempt.operation)
        error: BaseException | None = None
        raised: BaseException | None = None  # to those outside
        try:
            # Asked in the same step that calls the app (C6).
            if hold.may_begin(clock()) or await self._renewed():
                if attempt.policy.on_lease_lost == "cancel":
                    hold.on_lost = self._on_lost
                    if hold.lost:  # told meanwhile, in the keeper's thread
                        self._on_lost()
                try:
                    await engine.app(self._scope, link.receive, self._send)
                except BaseException as of_app:  # noqa: BLE001  # raised again, as the table says
                    error = of_app
                if self._state is SETTLED or await self._goes_on(error):
                    raised = error
        except BaseException as ours:  # noqa: BLE001  # handed to the server's task, which raises it
            raised = ours
        hold.on_lost = link.on_left = None  # leaves no cycle to the garbage collector
        hold.on_overrun = engine.attempts.overran
        if link.left or self._deserted:
            engine.departed.discard(self)
        engine.running.discard(self._task)
        attempt.leave()
        link.close()
        if raised is None and not self.over.done():
            self.over.set_result(None)
        else:
            self._hand_over(raised)
        error = raised = None  # their tracebacks lead here

    def _hand_over(self, error: BaseException | None) -> None:
        """Give what the app raised to the server's task."""
        if self._deserted or self.over.done():
            if isinstance(error, Exception):
                logger.error("A handler failed after its request was over.", exc_info=error)
        elif isinstance(error, asyncio.CancelledError):
            self.over.cancel()
        elif error is not None:
            self.over.set_exception(error)

    async def _renewed(self) -> bool:
        """Whether the app may begin after all; else another attempt has it, or the store gave no answer (C6)."""
        conclusion = await self._attempt.renew()
        if conclusion is None:
            return True
        self._state = SETTLING
        self._settlement.end(endings.TOO_LATE)
        await self._conclude(conclusion)
        return False

    async def _goes_on(self, error: BaseException | None) -> bool:
        """The app has returned, or raised this, before it was settled: settle that; whether what it raised goes on."""
        rest = self._attempt.rest or self._rest
        if rest is not None:  # its last message's sender was cancelled on the way; it is seen to its end
            await self._conclude(await asyncio.shield(rest))
        if self._state in (SETTLING, SETTLED):
            return True
        settlement = self._settlement
        if error is None:
            await self._settle(settlement.answered())
            return settlement.raises
        link = self._link
        cancelled = isinstance(error, asyncio.CancelledError)
        stopped = self._stopped if cancelled or self._stopped == endings.STOPPED else ""
        if self._stopped and cancelled:
            self._task.uncancel()
        await self._settle(settlement.happened(error, stopped, told_to_stop=link.stops and link.left), error)
        return settlement.raises and not (self._stopped and cancelled)

    # The app's response

    async def _send(self, message: AsgiMessage) -> None:
        kind, link = message["type"], self._link
        if self._state is not RUNNING and self._state is not OVERDUE:
            if self._conclusion is None or isinstance(self._conclusion, _OWN):
                await link.send(message)  # after the end; the server knows what to say
        elif self._head is None:
            if kind == "http.response.start" and not is_interim(message["status"]):
                self._take_head(message)
            else:
                await link.send(message)  # early hints, and what is out of order
        elif kind in _PARTS:
            if self._take(kind, message):
                self._last = message
                await self._settle(self._settlement.answered())
            else:
                await self._stream(message)
        elif kind == "http.response.start" and not is_interim(message["status"]):
            # In the words of servers, which would say so after the wrong head.
            raise RuntimeError("Unexpected ASGI message 'http.response.start': the response has started already.")
        else:
            await link.send(message)  # pushes, debug, late hints

    def _take_head(self, message: AsgiMessage) -> None:
        headers = message.get("headers", ())
        if not isinstance(headers, _REPEATABLE):  # ASGI says an iterable, which may be good for one look
            headers = list(headers)
        settlement = self._settlement
        handed = settlement.take_head(message["status"], headers, trailers=message.get("trailers", False))
        self._head = {**message, "headers": headers if handed is None else handed}
        if callable(self._on_departure):
            self._on_departure = settlement.departure(self._on_departure)
            if self._on_departure == "stop":
                self._link.stop_without_client()

    def _take(self, kind: str, message: AsgiMessage) -> bool:
        """Take a part of the response; whether it is the last."""
        if kind == "http.response.body":
            return self._settlement.part(message.get("body", b""), more=message.get("more_body", False))
        if kind == "http.response.trailers":
            return self._settlement.trailers(more=message.get("more_trailers", False))
        return self._settlement.unseen(more=message.get("more_body", False))

    async def _stream(self, message: AsgiMessage) -> None:
        """Let go of a part that is not the last."""
        link = self._link
        if self._settlement.reach is WRONG:  # what is too long is never whole: it is cut when the app ends
            await asyncio.sleep(0)
            return
        if self._settlement.stream():
            link.watch()
            if self._head is not None:
                await link.send(self._head)
        # An app that never waits, and whose server takes what it says to nobody, would hold the loop; and in a loop
        # that is held nobody hears that the client has left.
        self._streamed += 1
        if link.left or self._streamed % _PARTS_A_TURN == 0:
            await asyncio.sleep(0)
        await link.send(message)

    # The end

    async def _settle(self, happened: str, error: BaseException | None = None) -> None:
        """Give the record what the table says, and send what it says."""
        attempt, link = self._attempt, self._link
        self._state = SETTLING
        link.stops = False  # the app has nothing left to stop for
        if link.left or self._deserted:
            self._engine.departed.discard(self)
        outcome = self._settlement.end(happened, error)
        if attempt.operation.joined:
            # In a task of its own: no cancellation may part the commit from what follows.
            self._rest = self._loop.create_task(self._end_transaction(outcome))
            _settling.add(self._rest)
            self._rest.add_done_callback(_settling.discard)
            conclusion = await asyncio.shield(self._rest)
        else:
            conclusion = await attempt.finish(outcome)
        link.tell()
        await self._conclude(conclusion)

    async def _end_transaction(self, outcome: WorkOutcome) -> Conclusion:
        """Commit the handler's transaction with its response, or roll it back and call that no success (T1)."""
        attempt, settlement = self._attempt, self._settlement
        settled, error = await operation.asettle(attempt.operation, Raised() if settlement.rolls_back else outcome)
        if error is not None:
            settlement.transaction_failed(settled, error)
        elif settlement.rolls_back:
            settled = outcome
        return await attempt.finish(settled)

    def _conclude(self, conclusion: Conclusion) -> Awaitable[None]:
        """The operation is settled, by this run or by another; to be awaited: what that means is sent."""
        self._state, self._conclusion = SETTLED, conclusion
        link, settlement = self._link, self._settlement
        sending = settlement.sending(conclusion, gone=link.left or self._deserted)
        if sending is endings.RESPONSE:
            head, last = self._head, self._last
            if head is None or settlement.streamed:
                return link.send() if last is None else link.send(last)
            settlement.streamed = True
            return link.send(head) if last is None else link.send(head, last)
        if isinstance(sending, Problem):
            return send_answer(refusal(sending, self._engine.options), link.send)
        if isinstance(sending, IdempotencyError):
            if not self._deserted and not self.over.done():
                self.over.set_exception(sending)  # the server cuts: a clean end would be a whole response
        elif sending is not None:
            return send_conclusion(self._engine, self._admission, conclusion, link.send)
        return link.send()
