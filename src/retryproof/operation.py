"""What a handler sees of the operation that it runs in, and the context variable that it is found by.

What steps and phases keep is `recovery`'s; the transactions that an operation takes part in are `joined`'s.
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

    __slots__ = ("_hold", "_phased", "_policy", "_recovery", "_refuses", "_store", "_unknown", "joins")

    def __init__(self, hold: Hold, store: Any, policy: Policy) -> None:
        self._hold = hold
        self._store = store
        self._policy = policy
        self._recovery: Recovery | None = None
        self.joins: Joined | None = None
        self._phased: Any = None
        self._unknown = False
        self._refuses = ""

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

    def said(self, outcome: WorkOutcome) -> WorkOutcome:
        """What came of the work, unless the handler said that nobody knows."""
        return Raised(unknown=True) if self._unknown and not isinstance(outcome, commands.LeaseLost) else outcome

    def end(self, outcome: WorkOutcome) -> WorkOutcome:
        """Take no more steps and transactions; what came of the work, as `said`."""
        self._refuses = ENDED
        if self._recovery is not None:
            self._recovery.refuses = ENDED
        return self.said(outcome) if self._unknown else outcome

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
        return self._transactions().join(connection)

    @overload
    async def atransaction(self, connection: AbstractAsyncContextManager[T]) -> T: ...

    @overload
    async def atransaction(self, connection: T) -> T: ...

    async def atransaction(self, connection: Any) -> Any:
        """`transaction` for a connection that is awaited: of psycopg, asyncpg, SQLAlchemy or aiosqlite."""
        return await self._transactions().ajoin(connection)

    def rollback(self) -> None:
        """Undo what was done in the operation's transaction, which is over then: the result is stored without it.

        For a result that is to be kept and work that is not, such as the answer that a card was declined. Nothing is
        done where there is no transaction, or where the operation has ended. Raises OutcomeUnknown where the handler
        had committed it.
        """
        if self.joins is not None and not self._refuses:
            _, error = self.joins.settle(Raised())
            if error is not None:
                raise error

    async def arollback(self) -> None:
        """`rollback` for what runs on an event loop, whichever kind of connection it has."""
        if self.joins is not None and not self._refuses:
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
        return self._refuses

    @refuses_transactions.setter
    def refuses_transactions(self, reason: str) -> None:
        self._refuses = reason
        if self._recovery is not None:
            self._recovery.refuses = reason

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
        return PhaseBlock(self._transactions(), name, connection, codec, self._phased)

    @property
    def principal(self) -> tuple[str, ...]:
        """For whom a phased function runs: the parts of its scope. Raises NoOperation for any other operation."""
        if self._phased is None:
            raise NoOperation("Only functions of Phased have a principal.", digest=self.key_digest)
        principal: tuple[str, ...] = self._phased.principal
        return principal

    def _kept(self) -> Recovery:
        """Made when it is first used: few operations need it."""
        if self._recovery is None:
            with _mutex:  # threads of one handler may be the first together
                if self._recovery is None:
                    recovery = Recovery(self._hold, self._policy, self._store.capabilities.max_result)
                    recovery.refuses = self._refuses
                    self._recovery = recovery
                    recovery.refuses = self._refuses  # the end may have come before it could be told
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
