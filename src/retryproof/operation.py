"""What a handler sees of the operation that it runs in."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar, Token
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, TypeVar, overload
from uuid import UUID

from retryproof.core import commands
from retryproof.core.codec import OMITTED_VALUE, Codec, JsonCodec, Unencodable, decode_value, encode_and_replay
from retryproof.core.commands import DONE, Command, Done, Found, Look, Lost, Outcome, Raised, Reply, Unreachable
from retryproof.core.errors import ConfigurationError, LeaseLost, NoOperation, ResultOmitted, StoreUnavailable
from retryproof.core.failure import outcome_of
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.drive import Steps, apump, clock, pump

T = TypeVar("T")
logger = logging.getLogger("retryproof")
Settled: TypeAlias = tuple[Outcome, BaseException | None]
"""What came of the work once its transaction is over, and what its caller is raised."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PLAIN = JsonCodec()
_ANOTHER = "This operation has a transaction already; all that it does commits in one."
ENDED = (
    "The operation has ended, and so has its transaction: what is done now (in a background task, say) is no part of "
    "it. Open a transaction of your own."
)
"""Why an operation takes no transaction any more."""
_STEP_BESIDE = (
    "The operation's transaction holds its record (on SQLite always, on PostgreSQL above READ COMMITTED), so the "
    "step's result could not be kept. Nothing was called. Take the step before you ask for the transaction, or between "
    "phases."
)


class Phase(Protocol):
    """A phase of an operation, entered with `with` or `async with`.

    pending: it is still to be done. result: what is kept with the recovery point; set it inside, None otherwise.
    After the block, and where the phase is done, it is the value as every attempt sees it.
    """

    pending: bool
    result: Any

    @property
    def connection(self) -> Any:
        """The connection, in the phase's transaction; ConfigurationError where the phase is done."""

    def run(self, fn: Callable[[Any], T]) -> T:
        """Do the phase unless it is done: fn is given the connection, and what it returns is the result."""

    async def arun(self, fn: Callable[[Any], Awaitable[T]]) -> T:
        """`run` for a coroutine function."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Operation:
    """The operation that is running: its identity, and what every attempt at it has in common.

    Safe to use from the threads and tasks that a handler starts.
    """

    __slots__ = (
        "_hold",
        "_joined",
        "_names",
        "_phase",
        "_phase_holds",
        "_phased",
        "_policy",
        "_store",
        "_unknown",
        "refuses_transactions",
    )

    def __init__(self, hold: Hold, store: Any, policy: Policy) -> None:
        self._hold = hold
        self._store = store
        self._policy = policy
        self._names: set[str] | None = None
        self._joined: Any = None
        self._phase: str | None = None
        self._phase_holds = False  # the record
        self._phased: Any = None
        self._unknown = False
        self.refuses_transactions = ""

    @property
    def key_digest(self) -> str:
        """16 hex digits that stand for the operation in logs and find its record again."""
        return short_digest(self._hold.id)

    @property
    def token(self) -> int:
        """The fencing token, greater than that of earlier attempts: hand it downstream, to refuse a late writer."""
        return self._hold.token

    @property
    def attempt(self) -> int:
        """1 for the first attempt, one more for each that was taken over from a dead one."""
        return self._hold.attempt

    @property
    def first_seen(self) -> datetime:
        """When the operation was first claimed, by the store's clock, in UTC; the same on every attempt.

        Use it instead of the clock: a handler that reads the clock writes something else on each attempt.
        """
        return EPOCH + timedelta(microseconds=self._hold.first_seen)

    def derive(self, name: str) -> UUID:
        """The same random-looking UUID (version 4) on every attempt: for row ids, and for keys of calls downstream."""
        label = name.encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(b"retryproof derive 1\0" + self._hold.birth + label).digest()
        return UUID(bytes=digest[:16], version=4)

    def step(self, name: str, fn: Callable[[UUID], T], *, codec: Codec | None = None) -> T:
        """Run `fn` once: its result is kept under the name, and a later attempt gets it back without running it.

        fn is given `derive(name)`, to pass as the idempotency key of what it calls: between fn and the keeping of its
        result a crash lets a later attempt run it again. The value goes through the codec (JSON by default); one that
        it cannot write, or that is over `Policy.max_result`, is returned and not kept: a later attempt does not run fn
        either, and is raised ResultOmitted.
        Raises ConfigurationError when the name was used before in this attempt, or the operation has ended; LeaseLost
        when another attempt took over, or the lease has run out past `max_run`; StoreUnavailable when the result could
        not be kept, or the lease has run out and could not be renewed.
        """
        self._check_step()
        known, value = self._begin_step(name, codec)
        if known:
            return value  # type: ignore[no-any-return]  # what the codec gave back for a value of T
        if clock() >= self._hold.deadline:
            self._renew(name)
        data, result = self._encoded_or_omitted(name, codec or _PLAIN, fn(self.derive(name)))
        self._keep(name, data)
        return result  # type: ignore[no-any-return]  # as above

    async def astep(self, name: str, fn: Callable[[UUID], Awaitable[T]], *, codec: Codec | None = None) -> T:
        """`step` for a coroutine function."""
        self._check_astep()
        known, value = self._begin_step(name, codec)
        if known:
            return value  # type: ignore[no-any-return]  # what the codec gave back for a value of T
        if clock() >= self._hold.deadline:
            await self._arenew(name)
        data, result = self._encoded_or_omitted(name, codec or _PLAIN, await fn(self.derive(name)))
        await self._akeep(name, data)
        return result  # type: ignore[no-any-return]  # as above

    def outcome_unknown(self) -> None:
        """Say that nobody knows whether this attempt had its effect: its record stays, for `on_abandoned` (C5).

        Whatever the handler returns or raises afterwards is not kept and gives nothing back. For where raising
        `errors.OutcomeUnknown` does not arrive: a framework, a middleware or the handler itself catches it and makes a
        response of it. A function's caller is raised OutcomeUnknown unless the function raises.
        """
        self._unknown = True

    def hear(self, error: BaseException) -> None:
        """Hear what the handler raised, from a framework that makes a response of it (C5)."""
        if outcome_of(error, self._policy.unknown_on) == Raised(unknown=True):
            self.outcome_unknown()

    def said(self, outcome: Outcome) -> Outcome:
        """What came of the work, unless the handler said that nobody knows."""
        return Raised(unknown=True) if self._unknown and not isinstance(outcome, commands.LeaseLost) else outcome

    @overload
    def transaction(self, connection: AbstractContextManager[T]) -> T: ...

    @overload
    def transaction(self, connection: T) -> T: ...

    def transaction(self, connection: Any) -> Any:
        """Make the transaction of this connection the operation's: what is done in it commits with the result, or not.

        connection: of psycopg, SQLAlchemy, Django or sqlite3, to the database that the store is in, with its
            transaction open and left open; or a context manager that gives one, such as `pool.connection()`, which is
            entered now and left after the end. Returns the connection.
        After the handler returns, its result is stored in this transaction, fenced, and the transaction is committed;
        only then anybody sees the result. When the handler raises, when its result is not kept, or when another attempt
        took over, it is rolled back.
        Raises ConfigurationError for a connection without a transaction that could be used, or to another database,
        LeaseLost when another attempt took over. Nothing was written then.
        """
        if self._known(connection):
            return self._joined.connection
        with self._joining():
            joined = _module().join(self, connection, self._ask)
            if self.refuses_transactions:  # since the operation has ended meanwhile
                joined.settle(Raised(), self._ask)
                raise ConfigurationError(self.refuses_transactions, digest=self.key_digest)
            self._joined = joined
        return joined.connection

    @overload
    async def atransaction(self, connection: AbstractAsyncContextManager[T]) -> T: ...

    @overload
    async def atransaction(self, connection: T) -> T: ...

    async def atransaction(self, connection: Any) -> Any:
        """`transaction` for a connection that is awaited: of psycopg, asyncpg, SQLAlchemy or aiosqlite."""
        self._check_astep()
        if self._known(connection):
            return self._joined.connection
        with self._joining():
            joined = await _module().ajoin(self, connection, self._aask)
            if self.refuses_transactions:  # as above
                await joined.asettle(Raised(), self._aask)
                raise ConfigurationError(self.refuses_transactions, digest=self.key_digest)
            self._joined = joined
        return joined.connection

    def rollback(self) -> None:
        """Undo what was done in the operation's transaction, which is over then: the result is stored without it.

        For a result that is to be kept and work that is not, such as the answer that a card was declined. Nothing is
        done where there is no transaction, or where the operation has ended. Raises OutcomeUnknown where the handler
        had committed it.
        """
        if self._joined is not None and not self.refuses_transactions:
            joined, self._joined = self._joined, None
            _, error = joined.settle(Raised(), self._ask)
            if error is not None:
                raise error

    async def arollback(self) -> None:
        """`rollback` for what runs on an event loop, whichever kind of connection it has."""
        if self._joined is not None and not self.refuses_transactions:
            joined, self._joined = self._joined, None
            _, cancellation = await _outlive(joined, Raised(), self._aask)
            if cancellation is not None:  # or the error of work that was committed before
                raise cancellation

    @property
    def joined(self) -> bool:
        """Whether it commits in a transaction of the caller's."""
        return self._joined is not None

    def phase(self, name: str, connection: Any = None, *, codec: Codec | None = None) -> Phase:
        """Local work that commits together with its recovery point; a later attempt does not repeat it (T3).

            async with operation.phase("create_order", pool.acquire()) as phase:     # or `with`
                if phase.pending:
                    await phase.connection.execute("INSERT …")
                    phase.result = order_id

        connection: as for `transaction` and `atransaction`; without one, what `Phased(connect=…)` gives.
        The transaction is committed at the end of the block, fenced, and rolled back when the block raises. Foreign
        calls belong between phases, under `derive` or in a `step`. The name is one that no step has either.
        Raises ConfigurationError for a name used twice, a phase in a phase, a connection without a transaction that
        could be used; LeaseLost when another attempt took over; StoreUnavailable when the lease could not be renewed,
        or when the answer to the commit was lost and the record cannot be asked.
        """
        # Loaded when it is first used, as in `_module`.
        phases = importlib.import_module("retryproof.transaction.phases")
        phase: Phase = phases.PhaseBlock(self, name, connection, codec)
        return phase

    @property
    def principal(self) -> tuple[str, ...]:
        """For whom a phased function runs: the parts of its scope. Raises NoOperation for any other operation."""
        if self._phased is None:
            raise NoOperation("Only functions of Phased have a principal.", digest=self.key_digest)
        principal: tuple[str, ...] = self._phased.principal
        return principal

    def _known(self, connection: Any) -> bool:
        """Whether the operation has joined that connection already."""
        if self._phase is not None:
            raise ConfigurationError(
                f"{self._phase} has a transaction of its own; leave it first.", digest=self.key_digest
            )
        if self.refuses_transactions:
            raise ConfigurationError(self.refuses_transactions, digest=self.key_digest)
        if self._hold.lost:
            raise lease_lost(self._hold)
        if self._joined is None:
            return False
        if self._joined.given is connection or self._joined.connection is connection:
            return True
        raise ConfigurationError(_ANOTHER, digest=self.key_digest)

    @contextlib.contextmanager
    def _joining(self) -> Iterator[None]:
        """Nobody else joins a transaction meanwhile: one of the two would be neither committed nor rolled back."""
        with _mutex:
            if self in _about_to_join:
                raise ConfigurationError(_ANOTHER, digest=self.key_digest)
            _about_to_join.add(self)
        try:
            yield
        finally:
            _about_to_join.discard(self)

    def _ask(self, command: Any) -> Reply:
        """The store's reply to one command, for a thread."""
        raise NotImplementedError

    async def _aask(self, command: Any) -> Reply:
        """The store's reply to one command, for a task."""
        raise NotImplementedError

    def _check_step(self) -> None:
        """Refuse a step whose result could not be kept from here, before it runs."""

    def _check_astep(self) -> None:
        """The same for `astep`."""

    def _keep(self, name: str, value: bytes) -> None:
        raise NotImplementedError

    async def _akeep(self, name: str, value: bytes) -> None:
        raise NotImplementedError

    def encoded(self, codec: Codec, value: Any) -> tuple[bytes, Any]:
        """A value of a step or a phase, as it is kept and as every attempt sees it (C16).

        Raises Unencodable for one that cannot be kept, for its kind or its size.
        """
        data, seen = encode_and_replay(codec, value)
        own: int | None = self._store.capabilities.max_result
        kept = 0 if own is None else sum(map(len, self._hold.checkpoints.values()))
        if len(data) > self._policy.max_result or (own is not None and kept + len(data) > own):
            raise Unencodable(f"it has {len(data)} bytes, which is over the limit")
        return data, seen

    def _encoded_or_omitted(self, name: str, codec: Codec, value: Any) -> tuple[bytes, Any]:
        """A step's result; one that cannot be kept is handed on as it is: what made it must not run again (C14)."""
        try:
            return self.encoded(codec, value)
        except Unencodable as error:
            logger.warning("The result of the step %r is not kept: %s", name, error)
            return OMITTED_VALUE, value

    def check_revivable(self, name: str) -> None:
        """Refuse to extend a lease past `max_run` (C6)."""
        if clock() >= self._hold.stops:
            self._forget_name(name)
            raise LeaseLost(
                f"This attempt ran past max_run, and its lease is over: {name!r} was not begun, since another attempt "
                "may take over at any time.",
                digest=self.key_digest,
            )

    def _renew(self, name: str) -> None:
        """Renew a lease that has run out by our own count, before a step begins (C6)."""
        self.check_revivable(name)
        sent = clock()
        self._renewed(name, self._ask(self._hold.renew()), sent)

    async def _arenew(self, name: str) -> None:
        """The same, awaited."""
        self.check_revivable(name)
        sent = clock()
        self._renewed(name, await self._aask(self._hold.renew()), sent)

    def _renewed(self, name: str, reply: Reply, sent: float) -> None:
        if isinstance(reply, Done):
            self._hold.renewed(sent)
            if clock() < self._hold.deadline:
                return
        self._forget_name(name)
        if isinstance(reply, Lost):
            self._hold.lose()
            raise lease_lost(self._hold)
        raise StoreUnavailable(
            f"The lease had run out and could not be renewed, so {name!r} was not begun.",
            digest=self.key_digest,
        ) from getattr(reply, "error", None)

    def _begin_step(self, name: str, codec: Codec | None) -> tuple[bool, Any]:
        self._check_not_ended(name)
        with _mutex:  # threads use names as well
            if self._names is None:
                self._names = set()
            if name in self._names:
                raise ConfigurationError(
                    f"The name {name!r} was used twice in one attempt; give each step and phase a name of its own.",
                    digest=self.key_digest,
                )
            self._names.add(name)
        if self._hold.lost:
            raise lease_lost(self._hold)
        kept = self._hold.checkpoints.get(name)
        if kept is not None:
            return True, self._read(name, codec or _PLAIN, kept)
        if self._phase_holds or (self._joined is not None and self._joined.place.held):
            self._names.discard(name)
            raise ConfigurationError(_STEP_BESIDE, digest=self.key_digest)
        return False, None

    def _read(self, name: str, codec: Codec, kept: bytes) -> Any:
        if kept != OMITTED_VALUE:
            return decode_value(codec, kept)
        raise ResultOmitted(
            f"{name!r} was done by an earlier attempt, and its result could not be kept: it could not be encoded, or "
            "was too large. It is not run again; read its effect where it was written.",
            digest=self.key_digest,
        )

    def _check_not_ended(self, name: str) -> None:
        if self.refuses_transactions == ENDED:
            raise ConfigurationError(
                f"The operation has ended: its result was stored, or it was given back. {name!r} was not begun, since "
                "nothing more can be kept of this attempt.",
                digest=self.key_digest,
            )

    def _forget_name(self, name: str) -> None:
        """It was not used after all."""
        if self._names is not None:
            self._names.discard(name)


def lease_lost(hold: Hold) -> LeaseLost:
    """The error of an attempt that another one took over."""
    return LeaseLost(
        "Another attempt took this operation over while this one ran past its lease; what this one does is not "
        "recorded any more. Stop, and let the other one answer.",
        digest=short_digest(hold.id),
    )


def keep(hold: Hold, name: str, value: bytes, seconds: float, now: float) -> Steps[Reply]:
    """Store a step's result, fenced; asks again for up to `seconds` while the store gives no answer.

    Where the record is gone nobody took over, and the attempt goes on: it is told as done (C10).
    """
    began = now
    while True:
        reply, now = yield hold.checkpoint(name, value)
        if isinstance(reply, Lost):
            found, _ = yield Look(hold.id)
            return DONE if isinstance(found, Found) and found.record is None else reply
        if not isinstance(reply, Unreachable) or now - began > seconds:
            return reply


def _kept(operation: Operation, reply: Reply, name: str, value: bytes) -> None:
    hold = operation._hold
    if isinstance(reply, Done):
        hold.checkpoints = {**hold.checkpoints, name: value}
    elif isinstance(reply, Lost) and operation.refuses_transactions == ENDED:
        raise ConfigurationError(
            f"The operation ended while {name!r} was done, so that its result could not be kept.",
            digest=short_digest(hold.id),
        )
    elif isinstance(reply, Lost):
        hold.lose()
        raise lease_lost(hold)
    else:
        error = reply.error if isinstance(reply, Unreachable) else None
        raise StoreUnavailable(
            f"The result of the step {name!r} could not be stored; a later attempt runs it again, under the same "
            "derived key.",
            digest=short_digest(hold.id),
        ) from error


class BlockingOperation(Operation):
    """An operation that a thread runs, over its opened store."""

    __slots__ = ()

    def _keep(self, name: str, value: bytes) -> None:
        steps = keep(self._hold, name, value, self._policy.complete_timeout, clock())
        _kept(self, pump(steps, lambda command: (self._ask(command), clock())), name, value)

    def _check_astep(self) -> None:
        raise ConfigurationError("This operation is run by a sync engine: use the blocking call, not the awaited one.")

    def _ask(self, command: Any) -> Reply:
        reply: Reply = self._store.perform(command, self._policy.store_timeout)
        return reply


class LoopOperation(Operation):
    """An operation that an event loop runs, over its opened store."""

    __slots__ = ("_loop",)

    def __init__(self, hold: Hold, store: Any, policy: Policy, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(hold, store, policy)
        self._loop = loop

    def _check_step(self) -> None:
        if asyncio._get_running_loop() is self._loop:
            raise ConfigurationError("step would block the event loop: await astep instead.")

    def _check_astep(self) -> None:
        if asyncio._get_running_loop() is not self._loop:
            raise ConfigurationError("This operation belongs to another event loop: use step here, not astep.")

    async def _aask(self, command: Any) -> Reply:
        reply: Reply = await self._store.perform(command, self._policy.store_timeout)
        return reply

    def _ask(self, command: Any) -> Reply:
        """From a thread that the handler runs in; on the loop itself there is no answer to be had without blocking."""
        if asyncio._get_running_loop() is self._loop:
            return Unreachable(ConfigurationError("A blocking call on the event loop cannot ask an async store."))
        return asyncio.run_coroutine_threadsafe(self._aask(command), self._loop).result()

    async def _akeep(self, name: str, value: bytes) -> None:
        async def ask(command: Command) -> tuple[Reply, float]:
            return await self._aask(command), clock()

        steps = keep(self._hold, name, value, self._policy.complete_timeout, clock())
        _kept(self, await apump(steps, ask), name, value)

    def _keep(self, name: str, value: bytes) -> None:
        """From a thread that the handler runs in."""
        asyncio.run_coroutine_threadsafe(self._akeep(name, value), self._loop).result()


_current: ContextVar[Operation] = ContextVar("retryproof_operation")
_RAISE: Any = object()


@overload
def current_operation() -> Operation: ...


@overload
def current_operation(default: T) -> Operation | T: ...


def current_operation(default: Any = _RAISE) -> Any:
    """The operation that this code runs in. Outside of one: `default`, or NoOperation."""
    operation = _current.get(None)
    if operation is not None:
        return operation
    if default is _RAISE:
        raise NoOperation(
            "There is no current operation: this code does not run under Retryproof, or its request had no key. "
            "Pass default= to allow for that."
        )
    return default


def enter(operation: Operation) -> Token[Operation]:
    """Make this the current operation; undone by `leave`."""
    return _current.set(operation)


def leave(token: Token[Operation]) -> None:
    """Make the operation before it current again."""
    _current.reset(token)


def settle(operation: Operation, outcome: Outcome) -> Settled:
    """What came of the work, and of the transaction that it joined, which is over then. In the handler's thread."""
    operation.refuses_transactions = ENDED
    outcome = operation.said(outcome)
    if operation._joined is None:
        return outcome, None
    settled: Settled = operation._joined.settle(outcome, operation._ask)
    return settled


async def asettle(operation: Operation, outcome: Outcome) -> Settled:
    """`settle` on the event loop. A cancellation does not part the result from its commit: it is handed back as the
    error, after the end. A second one does not wait.
    """
    operation.refuses_transactions = ENDED
    outcome = operation.said(outcome)
    if operation._joined is None:
        return outcome, None
    return await _outlive(operation._joined, outcome, operation._aask)


async def _outlive(joined: Any, outcome: Outcome, ask: Callable[[Any], Awaitable[Reply]]) -> Settled:
    """End a transaction, whoever is cancelled meanwhile."""
    task = asyncio.get_running_loop().create_task(_asettled(joined, outcome, ask))
    _settling.add(task)
    task.add_done_callback(_settling.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError as cancellation:
        await asyncio.wait({task})
        return task.result()[0], cancellation


_mutex = threading.Lock()
_about_to_join: set[Operation] = set()
"""Operations whose handlers asked for a transaction that is not open yet."""
_settling: set[asyncio.Task[Settled]] = set()
"""Tasks that the loop must not lose."""


async def _asettled(joined: Any, outcome: Outcome, ask: Callable[[Any], Awaitable[Reply]]) -> Settled:
    settled: Settled = await joined.asettle(outcome, ask)
    return settled


def _module() -> Any:
    """Loaded when it is first used: it stands on this module, and few operations need it."""
    return importlib.import_module("retryproof.transaction.joined")
