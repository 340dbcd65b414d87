"""One run of the app under a claim: its response is stored before its end is seen (H10), whoever leaves (H11).

The app runs in a task of its own. What it sends passes through `_send`, which settles the operation when the last
message arrives and only then lets that message go. So a response with one body message is held entirely, a stream all
but its end, and background tasks run after the operation was settled, as they run after the response without the layer.

    no head --start--> head held --last--> settled --> head and last are sent
                       head held --chunk--> streaming --last--> settled --> last is sent
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, assert_never

from retryproof import operation
from retryproof.core.codec import Unencodable, pack_response
from retryproof.core.commands import Cancelled, LeaseLost, Outcome, Raised, Returned
from retryproof.core.errors import IdempotencyError, StoreUnavailable
from retryproof.core.failure import outcome_of, unknown_in
from retryproof.core.flow import (
    Busy,
    Completed,
    Conclusion,
    Down,
    Failed,
    Flow,
    Foreign,
    Mismatched,
    Refused,
    Replayed,
)
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.drive import AsyncPerformer, afinish, arenew, clock
from retryproof.http.client_link import ClientLink
from retryproof.http.options import Options
from retryproof.http.problem import (
    HANDLER_FAILED,
    OUTCOME_UNKNOWN,
    STORE_UNAVAILABLE,
    TRANSACTION_FAILED,
    Problem,
    render,
)
from retryproof.http.semantics import Header, Headers, headers_without_body, is_event_stream, kept_headers, settles
from retryproof.http.types import App, Message, Scope

logger = logging.getLogger("retryproof.http")

_UNKNOWN = "The service does not know whether it was done. Retrying does not help; ask the operator."

_UNSTORABLE_END = ("http.response.pathsend", "http.response.trailers")
_PARTS = ("http.response.body", "http.response.zerocopysend", *_UNSTORABLE_END)

_settling: set[asyncio.Task[Conclusion]] = set()
"""Tasks that the loop must not lose."""
_FAIL_OPEN = (
    "fail_open runs a handler without a record when the store is down, and in a transaction there is no such thing: "
    "use one or the other on a route."
)
_NOT_KEPT = (
    "The response is one that this service does not keep, so what was done with it was rolled back. Nothing was done."
)


def _refusal(outcome: Outcome, error: BaseException) -> Problem:
    """What a caller is told whose handler succeeded and whose transaction did not."""
    if not isinstance(outcome, Raised) or not outcome.unknown:
        return Problem(TRANSACTION_FAILED, "Nothing was done. Try again with the same key.")
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

    def told(self, conclusion: Conclusion) -> None:
        """Hear the conclusion."""

    async def answer(self, conclusion: Conclusion) -> None:
        """Send what a conclusion other than one's own means to the caller."""

    def ended(self, task: asyncio.Task[None]) -> None:
        """The app has returned or raised; called once, in its task."""


class Execution:
    """The app's run for one request."""

    __slots__ = (
        "_conclusion",
        "_copied",
        "_copy",
        "_deserted",
        "_flow",
        "_head",
        "_head_sent",
        "_hold",
        "_last",
        "_link",
        "_loop",
        "_lost",
        "_max_result",
        "_operation",
        "_options",
        "_over",
        "_owner",
        "_policy",
        "_refusal",
        "_rest",
        "_scope",
        "_settling",
        "_store",
        "_task",
    )

    def __init__(
        self,
        owner: Owner,
        scope: Scope,
        *,
        flow: Flow,
        hold: Hold,
        store: AsyncPerformer,
        max_result: int,
        fails_open: bool,
    ) -> None:
        self._owner = owner
        self._scope = scope
        self._link = owner.link
        self._options = owner.options
        self._policy = owner.policy
        self._flow = flow
        self._hold = hold
        self._store = store
        self._max_result = max_result
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._deserted = False  # by its server: nobody waits for what the app raises
        self._task: asyncio.Task[None] | None = None
        # The response as the app makes it.
        self._head: Message | None = None
        self._head_sent = False
        self._copy: list[bytes] | None = []
        self._copied = 0
        self._last: Message | None = None
        # Where the operation stands.
        self._settling = False
        self._rest: asyncio.Task[Conclusion] | None = None
        self._conclusion: Conclusion | None = None
        self._lost = False
        self._operation = operation.LoopOperation(self._hold, store, self._policy, self._loop)
        if fails_open:
            self._operation.refuses_transactions = _FAIL_OPEN
        self._refusal: Problem | None = None

    # The server's task

    def start(self) -> asyncio.Task[None]:
        """Start the app in its own task; the hold must be watched already."""
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
                try:
                    await asyncio.wait({self._task})
                except asyncio.CancelledError:
                    self._link.detached = True
            raise

    def _end(self, error: BaseException | None) -> None:
        """The app has returned or raised."""
        self._hold.on_lost = None  # leaves no cycle to the garbage collector
        if not self._settling:  # only after an error of the layer's own
            self._store.background.unwatch(self._hold)
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

    def _on_lost(self) -> None:
        """Another attempt took over; called from the keeper's thread."""
        try:
            self._loop.call_soon_threadsafe(self._cancel_overtaken)
        except RuntimeError:  # the loop is closed, and the run has ended with it
            return

    def _cancel_overtaken(self) -> None:
        if self._task is not None and not self._settling and not self._task.done():
            self._lost = True
            self._task.cancel()

    # The app's task

    async def _run(self) -> None:
        operation.enter(self._operation)
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
            except asyncio.CancelledError:
                await self._after_cancellation()
            except BaseException as error:
                outcome = outcome_of(error, self._policy.unknown_on)
                if isinstance(outcome, Cancelled):  # such as SystemExit: the effect may have happened
                    if not await self._settled_elsewhere():
                        await self._settle(outcome)
                    raise
                if outcome.unknown and isinstance(error, Exception):
                    await self._after_unknown(error)
                elif isinstance(error, Exception):
                    await self._after_error(error)
                    raise
                else:  # a group of both: what is unknown counts, and what stops the process goes on
                    if not await self._settled_elsewhere():
                        await self._settle(outcome)
                    raise
            else:
                if self._conclusion is None:
                    await self._after_return()
        except BaseException as error:  # noqa: BLE001  # handed to the server's task, which raises it
            self._end(error)
        else:
            self._end(None)

    async def _renewed(self) -> bool:
        """Whether the app may begin after all; else another attempt has it, or the store gave no answer (C6)."""
        self._conclusion = await arenew(self._flow, self._hold, self._store, self._policy.store_timeout)
        if self._conclusion is None:
            return True
        self._settling = True
        self._operation.refuses_transactions = operation.ENDED
        self._owner.told(self._conclusion)
        await self._answer_overtaken()
        return False

    async def _after_return(self) -> None:
        if await self._settled_elsewhere():
            return
        if self._head is None and not self._link.left:
            await self._fail(Raised())  # the server says what it thinks of an app that never answers
            return
        if self._operation.joined and self._last is None:
            await self._fail(Raised())  # nobody knows what its work lacks, and here it can be undone
            return
        # The app stopped in the middle of its response, as frameworks do when the client leaves: its work is done.
        self._copy = None
        await self._settle(self._outcome())
        if self._refusal is not None and isinstance(self._conclusion, Completed | Failed):
            await self._refuse(self._refusal)
        elif isinstance(self._conclusion, Completed | Failed) and self._head is not None and not self._head_sent:
            await self._send_head()
        elif not isinstance(self._conclusion, Completed | Failed):
            await self._answer_overtaken()

    async def _after_error(self, error: Exception) -> None:
        if await self._settled_elsewhere():
            return
        parted = self._head_sent and self._link.left and not self._link.keeps_going
        if parted and self._settles() and not self._operation.joined:
            # What stopped the app is that its client had left; its work is done.
            await self._settle(self._outcome())
        elif self._is_final(HANDLER_FAILED.status, ()):
            await self._store_failure()
        else:
            await self._fail(Raised())

    async def _store_failure(self) -> None:
        """The policy keeps failures: the first caller gets this one as a replay will give it. Its work is not kept."""
        await self._operation.arollback()
        if self._head_sent:
            self._copy = None
            await self._settle(self._outcome())
            return
        detail = "The handler failed. The policy of this service keeps failures, so a retry gets the same answer."
        status, headers, body = render(Problem(HANDLER_FAILED, detail), self._options.docs_url)
        self._head = {"type": "http.response.start", "status": status, "headers": headers}
        self._copy, self._copied = [body], len(body)
        self._last = {"type": "http.response.body", "body": body}
        await self._settle(self._outcome())
        await self._conclude()

    async def _after_unknown(self, error: Exception) -> None:
        if await self._settled_elsewhere():
            raise error
        await self._settle(Raised(unknown=True))
        if not isinstance(self._conclusion, Completed | Failed):
            await self._answer_overtaken()
        elif self._head_sent:
            raise error
        else:
            said = unknown_in(error)
            logger.warning(
                "A handler does not know the outcome of operation %s.",
                short_digest(self._hold.id),
                exc_info=error if said is not error else None,
            )
            detail = _UNKNOWN if said is None else said.message
            problem = Problem(OUTCOME_UNKNOWN, detail, operation=short_digest(self._hold.id))
            status, headers, body = render(problem, self._options.docs_url)
            await self._link.send({"type": "http.response.start", "status": status, "headers": headers})
            await self._link.send({"type": "http.response.body", "body": body})

    async def _after_cancellation(self) -> None:
        if await self._settled_elsewhere():
            raise asyncio.CancelledError
        if not self._lost:
            await self._settle(Cancelled())
            raise asyncio.CancelledError
        if self._task is not None:
            self._task.uncancel()
        await self._fail(LeaseLost())

    async def _fail(self, reply: Outcome) -> None:
        await self._settle(reply)
        if not isinstance(self._conclusion, Completed | Failed):
            await self._answer_overtaken()

    async def _settled_elsewhere(self) -> bool:
        """Whether the last message has come before; one whose sender was cancelled on the way is seen to its end."""
        if self._rest is not None and self._conclusion is None:
            self._conclusion = await asyncio.shield(self._rest)
            self._owner.told(self._conclusion)
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
        elif self._take(kind, message, self._head):
            await self._settle(self._outcome())
            await self._conclude()
        else:
            await self._stream(message)

    def _take_head(self, message: Message) -> None:
        headers = message.get("headers", ())
        if not isinstance(headers, list | tuple):  # ASGI says an iterable, which may be good for one look
            message = {**message, "headers": (headers := list(headers))}
        self._head = message
        answered = sys.exception()
        if answered is not None:  # frameworks answer an exception while they handle it
            self._operation.hear(answered)
        if message.get("trailers") or is_event_stream(headers):
            self._keep_nothing()

    def _take(self, kind: str, message: Message, head: Message) -> bool:
        """Keep a part of the response, where it can be kept; whether it is the last."""
        if kind == "http.response.body":
            self._keep(message.get("body", b""))
        else:
            self._keep_nothing()
        if kind in _UNSTORABLE_END:
            last = not message.get("more_trailers", False)
        else:
            last = not message.get("more_body", False) and not head.get("trailers")
        if last:
            self._last = message
        return last

    async def _stream(self, message: Message) -> None:
        """Let go of a part that is not the last."""
        if not self._head_sent:
            if not self._settles():
                self._keep_nothing()
            await self._send_head()
        if self._copy is None and self._link.keeps_going and not self._operation.joined:
            self._link.stop_without_client()
        await self._link.send(message)

    def _keep(self, chunk: bytes) -> None:
        if self._copy is None:
            return
        self._copied += len(chunk)
        if self._copied > self._max_result:
            self._keep_nothing()
        else:
            self._copy.append(bytes(chunk))  # what an app sends may be its buffer, and is used again

    def _keep_nothing(self) -> None:
        self._copy = None

    async def _send_head(self) -> None:
        self._head_sent = True
        if self._head is not None:
            await self._link.send(self._head)

    # Settling

    def _settles(self) -> bool:
        if self._head is None:
            return True
        return self._is_final(self._head["status"], self._head.get("headers", ()))

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

    def _outcome(self) -> Outcome:
        """What the response so far means for the operation."""
        return Returned(self._encoded()) if self._settles() else Raised()

    def _encoded(self) -> bytes | None:
        """The response as it is stored: whole, or without its body, or not at all (H10)."""
        if self._head is None:
            return None
        status: int = self._head["status"]
        try:
            headers = kept_headers(
                self._head.get("headers", ()),
                set_cookie=self._options.keep_set_cookie,
                mark=self._options.replay_header,
            )
            if self._copy is not None:
                encoded = pack_response(status, headers, b"".join(self._copy))
                if len(encoded) <= self._max_result:
                    return encoded
            return self._omitting(status, headers)
        except (Unencodable, TypeError, AttributeError):  # headers that are none; the server will say so
            return None

    def _omitting(self, status: int, headers: Headers) -> bytes | None:
        nothing: Headers = []
        for kept in (headers_without_body(headers), nothing):
            encoded = pack_response(status, kept, b"", omitted=True)
            if len(encoded) <= self._max_result:
                return encoded
        return None

    async def _settle(self, reply: Outcome) -> None:
        self._settling = True
        self._link.keeps_going = True  # the app has nothing left to stop for
        said = self._operation.said(reply)
        if said is not reply and isinstance(reply, Returned) and self._head is not None and self._head["status"] < 400:
            self._refusal = Problem(OUTCOME_UNKNOWN, _UNKNOWN)  # nobody sees a success that is not stored
        reply = said
        if self._operation.joined:
            # In a task of its own: no cancellation may part the commit from what follows.
            self._rest = self._loop.create_task(self._end_transaction(reply))
            _settling.add(self._rest)
            self._rest.add_done_callback(_settling.discard)
            self._conclusion = await asyncio.shield(self._rest)
        else:
            self._operation.refuses_transactions = operation.ENDED
            self._conclusion = await afinish(
                self._flow, reply, self._hold, self._store, self._policy.store_timeout, self._adopt
            )
        self._owner.told(self._conclusion)

    async def _end_transaction(self, reply: Outcome) -> Conclusion:
        """Commit the handler's transaction with its response, or roll it back and call that no success (T1).

        A failure that the policy keeps is kept without the work: nobody takes a 500 for done.
        """
        if isinstance(reply, Returned) and self._head is not None and self._head["status"] >= 500:
            await operation.asettle(self._operation, Raised())
            settled: operation.Settled = (reply, None)
        else:
            settled = await operation.asettle(self._operation, reply)
        outcome, error = settled
        if error is not None:
            logger.error("The transaction of operation %s failed.", short_digest(self._hold.id), exc_info=error)
            self._refusal = _refusal(outcome, error)
        elif isinstance(reply, Raised) and self._head is not None and self._head["status"] < 400:
            self._refusal = Problem(TRANSACTION_FAILED, _NOT_KEPT)
        return await afinish(self._flow, outcome, self._hold, self._store, self._policy.store_timeout, self._adopt)

    def _adopt(self, rest: asyncio.Task[Conclusion]) -> None:
        self._rest = rest

    async def _conclude(self) -> None:
        """The operation is settled, or was settled by another: let the response go, or answer for the other one."""
        if not isinstance(self._conclusion, Completed | Failed):
            await self._answer_overtaken()
            return
        if self._refusal is not None:
            await self._refuse(self._refusal)
            return
        if not self._head_sent:
            await self._send_head()
        if self._last is not None:
            await self._link.send(self._last)

    async def _refuse(self, problem: Problem) -> None:
        """Say that the transaction failed, in place of the response that was to go with it."""
        if self._head_sent:
            if not self._over.done():
                self._over.set_exception(StoreUnavailable(f"The response was cut: {problem.detail}"))
            return
        self._head_sent = True
        problem = replace(problem, operation=short_digest(self._hold.id))
        status, headers, body = render(problem, self._options.docs_url)
        await self._link.send({"type": "http.response.start", "status": status, "headers": headers})
        await self._link.send({"type": "http.response.body", "body": body})

    async def _answer_overtaken(self) -> None:
        """Another attempt took over: the caller gets its answer, or none that could be a second one (C8)."""
        conclusion = self._conclusion
        if conclusion is None:
            return
        if not self._head_sent:
            self._head_sent = True
            await self._owner.answer(conclusion)
        elif not self._deserted and not self._over.done():
            self._over.set_exception(_cut(conclusion, self._hold))


def _cut(conclusion: Conclusion, hold: Hold) -> IdempotencyError:
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
