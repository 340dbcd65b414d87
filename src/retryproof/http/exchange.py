"""One covered request: admitted or refused, then run, replayed, or told why not (H7)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from retryproof.core.codec import StoredResponse, decode_response
from retryproof.core.commands import Finished, Pause, Paused, Run
from retryproof.core.errors import ConfigurationError, InvalidKey, StoreUnavailable, Unreadable
from retryproof.core.fingerprint import Hasher, comparable
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
from retryproof.core.keys import record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.drive import abegin, clock
from retryproof.engine import AsyncIdempotency, Refingerprint
from retryproof.http import problem as problems
from retryproof.http.body import OverBudget
from retryproof.http.client_link import DISCONNECT, ClientLink
from retryproof.http.execution import Execution
from retryproof.http.key_source import CallableKey, HeaderKey, JsonFieldKey
from retryproof.http.options import Options
from retryproof.http.problem import Kind, Problem, render
from retryproof.http.scope import Identity
from retryproof.http.semantics import Header, adapted, replayed_headers, retry_after
from retryproof.http.types import App, Message, Receive, Scope, Send
from retryproof.observe.events import Event
from retryproof.observe.events import Kind as EventKind
from retryproof.stores.opened import AsyncOpened, AsyncView

OMITTED: Header = (b"idempotency-replay", b"omitted")
UNPROTECTED: Header = (b"idempotency-unprotected", b"store-unavailable")
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

    async def begin(
        self, claimed: Admitted, opened: AsyncOpened | AsyncView, link: ClientLink
    ) -> tuple[Flow, Run | Conclusion]:
        """Claim an operation; its flow, with its conclusion or what is to be run."""
        policy = claimed.policy
        flow: Flow = self.flow(
            opened, claimed.id, claimed.fingerprint, policy, claimed.tenant, claimed.trace, claimed.refingerprint
        )

        async def pause(command: Pause) -> Paused:
            return await self.pause(command, policy, link.stays)

        return flow, await abegin(flow, opened, policy.store_timeout, pause)

    def concluded(self, admitted: Admitted, conclusion: Conclusion) -> None:
        """Tell the listeners."""
        self.conclude(conclusion, admitted.id, admitted.where, admitted.began)


@dataclass(slots=True)  # not frozen: that costs more than the rest of it
class Admitted:
    """A request that may claim its operation."""

    id: bytes
    fingerprint: bytes
    policy: Policy
    tenant: bytes
    trace: str
    where: str
    began: float
    refingerprint: Refingerprint


@dataclass(frozen=True, slots=True)
class NotCovered:
    """A request whose body had to be read to find that it has no key."""


@dataclass(frozen=True, slots=True)
class Gone:
    """The client left before its body was complete."""


NOT_COVERED = NotCovered()
GONE = Gone()


class Exchange:
    """One request and its answer. `respond` is called once."""

    def __init__(self, engine: HttpEngine, scope: Scope, receive: Receive, send: Send, policy: Policy) -> None:
        self._engine = engine
        self._options = engine.options
        self._scope = scope
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._raw_path = _raw_path(scope)
        self._receive = receive
        self._server_send = send
        self._link = ClientLink(receive, send)
        self._policy = policy
        self._running = False

    async def respond(self, key_lines: Sequence[bytes]) -> None:
        """Run the operation, replay it, or say why not."""
        try:
            match await self._admit(key_lines):
                case Admitted() as admitted:
                    await self._attempt(admitted)
                case Problem() as problem:
                    await self._refuse(problem)
                case NotCovered():
                    await self._engine.app(self._scope, self._link.receive, self._server_send)
                case Gone():
                    return  # nothing was claimed, nothing runs, and nobody is there to be told
        finally:
            if not self._running:
                self._link.close()

    # Admission: key, identity, body

    async def _admit(self, key_lines: Sequence[bytes]) -> Admitted | Problem | NotCovered | Gone:
        began = clock()
        options = self._options
        identity = self._identity()
        try:
            key = self._early_key(key_lines, identity)
        except InvalidKey as error:
            return self._invalid_key(error, identity)
        if key is None and not isinstance(options.key, JsonFieldKey):
            return self._no_key()
        hasher = options.fingerprint.begin(*self._request())
        unread = await self._read_body(hasher)
        if unread is not None:
            return unread
        if isinstance(options.key, JsonFieldKey):
            try:
                key = options.key.find(self._link.body.read(), self._strength(identity))
            except InvalidKey as error:
                return self._invalid_key(error, identity)
        if key is None:
            return self._no_key()
        return self._admitted(key, identity, hasher.digest(), began)

    def _admitted(self, key: str, identity: Identity, fingerprint: bytes, began: float) -> Admitted:
        options, scope = self._options, self._scope
        endpoint = options.endpoint.of(scope)
        who: tuple[str | bytes, ...] = ("anonymous", "") if identity is None else ("caller", identity)
        what: tuple[str | bytes, ...] = (endpoint,) if endpoint is not None else (scope["method"], self._raw_path)
        return Admitted(
            id=record_id((options.name, *who, *what), key, pepper=options.pepper),
            fingerprint=fingerprint,
            policy=self._policy,
            tenant=b"" if identity is None else tenant_digest(identity, pepper=options.pepper),
            trace=self._headers.get(b"traceparent", b"").decode("latin-1")[:128],
            where=endpoint or "",
            began=began,
            refingerprint=self._refingerprint,
        )

    def _identity(self) -> Identity:
        identity: object = self._options.scope(self._scope)
        if identity is None or identity in ("", b""):
            return None
        if isinstance(identity, str | bytes):
            return identity
        if inspect.iscoroutine(identity):
            identity.close()
        raise ConfigurationError(
            f"The scope callable returned {type(identity).__name__}; return a string or bytes that tell callers apart, "
            "or None for an anonymous caller, and no coroutine."
        )

    def _strength(self, identity: Identity) -> Any:
        return "strong" if identity is None else self._options.strength

    def _early_key(self, lines: Sequence[bytes], identity: Identity) -> str | None:
        match self._options.key:
            case HeaderKey() as source:
                return source.find(list(lines), self._strength(identity)) if lines else None
            case CallableKey() as source:
                return source.find(self._scope, self._strength(identity))
            case JsonFieldKey():
                return None

    def _no_key(self) -> Problem | NotCovered:
        if not self._options.required.of(self._scope):
            return NOT_COVERED
        where = self._options.key.place
        return Problem(
            problems.KEY_MISSING,
            f"Put a new random key, such as a UUIDv4, in {where}, and send the same key when you retry.",
        )

    def _invalid_key(self, error: InvalidKey, identity: Identity) -> Problem:
        self._engine.tell(Event(kind=EventKind.WEAK_KEY, note=error.message))
        anonymous = identity is None and self._options.strength == "any"
        why = " This caller is anonymous to the service, and then only keys that cannot be guessed are taken."
        return Problem(problems.KEY_INVALID, error.message + (why if anonymous else ""))

    async def _read_body(self, hasher: Hasher) -> Problem | Gone | None:
        announced = self._announced_length()
        limit = self._options.max_body
        if announced is not None and announced > limit:
            return self._too_large()
        body = self._link.body
        more = True
        while more:
            message = await self._receive()
            if message["type"] == DISCONNECT:
                return GONE
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            if chunk:
                if body.size + len(chunk) > limit:
                    return self._too_large()
                try:
                    body.append(chunk)
                except OverBudget:
                    return Problem(problems.BUSY, "Try again in a moment, with the same key.", retry_after=1)
                hasher.update(chunk)
        if announced is not None and announced != body.size:
            return Problem(
                problems.BODY_MISMATCH,
                f"Content-Length says {announced} bytes and {body.size} came. Nothing was done; send it again.",
            )
        return None

    def _announced_length(self) -> int | None:
        value = self._headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None

    def _too_large(self) -> Problem:
        return Problem(
            problems.BODY_TOO_LARGE, f"A body may have {self._options.max_body} bytes here. Nothing was done."
        )

    def _request(self) -> tuple[str, bytes, bytes, bytes]:
        scope = self._scope
        return scope["method"], self._raw_path, scope.get("query_string", b""), self._headers.get(b"content-type", b"")

    def _refingerprint(self, stored: bytes) -> bytes | None:
        """This request's fingerprint by the algorithm that made a stored one (C21)."""
        try:
            strategy = comparable(stored, self._options.fingerprint)
        except Unreadable:
            return None
        if strategy is None:
            return None
        hasher = strategy.begin(*self._request())
        for chunk in self._link.body.chunks():
            hasher.update(chunk)
        return hasher.digest()

    # The attempt

    async def _attempt(self, admitted: Admitted) -> None:
        engine = self._engine
        try:
            opened = engine.opened()
        except StoreUnavailable as error:
            await self._conclude(admitted, Down(error))
            return
        leave: Callable[[], None] | None = opened.background.leave
        try:
            flow, step = await engine.begin(admitted, opened, self._link)
            if isinstance(step, Run):
                execution = self._execution(admitted, flow, step, opened)
                leave = None  # the execution's end says so
                await execution.outlast()
            else:
                await self._conclude(admitted, step)
        finally:
            if leave is not None:
                leave()

    def _execution(self, admitted: Admitted, flow: Flow, run: Run, opened: AsyncOpened | AsyncView) -> Execution:
        engine = self._engine
        own = opened.capabilities.max_result
        most = admitted.policy.max_result

        def ended(task: asyncio.Task[None]) -> None:
            engine.running.discard(task)
            opened.background.leave()
            self._link.close()

        execution = Execution(
            engine.app,
            _app_scope(self._scope),
            self._link,
            options=self._options,
            policy=admitted.policy,
            flow=flow,
            hold=run.hold,
            store=opened,
            max_result=most if own is None else min(own, most),
            answer=lambda conclusion: self._answer(admitted, conclusion),
            told=lambda conclusion: engine.concluded(admitted, conclusion),
            ended=ended,
        )
        engine.listen(run.hold, admitted.where)
        opened.background.watch(run.hold)
        engine.running.add(execution.start())
        self._running = True
        return execution

    # Answers

    async def _conclude(self, admitted: Admitted, conclusion: Conclusion) -> None:
        if isinstance(conclusion, Down) and self._options.fail_open.of(self._scope):
            await self._run_unprotected(admitted, conclusion)
            return
        self._engine.concluded(admitted, conclusion)
        await self._answer(admitted, conclusion)

    async def _answer(self, admitted: Admitted, conclusion: Conclusion) -> None:
        if isinstance(conclusion, Replayed):
            await self._replay(admitted, conclusion.finished)
        else:
            await self._refuse(_problem_of(conclusion, admitted))

    async def _replay(self, admitted: Admitted, finished: Finished) -> None:
        digest = short_digest(admitted.id)
        if not await self._authorized():
            detail = "The request was done before, and this caller may not have its response."
            await self._refuse(Problem(problems.REPLAY_DENIED, detail, operation=digest))
            return
        try:
            response = _NOTHING_KEPT if finished.result is None else decode_response(finished.result)
        except Unreadable as error:
            self._engine.tell(Event(kind=EventKind.UNREADABLE, digest=digest, where=admitted.where, error=error))
            await self._refuse(Problem(problems.RECORD_UNREADABLE, error.message, retry_after=1, operation=digest))
            return
        headers, body = adapted(list(response.headers), response.body, self._headers.get(b"accept-encoding", b""))
        marks = [(self._options.replay_header, b"true")]
        if response.omitted:
            marks.append(OMITTED)
        await self._send(response.status, replayed_headers(response.status, headers, len(body), marks), body)

    async def _authorized(self) -> bool:
        if self._options.authorize is None:
            return True
        answer = self._options.authorize(self._scope)
        if inspect.isawaitable(answer):
            answer = await answer
        return answer is True

    async def _run_unprotected(self, admitted: Admitted, down: Down) -> None:
        """The route would rather double an effect than refuse (C10)."""
        self._engine.tell(
            Event(kind=EventKind.UNPROTECTED, digest=short_digest(admitted.id), where=admitted.where, error=down.error)
        )

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), UNPROTECTED]}
            await self._server_send(message)

        await self._engine.app(self._scope, self._link.receive, send)

    async def _refuse(self, problem: Problem) -> None:
        await self._send(*render(problem, self._options.docs_url))

    async def _send(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        await self._link.send({"type": "http.response.start", "status": status, "headers": headers})
        await self._link.send({"type": "http.response.body", "body": body})


def _problem_of(conclusion: Conclusion, admitted: Admitted) -> Problem:
    kind, detail, seconds = _explained(conclusion, admitted.policy)
    return Problem(kind, detail, seconds, short_digest(admitted.id))


def _explained(conclusion: Conclusion, policy: Policy) -> tuple[Kind, str, int | None]:
    match conclusion:
        case Busy(left):
            seconds = retry_after(left, policy.lease)
            return problems.IN_PROGRESS, "Ask again with the same key to get its response.", seconds
        case Mismatched():
            return problems.KEY_REUSED, "Use a new key for a new request; a retry repeats the request as it was.", None
        case Refused(reason, number):
            why = "too many attempts died" if reason == "poisoned" else "an attempt died"
            detail = f"It is held back because {why} (attempt {number}). Retrying does not help; ask the operator."
            return problems.OUTCOME_UNKNOWN, detail, None
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
        return quote(scope["path"]).encode("ascii")
    return bytes(raw).partition(b"?")[0]


def _app_scope(scope: Scope) -> Scope:
    """The scope for the app: the same object, since what lies outside reads from it what routing put there.

    Ways to send a file past the layer are not offered. The app is told that sending to a client that has left is an
    error (ASGI HTTP 2.4), which the link sees to: so a framework has no reason to stop a response by itself.
    """
    extensions = scope.get("extensions")
    if extensions and any(name in extensions for name in _HIDDEN_EXTENSIONS):
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in _HIDDEN_EXTENSIONS}
    asgi = scope.get("asgi", {})
    if asgi.get("spec_version", "2.0") in ("2.0", "2.1", "2.2", "2.3"):
        scope["asgi"] = {**asgi, "spec_version": "2.4"}
    return scope
