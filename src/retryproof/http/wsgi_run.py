"""One run of a WSGI app under a claim: the iterable that its server is given (H10, H11).

The app runs in the server's thread, and its iterable with the operation as the current one at each step. A response
that is whole at once (a list, or as many bytes as were announced) is held until it is stored; of any other the parts
flow as they come, and the end is held. What an end means stands in `settlement`, and the bookkeeping of the claim in
`attempt`; this file performs them:

    RUNNING --the iterable has ended, or the app has raised--> SETTLING --> SETTLED

A server that closes the iterable early has lost its client: the rest is produced for nobody, or stopped, by choice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Any, TypeAlias
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from retryproof import operation
from retryproof.attempt import BlockingAttempt
from retryproof.core.commands import Raised
from retryproof.core.errors import IdempotencyError, Unreadable
from retryproof.core.flow import Conclusion, Replayed
from retryproof.drive import clock
from retryproof.engine import Idempotency
from retryproof.http import ending as endings
from retryproof.http.admission import Admission
from retryproof.http.answers import Answer, Undoing, denied, problem_of, refusal, replay, undone_answer, unreadable
from retryproof.http.departed import ClientLeft, Departed
from retryproof.http.options import Options
from retryproof.http.problem import Problem
from retryproof.http.recorder import WRONG
from retryproof.http.semantics import undone
from retryproof.http.settlement import FAIL_OPEN, Settlement, limit_of
from retryproof.observe.events import Event, Kind

logger = logging.getLogger("retryproof.http")

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

RUNNING, SETTLING, SETTLED = "running", "settling", "settled"
_TOO_LONG = "it ran past max_run, and its client has left"
_LEFT = "its client has left"
_END: Any = object()


class WsgiEngine(Idempotency):
    """The engine of one layer, and the runs that go on without their clients."""

    def __init__(self, app: WSGIApplication, options: Options, **engine_options: Any) -> None:
        super().__init__(**engine_options, pepper=options.pepper)
        self.app = app
        self.options = options
        self.departed = Departed(options.max_departed)


class WsgiRun:
    """The app's run for one request: an iterator over what is sent, whose `close` ends it."""

    __slots__ = (
        "_admission",
        "_attempt",
        "_ended",
        "_engine",
        "_error",
        "_gone",
        "_head",
        "_held",
        "_iterable",
        "_iterator",
        "_left_by",
        "_on_departure",
        "_out",
        "_server_start",
        "_server_write",
        "_settlement",
        "_state",
        "_stop",
        "_whole",
    )

    def __init__(
        self, engine: WsgiEngine, admission: Admission, attempt: BlockingAttempt, start_response: StartResponse
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._attempt = attempt
        limit = limit_of(attempt.policy, engine.opened().capabilities.max_result)
        self._settlement = Settlement(attempt, engine.options, limit)
        self._server_start = start_response
        self._server_write: Callable[[bytes], object] | None = None
        self._on_departure = admission.on_departure
        self._state = RUNNING
        self._head: tuple[str, list[tuple[str, str]]] | None = None
        self._held: list[bytes] = []  # until it is settled
        self._out: deque[bytes] = deque()  # for the server, in order
        self._error: BaseException | None = None  # raised once that has gone
        self._iterable: Iterable[bytes] = ()
        self._iterator: Iterator[bytes] = iter(())
        self._whole = False  # the app has returned all of it at once
        self._gone = False  # the client
        self._left_by: Exception | None = None  # what the server raised then
        self._stop = ""  # why it is to be stopped
        self._ended = False
        if admission.fails_open:
            attempt.operation.refuses_transactions = FAIL_OPEN

    # The server's calls

    def begin(self, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app; what the server is given. Raises what the app raised, where nothing is to be sent."""
        attempt = self._attempt
        try:
            # Asked in the same step that calls the app (C6).
            conclusion = None if attempt.hold.may_begin(clock()) else attempt.renew()
            if conclusion is None:
                self._call(environ)
                if self._gone and self._state is RUNNING:
                    self._go_on_alone()
            else:
                self._state = SETTLING
                self._settlement.end(endings.TOO_LATE)
                self._conclude(conclusion)
            self._raise_where_left()
            if self._error is not None and not self._out:
                raise self._error
        except BaseException:
            self._end()
            raise
        if self._state is SETTLED and self._error is None and not hasattr(self._iterable, "close"):
            self._end()
            return list(self._out)
        return self

    def _call(self, environ: WSGIEnvironment) -> None:
        """Call the app, and take what it returns as far as that is there already."""
        try:
            returned: Any = self._attempt.within(partial(self._engine.app, environ, self._start_response))
            if hasattr(returned, "__iter__") or hasattr(returned, "__getitem__"):
                self._iterable = returned
                self._iterator = self._attempt.within(partial(iter, returned))
            else:
                self._returned_nothing(returned)
        except BaseException as error:  # noqa: BLE001  # raised again, as the table says
            self._raised(error)
            return
        self._whole = isinstance(self._iterable, list | tuple)
        while self._whole and self._state is RUNNING:
            self._step()

    def _returned_nothing(self, returned: object) -> None:
        """The app has done its work and forgot its response: nobody knows what it would have said (H11)."""
        self._settle(self._settlement.answered(), None)
        if self._error is None and not self._out:
            self._error = TypeError(f"The app returned {type(returned).__name__}, which is no iterable of bytes.")

    def __del__(self) -> None:
        """Nobody closes it, and nobody will: some layers do not pass `close` on."""
        if not self._ended:
            self._iterable = ()  # which is collected as well
            self._end()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._out:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._state is not RUNNING:
                raise StopIteration
            self._step()
            if self._gone and self._state is RUNNING:
                self._go_on_alone()
            self._raise_where_left()
            if not self._out and self._state is RUNNING and self._settlement.streamed:
                return b""  # a layer may not wait for several parts before it gives one
        return self._out.popleft()

    def close(self) -> None:
        """The server is done. Where the response is not, its client has left: the app goes on, or is stopped (H11)."""
        self._out.clear()
        if self._ended:
            return
        try:
            if self._state is RUNNING:
                self._gone = True
                self._go_on_alone()
                self._out.clear()
        finally:
            self._end()
        if self._gone and self._error is not None:
            raise self._error

    def _leave(self, error: Exception) -> None:
        """The server could not send: that is no failure of the app's, which goes on or is stopped (H11)."""
        self._gone, self._left_by = True, error
        self._out.clear()
        if self._on_departure == "stop":
            self._stop = _LEFT
        else:
            self._engine.departed.add(self)

    def _raise_where_left(self) -> None:
        """What the server raised goes back to it, once the operation is settled."""
        if self._left_by is not None and self._state is not RUNNING:
            raise self._left_by

    def stop(self, why: str) -> None:
        """Stop it at its next part: nobody waits for it. Called from any thread."""
        self._stop = why

    def _go_on_alone(self) -> None:
        self._engine.departed.add(self)
        if self._on_departure == "stop":
            self._stop = _LEFT
        while self._state is RUNNING:
            self._check_alone()
            if self._stop:
                self._stopped()
            else:
                self._step()
                self._out.clear()

    def _check_alone(self) -> None:
        if not self._stop and clock() >= self._attempt.hold.stops:
            self._stop = _TOO_LONG

    def _stopped(self) -> None:
        """End it in the middle: its outcome is unknown."""
        error: BaseException = ClientLeft("The client has left.")
        try:
            self._close_app()
        except BaseException as raised:  # noqa: BLE001  # as above
            error = self._error = raised
        digest = self._admission.operation
        logger.warning("The handler of operation %s was stopped: %s. Its outcome is unknown.", digest, self._stop)
        self._settle(self._settlement.happened(error, endings.STOPPED), error)

    def _close_app(self) -> None:
        """Close what the app returned, once, with its operation as the current one."""
        close, self._iterable = getattr(self._iterable, "close", None), ()
        if close is not None:
            self._attempt.within(close)

    def _end(self) -> None:
        """Nothing goes on any more; called once."""
        self._ended = True
        try:
            self._close_app()
        finally:
            self._engine.departed.discard(self)
            self._attempt.leave()
            self._admission.close()

    # The app's response

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        settlement = self._settlement
        answered = None if exc_info is None else exc_info[1]
        try:
            if settlement.headed:
                if answered is None:
                    raise AssertionError("start_response was called a second time, without exc_info.")
                if settlement.streamed or self._state is not RUNNING:
                    raise answered
                settlement.begin_again()
                self._held.clear()
            settlement.take_head(
                int(status[:3]), ((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)
            )
            if answered is not None:
                settlement.hear(answered)
        finally:
            exc_info = answered = None  # a cycle, by its traceback
        self._head = (status, list(headers))
        decides = self._admission.on_departure
        if callable(decides):
            self._on_departure = settlement.departure(decides)
        return self._write

    def _write(self, data: bytes) -> None:
        """The older way to send: what may go goes at once."""
        self._take(data)
        while self._out and self._server_write is not None:
            part = self._out.popleft()
            try:
                self._server_write(part)
            except Exception as error:  # noqa: BLE001  # servers have exceptions of their own for a client that left
                self._leave(error)
        if self._gone:
            self._check_alone()
            if self._stop:
                raise ClientLeft("The client has left.")

    def _step(self) -> None:
        """Take the next part, or the end."""
        try:
            part = self._attempt.within(partial(next, self._iterator, _END))
            if part is not _END:
                self._take(part)
                return
        except BaseException as error:  # noqa: BLE001  # raised again, as the table says
            self._raised(error)
            return
        if self._settlement.headed:
            self._settlement.part(b"", more=False)
        self._settle(self._settlement.answered(), None)

    def _take(self, part: bytes) -> None:
        """Take a part: hold it, or let it go."""
        settlement = self._settlement
        if not part:
            return
        if not settlement.headed:
            raise AssertionError("The app has sent a part of a response before it called start_response.")
        settlement.part(part, more=True)
        if settlement.reach is WRONG:  # what is too long is never whole: it is cut when the app ends
            return
        if self._whole or settlement.came == settlement.announced:
            self._held.append(bytes(part))
            return
        if settlement.stream():
            try:
                self._send_head()
            except Exception as error:  # noqa: BLE001  # the server refuses the head, or its client has left
                self._leave(error)
        if not self._gone:
            self._out.append(part)

    def _send_head(self) -> None:
        if self._head is not None and not self._gone:
            self._server_write = self._server_start(*self._head)

    # The end

    def _raised(self, error: BaseException) -> None:
        """The app, or what it returned, has raised."""
        told_to_stop = self._gone and bool(self._stop)
        self._settle(self._settlement.happened(error, told_to_stop=told_to_stop), error)
        if self._settlement.raises:
            self._error = error

    def _settle(self, happened: str, error: BaseException | None) -> None:
        """Give the record what the table says, and send what it says."""
        attempt, settlement = self._attempt, self._settlement
        self._state = SETTLING
        outcome = settlement.end(happened, error)
        if attempt.operation.joined:
            # Commit the handler's transaction with its response, or roll it back and call that no success (T1).
            rolls_back = settlement.rolls_back
            settled, failed = operation.settle(attempt.operation, Raised() if rolls_back else outcome)
            if failed is not None:
                settlement.transaction_failed(settled, failed)
            elif rolls_back:
                settled = outcome
            outcome = settled
        self._conclude(attempt.finish(outcome))

    def _conclude(self, conclusion: Conclusion) -> None:
        """The operation is settled, by this run or by another: send what that means."""
        self._state = SETTLED
        sending = self._settlement.sending(conclusion, gone=self._gone)
        if sending is endings.RESPONSE:
            if not self._settlement.streamed:
                self._settlement.streamed = True
                self._send_head()
            self._out.extend(self._held)
        elif isinstance(sending, Problem):
            self._answer(refusal(sending, self._engine.options))
        elif isinstance(sending, IdempotencyError):
            self._error = sending  # the server cuts: a clean end would be a whole response
        elif sending is not None:
            self._answer(answer_to(self._engine, self._admission, conclusion))

    def _answer(self, answer: Answer) -> None:
        if not self._gone:
            self._out.extend(say(answer, self._server_start))


def answer_to(engine: WsgiEngine, admission: Admission, conclusion: Conclusion) -> Answer:
    """What a conclusion means to the caller."""
    options = engine.options
    if not isinstance(conclusion, Replayed):
        return refusal(problem_of(conclusion, admission.policy, admission.operation), options)
    if options.authorize is not None and options.authorize(admission.request.context) is not True:
        return refusal(denied(admission.operation), options)
    try:
        found = replay(conclusion.finished, admission.request, options)
    except Unreadable as error:
        engine.tell(Event(kind=Kind.UNREADABLE, digest=admission.operation, where=admission.where, error=error))
        return refusal(unreadable(error, admission.operation), options)
    if not isinstance(found, Undoing):
        return found
    return undone_answer(found, undone(found.codings, found.response.body), options)


def say(answer: Answer, start_response: StartResponse) -> list[bytes]:
    """Begin a whole response; its body."""
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:  # a status of the app's own
        phrase = "Status"
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.headers]
    start_response(f"{answer.status} {phrase}", headers)
    return [answer.body] if answer.body else []
