"""One covered request: admitted or refused, then run, replayed, or told why not (H7)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from retryproof.attempt import LoopAttempt
from retryproof.conclusions import WHY_UNKNOWN, is_outage
from retryproof.core.codec import StoredResponse, decode_response
from retryproof.core.commands import Finished
from retryproof.core.errors import ConfigurationError, IdempotencyError, InvalidKey, Unreadable
from retryproof.core.fingerprint import Hasher, comparable
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
from retryproof.core.keys import Strength, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.drive import clock
from retryproof.engine import AsyncIdempotency
from retryproof.http import problem as problems
from retryproof.http.body import BUDGET, SHARE, Body, OverBudget, deadline
from retryproof.http.client_link import DISCONNECT, ClientLink
from retryproof.http.departed import Departed
from retryproof.http.execution import Execution
from retryproof.http.key_source import CallableKey, HeaderKey, JsonFieldKey
from retryproof.http.options import Authorize, Choice, Departure, HeadDeparture, Options
from retryproof.http.problem import Kind, Problem, render
from retryproof.http.scope import Anonymous, Identity, single_tenant
from retryproof.http.semantics import (
    Header,
    Headers,
    headers_of_undone,
    headers_without_body,
    replayed_headers,
    retry_after,
    traceparent,
    unaccepted_codings,
    undone,
)
from retryproof.http.types import App, Message, Receive, Scope, Send
from retryproof.observe.events import Event
from retryproof.observe.events import Kind as EventKind
from retryproof.stores.opened import AsyncOpened, AsyncView

COVERED = "retryproof.covered"
"""In the scope of a request that a layer covers, so that a second layer further in lets it pass."""
OMITTED: Header = (b"idempotency-replay", b"omitted")
UNPROTECTED: Header = (b"idempotency-unprotected", b"store-unavailable")
OFF_LOOP_FROM = 64 * 1024
"""Bytes of a body from which its fingerprint is finished in a thread: parsing takes a millisecond then."""
UNDO_OFF_LOOP_FROM = 2 * 1024
"""Bytes of a compressed body from which its coding is undone in a thread: they may hold a thousand times as many."""
_NOTHING_KEPT = StoredResponse(200, (), b"", omitted=True)
_HIDDEN_EXTENSIONS = ("http.response.pathsend", "http.response.zerocopysend")
"""Ways to send a file past everybody; without them an app sends its bytes, which can be kept."""


class HttpEngine(AsyncIdempotency):
    """The engine of one layer, and the operations that it has running."""

    def __init__(self, app: App, options: Options, **engine_options: Any) -> None:
        super().__init__(**engine_options, pepper=options.pepper)
        self.app = app
        self.options = options
        self.running: set[asyncio.Task[None]] = set()
        self.departed = Departed(options.max_departed)


@dataclass(frozen=True, slots=True)
class NotCovered:
    """A request without a key; `read` says that its body had to be read to find that."""

    read: bool


@dataclass(frozen=True, slots=True)
class Gone:
    """The client left before its body was complete."""


GONE = Gone()


class Exchange:
    """One request and its answer. `respond` is called once."""

    __slots__ = (
        "_began",
        "_engine",
        "_fails_open",
        "_fingerprint",
        "_headers",
        "_id",
        "_on_departure",
        "_raw_path",
        "_receive",
        "_running",
        "_scope",
        "_server_send",
        "_tenant",
        "_where",
        "link",
        "options",
        "policy",
    )

    def __init__(self, engine: HttpEngine, scope: Scope, receive: Receive, send: Send, policy: Policy) -> None:
        self._engine = engine
        self.options = engine.options
        self._scope = scope
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._raw_path = _raw_path(scope)
        self._receive = receive
        self._server_send = send
        self.link = ClientLink(receive, send)
        self.policy = policy
        self._running = False
        self._began = clock()
        # Known once the request is admitted.
        self._id: bytes
        self._fingerprint: bytes
        self._tenant: bytes
        self._where: str
        self._fails_open: bool
        self._on_departure: Departure | HeadDeparture

    def departed(self) -> Departed:
        """The runs of this layer that go on without their clients."""
        return self._engine.departed

    @property
    def app(self) -> App:
        """The app behind the layer."""
        return self._engine.app

    async def respond(self, key_lines: Sequence[bytes]) -> None:
        """Run the operation, replay it, or say why not."""
        try:
            refused = await self._admit(key_lines)
            if refused is None:
                self._scope[COVERED] = True
                execution = await self._attempt()
                if execution is not None:
                    await execution.outlast()
            else:
                await self._turn_away(refused)
        finally:
            if not self._running:
                self.link.close()

    async def _turn_away(self, refused: Problem | NotCovered | Gone) -> None:
        match refused:
            case Problem():
                await self._refuse(refused)
            case NotCovered(read):
                receive = self.link.receive if read else self._receive
                await self._engine.app(self._scope, receive, self._server_send)
            case Gone():
                return  # nothing was claimed, nothing runs, and nobody is there to be told

    # Admission: key, identity, body

    async def _admit(self, key_lines: Sequence[bytes]) -> Problem | NotCovered | Gone | None:
        """Why the request may not claim its operation; None: it may."""
        options = self.options
        identity = self._identity()
        try:
            key = self._early_key(key_lines, self._strength(identity))
        except InvalidKey as error:
            return self._invalid_key(error, identity, partial(self._early_key, key_lines, "any"))
        if key is None and not isinstance(options.key, JsonFieldKey):
            return self._no_key()
        hasher = options.fingerprint.begin(*self._request())
        unread = await self._read_body(hasher, identity)
        if unread is not None:
            return unread
        if isinstance(options.key, JsonFieldKey):
            find, body = options.key.find, self.link.whole_body()
            try:
                key = find(body, self._strength(identity))
            except InvalidKey as error:
                return self._invalid_key(error, identity, partial(find, body, "any"))
        if key is None:
            return self._no_key()
        self._name(key, identity)
        large = self.link.body_size() >= OFF_LOOP_FROM
        self._fingerprint = await asyncio.to_thread(hasher.digest) if large else hasher.digest()
        return None

    def _name(self, key: str, identity: Identity) -> None:
        """Find out which operation it is; whatever a callable of the user's raises, it does so before the claim."""
        options, scope = self.options, self._scope
        endpoint = options.endpoint.of(scope)
        anonymous = identity is None or isinstance(identity, Anonymous)
        who: tuple[str | bytes, ...] = ("anonymous" if anonymous else "caller", identity or "")
        what: tuple[str | bytes, ...] = (endpoint,) if endpoint is not None else (scope["method"], self._raw_path)
        self._id = record_id((options.name, *who, *what), key, pepper=options.pepper)
        self._tenant = b"" if identity is None or anonymous else tenant_digest(identity, pepper=options.pepper)
        self._where = endpoint or ""
        self._fails_open = options.fail_open.of(scope)
        departure = options.on_departure
        self._on_departure = cast("Departure", departure.of(scope)) if isinstance(departure, Choice) else departure

    def _identity(self) -> Identity:
        identity: object = self.options.scope(self._scope)
        if identity is None or identity in ("", b""):
            return None  # also an anonymous caller who names no host
        if isinstance(identity, str | bytes):
            return identity
        if inspect.iscoroutine(identity):
            identity.close()
        raise ConfigurationError(
            f"The scope callable returned {type(identity).__name__}; return a string or bytes that tell callers apart, "
            "or None for an anonymous caller, and no coroutine."
        )

    def _strength(self, identity: Identity) -> Strength:
        return "strong" if identity is None or isinstance(identity, Anonymous) else self.options.strength

    def _early_key(self, lines: Sequence[bytes], strength: Strength) -> str | None:
        """The key, if it is found without the body."""
        source = self.options.key
        if isinstance(source, HeaderKey):
            return source.find(lines, strength) if lines else None
        return source.find(self._scope, strength) if isinstance(source, CallableKey) else None

    def _no_key(self) -> Problem | NotCovered:
        if not self.options.required.of(self._scope):
            return NotCovered(isinstance(self.options.key, JsonFieldKey))
        where = self.options.key.place
        return Problem(
            problems.KEY_MISSING,
            f"Put a new random key, such as a UUIDv4, in {where}, and send the same key when you retry.",
        )

    def _invalid_key(self, error: InvalidKey, identity: Identity, find_any: Callable[[], str | None]) -> Problem:
        """The refusal of a key; one that would do where any key does is an event: clients must learn to make others."""
        if self._strength(identity) == "strong" and _finds(find_any):
            self._engine.tell(Event(kind=EventKind.WEAK_KEY, note=error.message))
        anonymous = (identity is None or isinstance(identity, Anonymous)) and self.options.strength == "any"
        why = " This caller is anonymous to the service, and then only keys that cannot be guessed are taken."
        return Problem(problems.KEY_INVALID, error.message + (why if anonymous else ""))

    async def _read_body(self, hasher: Hasher, identity: Identity) -> Problem | Gone | None:
        announced = self._announced_length()
        limit = self.options.max_body
        if announced is not None and announced > limit:
            return self._too_large()
        message = await self._receive()
        if message["type"] == DISCONNECT:
            return GONE
        chunk = message.get("body", b"")
        if message.get("more_body", False):
            size = await self._read_chunks(message, hasher, identity)
            if not isinstance(size, int):
                return size
        else:
            size = len(chunk)
            if size > limit:
                return self._too_large()
            hasher.update(chunk)
            self.link.body = bytes(chunk)
        if announced is not None and announced != size:
            return Problem(
                problems.BODY_MISMATCH,
                f"Content-Length says {announced} bytes and {size} came. Nothing was done; send it again.",
            )
        return None

    async def _read_chunks(self, message: Message, hasher: Hasher, identity: Identity) -> int | Problem | Gone:
        """Take a body that comes in several messages, of which this is the first; its size."""
        options, now = self.options, asyncio.get_running_loop().time
        owner = None if options.scope is single_tenant else identity or ""
        body = self.link.body = Body(BUDGET, owner, max(SHARE, options.max_body))
        began = now()
        while True:
            chunk = message.get("body", b"")
            if body.size + len(chunk) > options.max_body:
                return self._too_large()
            try:
                body.append(chunk)
            except OverBudget:
                return Problem(problems.BUSY, "Try again in a moment, with the same key.", retry_after=1)
            hasher.update(chunk)
            if not message.get("more_body", False):
                return body.size
            try:
                async with asyncio.timeout_at(deadline(began, now(), body.size, options.body_timeout)):
                    message = await self._receive()
            except TimeoutError:
                return Problem(
                    problems.BODY_TIMEOUT,
                    f"The body stalled after {body.size} bytes. Nothing was done; send it again with the same key.",
                )
            if message["type"] == DISCONNECT:
                return GONE

    def _announced_length(self) -> int | None:
        value = self._headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None

    def _too_large(self) -> Problem:
        return Problem(
            problems.BODY_TOO_LARGE, f"A body may have {self.options.max_body} bytes here. Nothing was done."
        )

    def _request(self) -> tuple[str, bytes, bytes, bytes]:
        scope = self._scope
        return scope["method"], self._raw_path, scope.get("query_string", b""), self._headers.get(b"content-type", b"")

    def _refingerprint(self, stored: bytes) -> bytes | None:
        """This request's fingerprint by the algorithm that made a stored one (C21)."""
        try:
            strategy = comparable(stored, self.options.fingerprint)
        except Unreadable:
            return None
        if strategy is None:
            return None
        hasher = strategy.begin(*self._request())
        for chunk in self.link.body_chunks():
            hasher.update(chunk)
        return hasher.digest()

    # The attempt

    async def _attempt(self) -> Execution | None:
        """Claim, and start the app; None when there was something else to answer."""
        engine = self._engine
        try:
            opened = engine.opened()
        except IdempotencyError as error:  # out of reach, or not set up; the event has it
            down = Down(error)
            engine.attempts.conclude(down, self._id, self._where, self._began, fails_open=self._fails_open)
            await self._end_without(down)
            return None
        trace = traceparent(self._headers.get(b"traceparent", b""))
        attempt = await engine.attempts.abegin(
            opened,
            self.policy,
            self._id,
            self._fingerprint,
            self._where,
            self._tenant,
            trace,
            self._refingerprint,
            fails_open=self._fails_open,
            stays=self.link.stays,
        )
        if isinstance(attempt, LoopAttempt):
            return self._execution(attempt, opened)
        await self._end_without(attempt)
        return None

    async def _end_without(self, conclusion: Conclusion) -> None:
        """Answer for an attempt that did not come to run."""
        if self._fails_open and isinstance(conclusion, Down) and is_outage(conclusion):
            await self._run_unprotected()
        else:
            await self._answer(conclusion)

    def _execution(self, attempt: LoopAttempt, opened: AsyncOpened | AsyncView) -> Execution:
        engine, policy = self._engine, self.policy
        own = opened.capabilities.max_result
        execution = Execution(
            self,
            _app_scope(self._scope, stops=self._on_departure == "stop"),
            attempt=attempt,
            max_result=policy.max_result if own is None else min(own, policy.max_result),
            fails_open=self._fails_open,
            on_departure=self._on_departure,
        )
        self._running = True
        engine.running.add(execution.start())
        return execution

    # What an execution asks of its exchange

    async def answer(self, conclusion: Conclusion) -> None:
        """Answer for another attempt."""
        await self._answer(conclusion)

    def ended(self, task: asyncio.Task[None]) -> None:
        """The app has returned or raised."""
        self._engine.running.discard(task)
        self.link.close()

    # Answers

    async def _answer(self, conclusion: Conclusion) -> None:
        if isinstance(conclusion, Replayed):
            await self._replay(conclusion.finished)
        else:
            kind, detail, seconds = _explained(conclusion, self.policy)
            await self._refuse(Problem(kind, detail, seconds, short_digest(self._id)))

    async def _replay(self, finished: Finished) -> None:
        if self.options.authorize is not None and not await self._authorized(self.options.authorize):
            detail = "The request was done before, and this caller may not have its response."
            await self._refuse(Problem(problems.REPLAY_DENIED, detail, operation=short_digest(self._id)))
            return
        try:
            response = _NOTHING_KEPT if finished.result is None else decode_response(finished.result)
        except Unreadable as error:
            digest = short_digest(self._id)
            self._engine.tell(Event(kind=EventKind.UNREADABLE, digest=digest, where=self._where, error=error))
            await self._refuse(Problem(problems.RECORD_UNREADABLE, error.message, retry_after=1, operation=digest))
            return
        headers, body, omitted = await self._readable(response)
        marks = [(self.options.replay_header, b"true")]
        if omitted:
            marks.append(OMITTED)
        await self._send(response.status, replayed_headers(response.status, headers, len(body), marks), body)

    async def _readable(self, response: StoredResponse) -> tuple[Headers, bytes, bool]:
        """Headers and body that this caller can read, and whether the body is left out (H14)."""
        headers, body = list(response.headers), response.body
        codings = unaccepted_codings(headers, self._headers.get(b"accept-encoding", b"")) if body else []
        if not codings:
            return headers, body, response.omitted
        large = len(body) >= UNDO_OFF_LOOP_FROM
        plain = await asyncio.to_thread(undone, codings, body) if large else undone(codings, body)
        if plain is None:
            return headers_without_body(headers), b"", True
        return headers_of_undone(headers), plain, False

    async def _authorized(self, authorize: Authorize) -> bool:
        answer = authorize(self._scope)
        if inspect.isawaitable(answer):
            answer = await answer
        return answer is True

    async def _run_unprotected(self) -> None:
        """The route would rather double an effect than refuse (C10)."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), UNPROTECTED]}
            await self._server_send(message)

        await self._engine.app(self._scope, self.link.receive, send)

    async def _refuse(self, problem: Problem) -> None:
        await self._send(*render(problem, self.options.docs_url))

    async def _send(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        send = self.link.send if self._running else self._server_send
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _finds(find: Callable[[], str | None]) -> bool:
    try:
        return find() is not None
    except InvalidKey:
        return False


def _explained(conclusion: Conclusion, policy: Policy) -> tuple[Kind, str, int | None]:
    match conclusion:
        case Busy(left):
            seconds = retry_after(left, policy.lease)
            return problems.IN_PROGRESS, "Ask again with the same key to get its response.", seconds
        case Mismatched():
            return problems.KEY_REUSED, "Use a new key for a new request; a retry repeats the request as it was.", None
        case Refused(reason, number):
            why = WHY_UNKNOWN[reason]
            detail = f"It is held back because {why} (attempt {number}). Retrying does not help; ask the operator."
            return problems.OUTCOME_UNKNOWN, detail, None
        case Down(ConfigurationError()):
            detail = "The idempotency store of this service is not set up; its log says what to do. Nothing was done."
            return problems.STORE_UNAVAILABLE, detail, 1
        case Down(Unreadable() as error):
            return problems.RECORD_UNREADABLE, error.message, 1
        case Down(_, overtaken):
            done = "What was done is not known yet" if overtaken else "Nothing was done"
            return problems.STORE_UNAVAILABLE, f"{done}. Try again with the same key.", 1
        case Foreign():
            detail = "It was stored by another version of this service. Nothing was done; try again with the same key."
            return problems.RECORD_UNREADABLE, detail, 1
        case Completed() | Failed() | Replayed():
            raise TypeError(f"{conclusion!r} is no refusal")


def _raw_path(scope: Scope) -> bytes:
    raw = scope.get("raw_path")
    if raw is None:
        path, root = scope["path"], scope.get("root_path", "")
        whole = path if path.startswith(root) else root + path  # mounts of old cut the root off
        return quote(whole, errors="surrogatepass").encode("ascii")
    return bytes(raw).partition(b"?")[0]


def _app_scope(scope: Scope, *, stops: bool) -> Scope:
    """The scope for the app: the same object, since what lies outside reads from it what routing put there.

    Ways to send a file past the layer are not offered. The app is told that sending to a client that has left is an
    error (ASGI HTTP 2.4), which the link sees to: so a framework has no reason to stop a response by itself. Where it
    is to stop (`stops`), it is told what the server said.
    """
    extensions = scope.get("extensions")
    if extensions and any(name in extensions for name in _HIDDEN_EXTENSIONS):
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in _HIDDEN_EXTENSIONS}
    asgi = scope.get("asgi", {})
    if not stops and asgi.get("spec_version", "2.0") in ("2.0", "2.1", "2.2", "2.3"):
        scope["asgi"] = {**asgi, "spec_version": "2.4"}
    return scope
