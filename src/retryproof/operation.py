"""The operation as its handler sees it, and the context variable that finds it.

`recovery` has the values of steps and phases; `joined` has the transactions that an operation takes part in.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload
from uuid import UUID

from retryproof.core import commands
from retryproof.core.codec import Codec
from retryproof.core.commands import Raised, WorkOutcome
from retryproof.core.errors import NoOperation
from retryproof.core.failure import outcome_of
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.drive import Asking, LoopAsking, apump, pump
from retryproof.joined import Joined
from retryproof.joined.phases import PhaseBlock
from retryproof.joined.transaction import Settled
from retryproof.recovery import ENDED, PLAIN, Recovery, StepCall, Stepping, lease_lost, stepping

__all__ = [
    "ENDED",
    "EPOCH",
    "BlockingOperation",
    "LoopOperation",
    "Operation",
    "Phase",
    "Settled",
    "asettle",
    "current_operation",
    "enter",
    "lease_lost",
    "leave",
    "settle",
]

T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Phase(Protocol):
    """A phase of an operation, entered with `with` or `async with`.

    pending: whether the phase still has to be done. result: the value that is stored with the recovery point; set it
        inside the block, otherwise it is None. After the block, or if the phase is done, it is the value as every
        attempt sees it.
    """

    pending: bool
    result: Any

    @property
    def connection(self) -> Any:
        """The connection, in the phase's transaction; ConfigurationError if the phase is done."""

    def run(self, fn: Callable[[Any], T]) -> T:
        """Do the phase unless it is done: call fn with the connection; its return value is the result."""

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
    """The operation that is running: its identity, and values that are the same on every attempt.

    Safe to use from the threads and tasks that a handler starts.
    """

    __slots__ = ("_hold", "_phased", "_policy", "_recovery", "_store", "_unknown", "joins")

    def __init__(self, hold: Hold, store: Any, policy: Policy) -> None:
        self._hold = hold
        self._store = store
        self._policy = policy
        self._recovery: Recovery | None = None
        self.joins: Joined | None = None
        self._phased: Any = None
        self._unknown = False

    @property
    def key_digest(self) -> str:
        """16 hex digits that name the operation in logs, and find its record again."""
        return short_digest(self._hold.id)

    @property
    def token(self) -> int:
        """The fencing token, greater than in earlier attempts: store it with your writes, to refuse late writers."""
        return self._hold.token

    @property
    def attempt(self) -> int:
        """1 for the first attempt, and one more for each attempt that took over from a dead one."""
        return self._hold.attempt

    @property
    def first_seen(self) -> datetime:
        """When the operation was first claimed, by the store's clock, in UTC; the same on every attempt.

        Use it instead of the clock: a handler that reads the clock writes another time on each attempt.
        """
        return EPOCH + timedelta(microseconds=self._hold.first_seen)

    def derive(self, name: str) -> UUID:
        """The same random-looking UUID (version 4) on every attempt: for row ids, and for keys of foreign calls."""
        label = name.encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(b"retryproof derive 1\0" + self._hold.birth + label).digest()
        return UUID(bytes=digest[:16], version=4)

    def step(self, name: str, fn: Callable[[UUID], T], *, codec: Codec | None = None) -> T:
        """Run `fn` once: its result is stored under the name, and a later attempt gets it without running `fn`.

        fn gets `derive(name)`, to pass as the idempotency key of its call: after a crash between fn and storing its
        result, a later attempt runs fn again. The value goes through the codec (JSON by default). If the codec cannot
        write it, or it is over `Policy.max_result`, it is returned and not stored: a later attempt gets ResultOmitted,
        and does not run fn either. Raises ConfigurationError if the name was used before in this attempt, or the
        operation has ended; LeaseLost if another attempt took over, or the lease is over after `max_run`;
        StoreUnavailable if the result could not be stored, or the lease is over and could not be renewed.
        """
        asking = self._asking()
        asking.check_blocking()

        def perform(what: Any) -> Any:
            return fn(what.key) if type(what) is StepCall else asking.ask(what)

        result: T = pump(self._stepping(name, codec), perform)
        return result

    async def astep(self, name: str, fn: Callable[[UUID], Awaitable[T]], *, codec: Codec | None = None) -> T:
        """`step` for a coroutine function."""
        asking = self._asking()
        asking.check_awaited()

        def perform(what: Any) -> Awaitable[Any]:
            return fn(what.key) if type(what) is StepCall else asking.aask(what)

        result: T = await apump(self._stepping(name, codec), perform)
        return result

    def _stepping(self, name: str, codec: Codec | None) -> Stepping:
        held = self.joins is not None and self.joins.holds
        return stepping(self._kept(), name, codec or PLAIN, self.derive(name), held=held)

    def outcome_unknown(self) -> None:
        """Say that nobody knows whether this attempt had its effect: the record stays for `on_abandoned` (C5).

        Whatever the handler returns or raises afterwards is not stored, and does not release the operation. Use it if
        an `errors.OutcomeUnknown` would not arrive, because a framework, a middleware or the handler itself catches it
        and makes a response of it. A function's caller gets OutcomeUnknown, unless the function raises.
        """
        self._unknown = True

    def hear(self, error: BaseException) -> None:
        """Learn what the handler raised, from a framework that makes a response of it (C5)."""
        if outcome_of(error, self._policy.unknown_on) == Raised(unknown=True):
            self.outcome_unknown()

    def said(self, outcome: WorkOutcome) -> WorkOutcome:
        """What came of the work, unless the handler said that nobody knows."""
        return Raised(unknown=True) if self._unknown and not isinstance(outcome, commands.LeaseLost) else outcome

    def end(self, outcome: WorkOutcome) -> WorkOutcome:
        """Take no more steps and transactions; what came of the work, as `said`."""
        self._hold.refuses = ENDED
        return self.said(outcome) if self._unknown else outcome

    @overload
    def transaction(self, connection: AbstractContextManager[T]) -> T: ...

    @overload
    def transaction(self, connection: T) -> T: ...

    def transaction(self, connection: Any) -> Any:
        """Join the transaction of this connection: the work in it commits together with the result, or not at all.

        connection: of psycopg, SQLAlchemy, Django or sqlite3, to the store's database. Its transaction must be open,
            and stay open. Or a context manager that gives such a connection, as `pool.connection()` does; it is entered
            now, and left after the end. Returns the connection.
        After the handler returns, its result is stored in this transaction, fenced, and the transaction is committed.
        Only then anybody sees the result. The transaction is rolled back if the handler raises, if its result is not
        stored, or if another attempt took over. Raises ConfigurationError for a connection without a usable
        transaction, or to another database, and LeaseLost if another attempt took over. Nothing was written then.
        """
        return self._transactions().join(connection)

    @overload
    async def atransaction(self, connection: AbstractAsyncContextManager[T]) -> T: ...

    @overload
    async def atransaction(self, connection: T) -> T: ...

    async def atransaction(self, connection: Any) -> Any:
        """`transaction` for an awaited connection: of psycopg, asyncpg, SQLAlchemy or aiosqlite."""
        return await self._transactions().ajoin(connection)

    def rollback(self) -> None:
        """Roll back the work in the operation's transaction and end it; the result is stored without the work.

        Use it to store a result without the work, such as the answer that a card was declined. It does nothing if there
        is no transaction, or if the operation has ended. Raises OutcomeUnknown if the handler had committed the
        transaction.
        """
        if self.joins is not None and not self._hold.refuses:
            _, error = self.joins.settle(Raised())
            if error is not None:
                raise error

    async def arollback(self) -> None:
        """`rollback` on an event loop, for every kind of connection."""
        if self.joins is not None and not self._hold.refuses:
            _, cancellation = await self.joins.asettle(Raised())
            if cancellation is not None:  # or the error of work that was committed before
                raise cancellation

    @property
    def joined(self) -> bool:
        """Whether it commits in a transaction of the caller's."""
        return self.joins is not None and self.joins.transaction is not None

    @property
    def refuses_transactions(self) -> str:
        """Why it takes no transaction any more; ENDED once it has ended."""
        return self._hold.refuses

    @refuses_transactions.setter
    def refuses_transactions(self, reason: str) -> None:
        self._hold.refuses = reason

    def phase(self, name: str, connection: Any = None, *, codec: Codec | None = None) -> Phase:
        """Local work that commits together with its recovery point; a later attempt does not repeat it (T3).

            async with operation.phase("create_order", pool.acquire()) as phase:     # or `with`
                if phase.pending:
                    await phase.connection.execute("INSERT …")
                    phase.result = order_id

        connection: as for `transaction` and `atransaction`; without one, the connection from `Phased(connect=…)`.
        The transaction is committed at the end of the block, fenced, and rolled back if the block raises. Call foreign
        APIs between phases, with a key from `derive` or in a `step`. Phases and steps must have different names. Raises
        ConfigurationError for a name that is used twice, a phase in a phase, or a connection without a usable
        transaction; LeaseLost if another attempt took over; StoreUnavailable if the lease could not be renewed, or if
        the answer to the commit was lost and the record cannot be read.
        """
        return PhaseBlock(self._transactions(), name, connection, codec, self._phased)

    @property
    def principal(self) -> tuple[str, ...]:
        """The parts of a phased function's scope: for whom it runs. Raises NoOperation for any other operation."""
        if self._phased is None:
            raise NoOperation("Only functions of Phased have a principal.", digest=self.key_digest)
        principal: tuple[str, ...] = self._phased.principal
        return principal

    def _kept(self) -> Recovery:
        """It is made at its first use, since few operations need it."""
        if self._recovery is None:
            with _mutex:  # threads of one handler may be the first together
                if self._recovery is None:
                    self._recovery = Recovery(self._hold, self._policy, self._store.capabilities.max_result)
        return self._recovery

    def _transactions(self) -> Joined:
        """The same."""
        if self.joins is None:
            recovery = self._kept()
            with _mutex:
                if self.joins is None:
                    self.joins = Joined(recovery, self._store, self._asking())
        return self.joins

    def _asking(self) -> Asking:
        """How the store is asked from the code of this operation."""
        raise NotImplementedError


class BlockingOperation(Operation):
    """An operation that a thread runs, over its opened store."""

    __slots__ = ()

    def _asking(self) -> Asking:
        return Asking(self._store, self._policy.store_timeout)


class LoopOperation(Operation):
    """An operation that an event loop runs, over its opened store."""

    __slots__ = ()

    def _asking(self) -> Asking:
        return LoopAsking(self._store, self._policy.store_timeout, self._store.loop)


_mutex = threading.Lock()
_current: ContextVar[Operation | None] = ContextVar("retryproof_operation")
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


def enter(operation: Operation) -> Operation | None:
    """Make this the current operation; the one that it hides, for `leave`."""
    outer = _current.get(None)
    _current.set(operation)
    return outer


def leave(operation: Operation, outer: Operation | None) -> None:
    """Make the one that it hid current again. In another context, where it never was current, there is nothing to do:
    a coroutine may be closed there.
    """
    if _current.get(None) is operation:
        _current.set(outer)


def settle(operation: Operation, outcome: WorkOutcome) -> Settled:
    """What came of the work, and of the transaction that it joined, which is over then. In the handler's thread."""
    outcome = operation.end(outcome)
    joins = operation.joins  # looked at after the end: nobody joins one from there on
    return (outcome, None) if joins is None else joins.settle(outcome)


async def asettle(operation: Operation, outcome: WorkOutcome) -> Settled:
    """`settle` on the event loop. A cancellation does not part the result from its commit: it is handed back as the
    error, after the end. A second one does not wait.
    """
    outcome = operation.end(outcome)
    joins = operation.joins
    return (outcome, None) if joins is None else await joins.asettle(outcome)
