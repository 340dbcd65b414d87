"""Transactional mode: the caller's own transaction, which an operation's work and result commit with (T1).

Theory. The claim was committed ahead, by the store. The handler works in a transaction of its own; its result is stored
by a fenced statement in that very transaction, which waits for the record's row and holds it until the commit. So a
crash leaves both or neither, and a holder that another attempt took over cannot commit: token and nonce are compared
under the row's lock, and the lease needs no renewal for that.

A commit whose answer is lost is settled by a fenced release: it can only be done when the record is in progress and not
locked, so the transaction has not committed and never will; when it is lost, the record says whether we committed.
Nothing is ever completed outside the transaction, since that could record an effect that was rolled back.

The handler must leave the transaction open. It is marked when it is joined: on PostgreSQL with a setting that ends with
it, on SQLite with a savepoint (SQLAlchemy knows its own transactions). Another one on the same connection, be it of
whoever got that from its pool, is not taken for it.

As everywhere, the steps are generators: they yield what is to be done on the connection or in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from retryproof.core.commands import (
    Committed,
    Complete,
    Done,
    FenceReply,
    Found,
    LeaseLost,
    Look,
    Lost,
    Outcome,
    Pause,
    Raised,
    Release,
    Renew,
    Returned,
)
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.flow import FIRST_BACKOFF, LAST_BACKOFF
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.core.record import State
from retryproof.drive import clock
from retryproof.operation import Operation, Settled, lease_lost
from retryproof.stores.memory import wall_clock
from retryproof.stores.sql import postgres, sqlite_plans
from retryproof.stores.sql.plan import Plan, Statement
from retryproof.stores.sql.postgres_statements import TABLE
from retryproof.transaction.connections import (
    BlockingConnection,
    LoopConnection,
    find_adapter,
    missing_table,
    refused,
    unknown,
)

T = TypeVar("T")
logger = logging.getLogger("retryproof")

SERVED = ("postgresql", "sqlite")


class Do(Enum):
    """What the steps ask of the connection beside statements."""

    COMMIT = "commit"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Ask:
    """A command for the store."""

    command: Release | Renew | Look


Step = Statement | Do | Ask | Pause
Steps = Generator[Step, Any, T]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the operation's record is, and which attempt is at it.

    held: nobody but the transaction that was joined can write the record before its end.
    marked: a savepoint tells that transaction from the connection's next one.
    """

    hold: Hold
    policy: Policy
    dialect: str
    table: str
    held: bool = False
    marked: bool = False

    def join(self) -> Plan[bool | None]:
        """The dialect's plan; whether the transaction holds the record, None where the attempt is not current."""
        if self.dialect == "sqlite":
            return sqlite_plans.join(self.hold, mark=self.marked)
        return postgres.join_plan(self.hold, self.table)

    def complete(self, command: Complete) -> Plan[FenceReply]:
        """The dialect's plan."""
        if self.dialect == "sqlite":
            return sqlite_plans.complete_joined(command, wall_clock(), marked=self.marked)
        return postgres.complete_joined_plan(command, self.table)

    def ours(self, found: Any, *states: State) -> bool:
        """Whether that is this attempt's record, in one of these states."""
        record = found.record if isinstance(found, Found) else None
        return (
            record is not None
            and (record.nonce, record.token) == (self.hold.nonce, self.hold.token)
            and record.state in states
        )


def place_of(operation: Operation) -> Place:
    """Where the record of an operation is; ConfigurationError where no transaction of a caller's reaches it."""
    opened = operation._store
    opened = getattr(opened, "opened", opened)
    name = opened.capabilities.name
    if name not in SERVED:
        raise ConfigurationError(
            f"The store is {name}; work and result can only commit together where the records are in the database of "
            "the work: use a postgresql:// or sqlite:// store.",
            digest=operation.key_digest,
        )
    return Place(operation._hold, operation._policy, name, getattr(opened.store, "table", TABLE))


# What is done, as steps


def joining(place: Place) -> Steps[bool]:
    """Take the connection's transaction for the attempt, or raise; whether it holds the record until its end."""
    digest = short_digest(place.hold.id)
    try:
        held = yield from place.join()
    except Exception as error:
        if missing_table(error):
            raise ConfigurationError(_elsewhere(place), digest=digest) from error
        raise
    if held is not None:
        return held
    found = yield Ask(Look(place.hold.id))
    if not isinstance(found, Found) or place.ours(found, State.IN_PROGRESS):
        raise ConfigurationError(_elsewhere(place), digest=digest)
    raise lease_lost(place.hold)


def _elsewhere(place: Place) -> str:
    return (
        "The transaction does not see the operation's record: either the connection and the store lead to different "
        f"databases (or schemas: the store's table is {place.table}), or the transaction was begun before the "
        "operation at an isolation level with a snapshot. Nothing was done."
    )


def settling(place: Place, outcome: Outcome, broken: str | None) -> Steps[Settled]:
    """Commit the work with its result, or roll it back; what came of it, and the error that says why not.

    broken: why the transaction that was joined is of no use any more.
    """
    if not isinstance(outcome, Returned):
        yield from roll_back()
        return outcome, None
    if broken is not None:
        yield from roll_back()
        return _ended(place, broken)
    try:
        reply = yield from place.complete(place.hold.complete(outcome.result))
    except Exception as error:  # noqa: BLE001  # handed back, to be raised when the record says what it means
        yield from roll_back()
        return Raised(), error
    if isinstance(reply, Lost):
        yield from roll_back()
        return (yield from _why_lost(place))
    try:
        yield Do.COMMIT
    except Exception as error:  # noqa: BLE001  # as above
        yield from roll_back()
        return (yield from _doubted(place, outcome, error))
    return Committed(outcome.result), None


def roll_back() -> Steps[None]:
    """Undo the work, whatever the connection makes of it."""
    try:
        yield Do.ROLLBACK
    except Exception as error:  # noqa: BLE001  # whatever the driver raises
        # The connection is of no use then, and the server rolls back what it leaves behind.
        logger.debug("A transaction could not be rolled back: %s", error)


def _why_lost(place: Place) -> Steps[Settled]:
    found = yield Ask(Look(place.hold.id))
    if place.ours(found, State.IN_PROGRESS):
        return _ended(place, "another transaction is open on it than the one that was joined")
    return LeaseLost(), None


def _ended(place: Place, reason: str) -> Settled:
    error = ConfigurationError(
        f"The handler ended the transaction that it had joined ({reason}), so whether its work was committed is not "
        "known, and its result is not stored. Leave the transaction open: it is committed after the handler returns. "
        "A connection that a block closes is handed over with its block: operation.transaction(pool.connection()).",
        digest=short_digest(place.hold.id),
    )
    return Raised(unknown=True), error


def _doubted(place: Place, outcome: Returned, error: Exception) -> Steps[Settled]:
    """The commit failed, or only its answer did."""
    hold, began, delay = place.hold, clock(), FIRST_BACKOFF
    while True:
        reply = yield Ask(hold.release())
        if isinstance(reply, Done):
            return Raised(), error
        if isinstance(reply, Lost):
            found = yield Ask(Look(hold.id))
            if place.ours(found, State.COMPLETED, State.TOMBSTONE):
                return Committed(outcome.result), None
            if isinstance(found, Found):
                return LeaseLost(), None
        if clock() - began + delay > place.policy.complete_timeout:
            break
        yield Pause(delay)
        delay = min(2 * delay, LAST_BACKOFF)
    unavailable = StoreUnavailable(
        "Whether the transaction was committed is not known yet: the answer to the commit was lost, and the database "
        "gives no other. Ask again with the same key.",
        digest=short_digest(hold.id),
        retry_after=hold.lease,
    )
    unavailable.__cause__ = error
    return Raised(unknown=True), unavailable


# How it is done: in a thread, or on the event loop


class BlockingTransaction:
    """The transaction of a connection that blocks."""

    def __init__(
        self, operation: Operation, given: object, connection: Any, block: AbstractContextManager[Any] | None
    ) -> None:
        self.given = given
        self.connection = connection
        self.place = place_of(operation)
        self.block = block
        self._adapted: BlockingConnection = _checked(connection, self.place, operation, on_loop=False)
        self.place = replace(self.place, marked=_can_be_marked(self._adapted))
        self._thread = threading.get_ident()

    def join(self, ask: Callable[[Any], Any]) -> None:
        """Take the transaction; `ask` gives a command to the store."""
        if self.block is not None:
            self._adapted.begin()
        _check_usable(self._adapted)
        self.place = replace(self.place, held=self.pump(joining(self.place), ask))

    def settle(self, outcome: Outcome, ask: Callable[[Any], Any]) -> Settled:
        """Commit the work with its result, or roll it back."""
        try:
            return self.pump(settling(self.place, outcome, self.broken()), ask)
        finally:
            self._close()

    async def asettle(self, outcome: Outcome, ask: Callable[[Any], Awaitable[Any]]) -> Settled:
        """`settle` for an event loop: what blocks is done in a thread, or here when the handler blocked here too."""
        loop, here = asyncio.get_running_loop(), threading.get_ident() == self._thread

        async def call(function: Callable[..., Any], *args: Any) -> Any:
            return function(*args) if here else await loop.run_in_executor(None, function, *args)

        async def on_connection(step: Statement | Do) -> Any:
            return await call(self._on_connection, step)

        try:
            return await _apump(settling(self.place, outcome, self.broken()), on_connection, ask)
        finally:
            await call(self._close)

    def _close(self) -> None:
        if self.block is not None:
            try:
                self.block.__exit__(None, None, None)
            except Exception as error:  # noqa: BLE001  # whatever it is: the work has ended one way or the other
                _log_unclosed(self.place, error)

    def broken(self) -> str | None:
        """Why the transaction is of no use any more."""
        return self._adapted.unusable(to_commit=True)

    def pump(self, steps: Steps[T], ask: Callable[[Any], Any]) -> T:
        """Do the steps; `ask` gives a command to the store."""
        return _pump(steps, self._on_connection, ask, time.sleep)

    def _on_connection(self, step: Statement | Do) -> Any:
        match step:
            case Do.COMMIT:
                return self._adapted.commit()
            case Do.ROLLBACK:
                return self._adapted.rollback()
            case _:
                return self._adapted.execute(step)


class LoopTransaction:
    """The transaction of a connection on the event loop."""

    def __init__(
        self, operation: Operation, given: object, connection: Any, block: AbstractAsyncContextManager[Any] | None
    ) -> None:
        self.given = given
        self.connection = connection
        self.place = place_of(operation)
        self.block = block
        self._adapted: LoopConnection = _checked(connection, self.place, operation, on_loop=True)
        self.place = replace(self.place, marked=_can_be_marked(self._adapted))

    async def join(self, ask: Callable[[Any], Awaitable[Any]]) -> None:
        """Take the transaction; `ask` gives a command to the store."""
        if self.block is not None:
            await self._adapted.begin()
        await self._adapted.check_open()
        _check_usable(self._adapted)
        self.place = replace(self.place, held=await self.pump(joining(self.place), ask))

    async def asettle(self, outcome: Outcome, ask: Callable[[Any], Awaitable[Any]]) -> Settled:
        """Commit the work with its result, or roll it back."""
        try:
            return await self.pump(settling(self.place, outcome, self.broken()), ask)
        finally:
            if self.block is not None:
                try:
                    await self.block.__aexit__(None, None, None)
                except Exception as error:  # noqa: BLE001  # as above
                    _log_unclosed(self.place, error)

    def broken(self) -> str | None:
        """Why the transaction is of no use any more."""
        return self._adapted.unusable(to_commit=True)

    async def pump(self, steps: Steps[T], ask: Callable[[Any], Awaitable[Any]]) -> T:
        """Do the steps; `ask` gives a command to the store."""
        return await _apump(steps, self._on_connection, ask)

    async def _on_connection(self, step: Statement | Do) -> Any:
        match step:
            case Do.COMMIT:
                return await self._adapted.commit()
            case Do.ROLLBACK:
                return await self._adapted.rollback()
            case _:
                return await self._adapted.execute(step)


def _can_be_marked(adapted: BlockingConnection | LoopConnection) -> bool:
    """Whether a savepoint is certain to be inside of a transaction; outside of one it would begin and end one."""
    return bool(getattr(adapted, "SURELY_OPEN", False))


def _log_unclosed(place: Place, error: Exception) -> None:
    """What the transaction came to stands; that its connection failed afterwards changes nothing."""
    logger.warning("The connection of operation %s could not be closed.", short_digest(place.hold.id), exc_info=error)


def _checked(connection: Any, place: Place, operation: Operation, *, on_loop: bool) -> Any:
    adapted = find_adapter(connection)
    if adapted is None:
        raise unknown(connection)
    if asyncio.iscoroutinefunction(adapted.execute) is not on_loop:
        advice = "use operation.transaction for it" if on_loop else "await operation.atransaction for it"
        raise ConfigurationError(f"This connection {'blocks' if on_loop else 'is awaited'}: {advice}.")
    if adapted.dialect != place.dialect:
        raise ConfigurationError(
            f"The connection is one to {adapted.dialect} and the store is {place.dialect}; they must be the same "
            "database.",
            digest=operation.key_digest,
        )
    return adapted


def _check_usable(adapted: BlockingConnection | LoopConnection) -> None:
    reason = adapted.unusable(to_commit=True)
    if reason is not None:
        raise refused(reason, getattr(adapted, "ADVICE", ""))


def _pump(
    steps: Steps[T],
    on_connection: Callable[[Statement | Do], Any],
    ask: Callable[[Any], Any],
    sleep: Callable[[float], None],
) -> T:
    try:
        step = next(steps)
        while True:
            try:
                match step:
                    case Ask(command):
                        reply = ask(command)
                    case Pause(seconds):
                        reply = None
                        sleep(seconds)
                    case _:
                        reply = on_connection(step)
            except Exception as error:  # noqa: BLE001  # the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def _apump(
    steps: Steps[T], on_connection: Callable[[Statement | Do], Awaitable[Any]], ask: Callable[[Any], Awaitable[Any]]
) -> T:
    try:
        step = next(steps)
        while True:
            try:
                match step:
                    case Ask(command):
                        reply = await ask(command)
                    case Pause(seconds):
                        reply = None
                        await asyncio.sleep(seconds)
                    case _:
                        reply = await on_connection(step)
            except Exception as error:  # noqa: BLE001  # the steps decide
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


# What an operation calls


def join(operation: Operation, given: Any, ask: Callable[[Any], Any]) -> BlockingTransaction:
    """Take part in the transaction of a connection that blocks, or of one that a context manager gives."""
    if _is_connection(given):
        joined = BlockingTransaction(operation, given, given, None)
        joined.join(ask)
        return joined
    if not isinstance(given, AbstractContextManager):
        raise unknown(given)
    with contextlib.ExitStack() as stack:
        joined = BlockingTransaction(operation, given, stack.enter_context(given), given)
        joined.join(ask)
        stack.pop_all()
    return joined


async def ajoin(operation: Operation, given: Any, ask: Callable[[Any], Awaitable[Any]]) -> LoopTransaction:
    """Take part in the transaction of a connection on the event loop, or of one that a context manager gives."""
    if _is_connection(given):
        joined = LoopTransaction(operation, given, given, None)
        await joined.join(ask)
        return joined
    if not isinstance(given, AbstractAsyncContextManager):
        raise unknown(given)
    async with contextlib.AsyncExitStack() as stack:
        joined = LoopTransaction(operation, given, await stack.enter_async_context(given), given)
        await joined.join(ask)
        stack.pop_all()
    return joined


def _is_connection(given: Any) -> bool:
    return find_adapter(given) is not None
