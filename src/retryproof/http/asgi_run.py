"""One run of an ASGI app under a claim: its response is stored before its end is seen (H10), whoever leaves (H11).

The app runs in a task of its own. Its messages pass through `_send`. When the last message arrives, `_send` settles the
operation, and only then sends that message. So a response with one body message is held completely, and of a stream
only the end. Background tasks run after the operation was settled, as they run after the response without the
middleware. `settlement` says what an end means, and `attempt` has the bookkeeping of the claim; this file performs
them:

    RUNNING --max_run is over--> OVERDUE       a run without its client is stopped from here on
    RUNNING, OVERDUE --the last message, or the app has returned or raised--> SETTLING --> SETTLED

Most responses are one head and one body, from an app that reads only its request. `plain_answer` decides these without
a Settlement and without the client's link. Both are made when they are first needed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable
from inspect import CORO_CREATED, getcoroutinestate
from types import CoroutineType
from typing import Any, cast

from retryproof import operation
from retryproof.attempt import LoopAttempt
from retryproof.core.commands import Raised, WorkOutcome
from retryproof.core.errors import IdempotencyError
from retryproof.core.flow import Completed, Conclusion
from retryproof.drive import clock
from retryproof.http import ending as endings
from retryproof.http.admission import Admission
from retryproof.http.answers import refusal
from retryproof.http.asgi_answers import AsgiEngine, send_answer, send_conclusion
from retryproof.http.client_link import ClientLink
from retryproof.http.problem import Problem
from retryproof.http.recorder import WRONG, is_interim
from retryproof.http.semantics import ReadHeaders, read_headers
from retryproof.http.settlement import FAIL_OPEN, OWN, Settlement, limit_of, plain_answer
from retryproof.http.types import REPEATABLE, AsgiMessage, AsgiScope, Receive, Send
from retryproof.stores.opened import AsyncOpened, AsyncView

logger = logging.getLogger("retryproof.http")

RUNNING, OVERDUE, SETTLING, SETTLED = "running", "past max_run", "settling", "settled"
"""The state of a run. SETTLED: there is a conclusion, and its response was sent."""

_PARTS_A_TURN = 16
"""After this many parts of a stream, yield to the event loop, while the client is connected."""
_PARTS = frozenset(
    {"http.response.body", "http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"}
)
_settling: set[asyncio.Task[Conclusion]] = set()
"""References to tasks, so that the loop does not lose them."""
_TOO_LONG = "it ran past max_run, and its client has left"


class AsgiRun:
    """The app's run for one request. Once made, `over` is to be waited for.

    over: the end of the run, or the cut of its connection; raises what the app raised. loop, task: the app's.
    """

    # What a run begins with: set where it is otherwise.
    _stopped = ""  # what happened, when we cancelled the app
    _streamed = 0  # parts
    _unread = True  # the body
    _settlement: Settlement | None = None
    _read: ReadHeaders | None = None  # of a head that no Settlement has taken
    _rest: asyncio.Task[Conclusion] | None = None  # of a joined transaction
    _conclusion: Conclusion | None = None

    def __init__(
        self,
        engine: AsgiEngine,
        opened: AsyncOpened | AsyncView,
        admission: Admission,
        attempt: LoopAttempt,
        scope: AsgiScope,
        receive: Receive,
        send: Send,
        link: ClientLink | None = None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._attempt = attempt
        self._server_receive = receive
        self._server_send = send
        self._link: ClientLink | None = None
        self._limit = limit_of(attempt.policy, opened.capabilities.max_result)
        self._state = RUNNING
        self._deserted = False  # by its server: nobody waits for what the app raises
        self._head: AsgiMessage | None = None  # these two are held
        self._last: AsgiMessage | None = None
        if admission.fails_open:
            attempt.operation.refuses_transactions = FAIL_OPEN
        if link is None and not isinstance(admission.body, bytes):
            link = ClientLink(receive, send, admission.body or b"")
        if link is not None:
            self._use(link)
        loop = self.loop = opened.loop
        engine.runs[attempt.hold] = self
        self.over: asyncio.Future[None] = loop.create_future()
        self.task = loop.create_task(self._run(scope))
        if link is not None and link.left:  # while the claim was on its way
            self._on_left()

    # What is made when it is needed

    @property
    def link(self) -> ClientLink:
        """The client's."""
        link = self._link
        if link is None:
            link = ClientLink(self._server_receive, self._server_send, self._admission.body or b"")
            link.unread = self._unread
            self._use(link)
        return link

    def _use(self, link: ClientLink) -> None:
        stops = self._admission.on_departure == "stop"
        link.on_left = self._on_left
        link.stops = stops and self._state in (RUNNING, OVERDUE)
        link.tells = stops or self._state is SETTLED
        self._link = link

    @property
    def _left(self) -> bool:
        """Whether the client is known to have gone, or the server is."""
        return self._deserted or (self._link is not None and self._link.left)

    @property
    def settlement(self) -> Settlement:
        """What the run comes to, with what was held of the response."""
        settlement = self._settlement
        if settlement is None:
            settlement = self._settlement = Settlement(self._attempt, self._engine.options, self._limit)
            if self._head is not None:
                settlement.retake_head(self._head["status"], self._head["headers"])
            if self._last is not None:  # and was being settled as what it says
                settlement.part(self._last.get("body", b""), more=False)
                settlement.end(endings.ANSWERED)
        return settlement

    # The server's task

    async def desert(self) -> None:
        """The server has cancelled its task, which waits for the end all the same, and goes on being cancelled then.

        A second cancellation does not wait: the run goes on in the background, and nothing is sent any more.
        """
        self._deserted = True
        if self.task.done():
            return
        logger.warning(
            "The server has cancelled operation %s, which goes on; if it is killed, its outcome is unknown.",
            self._admission.operation,
        )
        self._on_left()
        try:
            await asyncio.wait({self.task})
        except asyncio.CancelledError:
            self.link.detached = True
            self._server_send = _say_nothing

    # Events from outside

    def _on_lost(self) -> None:
        """Another attempt took over; called from the keeper's thread."""
        try:
            self.loop.call_soon_threadsafe(self._cancel, endings.LEASE_LOST)
        except RuntimeError:  # the loop is closed, and the run has ended with it
            return

    def overran(self) -> None:
        """Its lease is not renewed any more; called from the keeper's thread."""
        try:
            self.loop.call_soon_threadsafe(self._run_over)
        except RuntimeError:  # as above
            return

    def _run_over(self) -> None:
        """`max_run` is over: from here on it may run only with its client (H11)."""
        if self._state is not RUNNING:
            return
        self._state = OVERDUE
        if self._left:
            self.stop(_TOO_LONG)
        else:
            self.link.watch()

    def _on_left(self) -> None:
        """The client is gone, or the server is."""
        if self._state is OVERDUE:
            self.stop(_TOO_LONG)
        elif self._state is RUNNING:
            self._engine.departed.add(self)

    def stop(self, why: str) -> None:
        """Cancel an app that nobody waits for: its outcome is unknown."""
        if self._cancel(endings.STOPPED):
            digest = self._admission.operation
            logger.warning("The handler of operation %s was stopped: %s. Its outcome is unknown.", digest, why)

    def _cancel(self, happened: str) -> bool:
        if self._state not in (RUNNING, OVERDUE) or self._stopped or self.task.done():
            return False
        if getcoroutinestate(cast("CoroutineType[Any, Any, None]", self.task.get_coro())) == CORO_CREATED:
            # Cancelled before its first step it would never run, and so never end: neither the request nor the claim.
            self.loop.call_soon(self._cancel, happened)
            return False
        self._stopped = happened
        return self.task.cancel()

    # The app's task

    async def _run(self, scope: AsgiScope) -> None:
        attempt, engine = self._attempt, self._engine
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
                    await engine.app(scope, self._receive, self._send)
                except BaseException as of_app:  # noqa: BLE001  # raised again, as the table says
                    error = of_app
                if self._state is SETTLED or await self._goes_on(error):
                    raised = error
        except BaseException as ours:  # noqa: BLE001  # handed to the server's task, which raises it
            raised = ours
        hold.on_lost = None  # leaves no cycle to the garbage collector
        del engine.runs[hold]
        attempt.leave()
        if self._deserted or self._link is not None:
            engine.departed.discard(self)
            self.link.on_left = None
            self.link.close()
        if raised is None and not self.over.done():
            self.over.set_result(None)
        else:
            self._hand_over(raised)
        error = raised = None  # their tracebacks lead here

    def _hand_over(self, error: BaseException | None) -> None:
        """Pass the app's exception to the server's task."""
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
        self.settlement.end(endings.TOO_LATE)
        await self._conclude(conclusion)
        return False

    async def _goes_on(self, error: BaseException | None) -> bool:
        """The app has returned, or raised this, before it was settled: settle that; whether what it raised goes on."""
        rest = self._attempt.rest or self._rest
        if rest is not None:  # its last message's sender was cancelled on the way; it is seen to its end
            await self._conclude(await asyncio.shield(rest))
        if self._state in (SETTLING, SETTLED):
            return True
        settlement = self.settlement
        if error is None:
            await self._settle(settlement.answered())
            return settlement.raises
        link = self.link
        cancelled = isinstance(error, asyncio.CancelledError)
        stopped = self._stopped if cancelled or self._stopped == endings.STOPPED else ""
        if self._stopped and cancelled:
            self.task.uncancel()
        await self._settle(settlement.happened(error, stopped, told_to_stop=link.stops and link.left), error)
        return settlement.raises and not (self._stopped and cancelled)

    # The app's response

    async def _receive(self) -> AsgiMessage:
        if self._unread and self._link is None:
            self._unread = False
            return {"type": "http.request", "body": self._admission.body, "more_body": False}
        return await self.link.receive()

    async def _send(self, message: AsgiMessage) -> None:
        kind = message["type"]
        if self._state is not RUNNING and self._state is not OVERDUE:
            if self._conclusion is None or isinstance(self._conclusion, OWN):
                await self.link.send(message)  # after the end; the server knows what to say
        elif self._head is None:
            if kind == "http.response.start" and not is_interim(message["status"]):
                self._take_head(message)
            else:
                await self.link.send(message)  # early hints, and what is out of order
        elif kind == "http.response.body":
            more = message.get("more_body", False)
            if self._read is not None and not more:
                await self._answer(self._head, self._read, message)
            elif self.settlement.part(message.get("body", b""), more=more):
                await self._settle_with(message)
            else:
                await self._stream(message)
        elif kind in _PARTS:
            if self._take_unseen(kind, message):
                await self._settle_with(message)
            else:
                await self._stream(message)
        elif kind == "http.response.start" and not is_interim(message["status"]):
            # In the words of servers, which would say so after the wrong head.
            raise RuntimeError("Unexpected ASGI message 'http.response.start': the response has started already.")
        else:
            await self.link.send(message)  # pushes, debug, late hints

    def _take_head(self, message: AsgiMessage) -> None:
        headers = message.get("headers", ())
        if not isinstance(headers, REPEATABLE):
            headers = list(headers)
        decides = self._admission.on_departure
        if sys.exception() is None and not callable(decides) and not message.get("trailers"):
            try:
                pairs = list(map(tuple, headers))
                self._read = read_headers(pairs, self._engine.options.not_kept)
            except (TypeError, ValueError, AttributeError):  # the settlement says what that means
                self._read = None
            else:
                self._head = {**message, "headers": pairs}
                return
        settlement = self.settlement
        handed = settlement.take_head(message["status"], headers, trailers=message.get("trailers", False))
        self._head = {**message, "headers": headers if handed is None else handed}
        if callable(decides) and settlement.departure(decides) == "stop":
            self.link.stop_without_client()

    async def _answer(self, head: AsgiMessage, read: ReadHeaders, message: AsgiMessage) -> None:
        """The response is whole in one part: the straight way, where that is plain."""
        attempt, body = self._attempt, message.get("body", b"")
        outcome = plain_answer(attempt.operation, self._engine.options, head["status"], read, body, self._limit)
        if outcome is None:
            self.settlement.part(body, more=False)
            await self._settle_with(message)
            return
        self._state, self._last = SETTLING, message
        if self._link is not None or self._deserted:
            self.link.stops = False
            self._engine.departed.discard(self)
        conclusion = await attempt.finish(outcome)
        if self._link is None and type(conclusion) is Completed:
            self._state, self._conclusion = SETTLED, conclusion
            for held in (head, message):
                try:
                    await self._server_send(held)
                except OSError:
                    self.link.left = True
            return
        self.link.tell()
        await self._conclude(conclusion)

    def _take_unseen(self, kind: str, message: AsgiMessage) -> bool:
        """Take what is no part of a body that can be kept; whether it is the last of the response."""
        if kind == "http.response.trailers":
            return self.settlement.trailers(more=message.get("more_trailers", False))
        return self.settlement.unseen(more=message.get("more_body", False))

    async def _stream(self, message: AsgiMessage) -> None:
        """Let go of a part that is not the last."""
        link, settlement = self.link, self.settlement
        self._read = None
        if settlement.reach is WRONG:  # what is too long is never whole: it is cut when the app ends
            await asyncio.sleep(0)
            return
        if settlement.stream():
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

    async def _settle_with(self, last: AsgiMessage) -> None:
        """The last message of a response has come, and is held."""
        self._last = last
        await self._settle(self.settlement.answered())

    async def _settle(self, happened: str, error: BaseException | None = None) -> None:
        """Write to the record and send to the client what the table says."""
        attempt, link, settlement = self._attempt, self.link, self.settlement
        self._state = SETTLING
        link.stops = False  # the app has nothing left to stop for
        if self._left:
            self._engine.departed.discard(self)
        outcome = settlement.end(happened, error)
        if settlement.joined:
            # In a task of its own, so that no cancellation separates the commit from what follows.
            self._rest = self.loop.create_task(self._end_transaction(outcome))
            _settling.add(self._rest)
            self._rest.add_done_callback(_settling.discard)
            conclusion = await asyncio.shield(self._rest)
        else:
            conclusion = await attempt.finish(outcome)
        link.tell()
        await self._conclude(conclusion)

    async def _end_transaction(self, outcome: WorkOutcome) -> Conclusion:
        """Commit the handler's transaction with its response, or roll it back and call that no success (T1)."""
        attempt, settlement = self._attempt, self.settlement
        settled, error = await operation.asettle(attempt.operation, Raised() if settlement.rolls_back else outcome)
        if error is not None:
            settlement.transaction_failed(settled, error)
        elif settlement.rolls_back:
            settled = outcome
        return await attempt.finish(settled)

    def _conclude(self, conclusion: Conclusion) -> Awaitable[None]:
        """The operation is settled, by this run or by another; to be awaited: what that means is sent."""
        self._state, self._conclusion = SETTLED, conclusion
        link, settlement = self.link, self.settlement
        sending = settlement.sending(conclusion, gone=self._left)
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


async def _say_nothing(message: AsgiMessage) -> None:
    """Send to a server that is done with the request."""
