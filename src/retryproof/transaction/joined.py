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
whoever got that from its pool, is not taken for it, and is neither committed nor rolled back.

A marker, a row of the joined transaction that the completion deletes, tells what became of work that we did not commit:
who else can see it knows that the work was committed without its result (the handler's own `commit`, a block that
commits by itself, a crash right after). No claim takes such an operation over; where there is none, it was rolled back.
What remains: a holder that lost its lease and then commits by itself is seen by the attempt that took over when that
joins or completes in a transaction, and not by one that works in none, or had ended before.

A connection carries one operation at a time, or one would commit the other's unfinished work. `_carried` knows which,
by the driver's own connection, for as long as who joined it is there.

As everywhere, the steps are generators: they yield what is to be done on the connection or in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from retryproof.clock import wall_clock
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
from retryproof.core.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from retryproof.core.flow import FIRST_BACKOFF, LAST_BACKOFF
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.core.record import State
from retryproof.drive import apump, clock, pump
from retryproof.operation import Operation, Settled, lease_lost
from retryproof.sql.callers import (
    SAVEPOINT,
    BlockingConnection,
    LoopConnection,
    find_adapter,
    missing_table,
    refused,
    unknown,
)
from retryproof.sql.plan import Joining, Plan, Statement
from retryproof.sql.postgres import records as postgres
from retryproof.sql.postgres.statements import TABLE
from retryproof.sql.sqlite import records as sqlite_plans

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


ANOTHER = "another transaction is open on it than the one that was joined"

Step = Statement | Do | Ask | Pause
Steps = Generator[Step, Any, T]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the operation's record is, and which attempt is at it.

    held: nobody but the transaction that was joined can write the record before its end.
    identified: the library tells that transaction from the connection's next one, and refuses to commit it.
    """

    hold: Hold
    policy: Policy
    dialect: str
    table: str
    held: bool = False
    identified: bool = False

    def join(self) -> Plan[Joining | None]:
        """The dialect's plan; None where the attempt is not current."""
        if self.dialect == "sqlite":
            return sqlite_plans.join(self.hold)
        return postgres.join_plan(self.hold, self.table)

    def complete(self, command: Complete) -> Plan[FenceReply | None]:
        """The dialect's plan; None where another transaction is open than the one that was joined."""
        if self.dialect == "sqlite":
            return sqlite_plans.complete_joined(command, wall_clock())
        return postgres.complete_joined_plan(command, self.table)

    def unmark(self) -> Plan[None]:
        """Take the marker back, in the transaction that is open."""
        if self.dialect == "sqlite":
            return sqlite_plans.unmark([self.hold.id])
        return postgres.unmark_plan([self.hold.id], self.table)

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
        joining = yield from place.join()
    except Exception as error:
        if missing_table(error):
            raise ConfigurationError(_elsewhere(place), digest=digest) from error
        raise
    if joining is None:
        found = yield Ask(Look(place.hold.id))
        if not isinstance(found, Found) or place.ours(found, State.IN_PROGRESS):
            raise ConfigurationError(_elsewhere(place), digest=digest)
        raise lease_lost(place.hold)
    if joining.committed:
        raise committed_alone(place)
    if joining.nested:
        yield from place.unmark()
        raise refused(SAVEPOINT, "Hand the transaction over outside of any savepoint.")
    return joining.held


def committed_alone(place: Place) -> OutcomeUnknown:
    """The error of work that was committed without its result."""
    return OutcomeUnknown(
        "The work of this operation was committed without its result: the handler, or a block around its work, ended "
        "the transaction that it had joined. Leave it open: it is committed after the handler returns (flush, do not "
        "commit). This operation does not run again; find out what it did, then settle it with `retryproof keys "
        "settle`.",
        digest=short_digest(place.hold.id),
    )


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
        return (yield from _undone(place, outcome, broken))
    if broken is not None:
        yield from roll_back()
        return (yield from _ended(place, broken))
    try:
        reply = yield from place.complete(place.hold.complete(outcome.result))
    except Exception as error:  # noqa: BLE001  # handed back, to be raised when the record says what it means
        yield from roll_back()
        alone = (yield from committed(place)) is True
        return (Raised(unknown=True), committed_alone(place)) if alone else (Raised(), error)
    if reply is None:  # it may be somebody else's, and is left alone; on SQLite it would shut everybody out
        if place.dialect == "sqlite":
            yield from roll_back()
        return (yield from _ended(place, ANOTHER))
    if isinstance(reply, Lost):
        yield from roll_back()
        return (yield from _ended(place, "it is not the one that was joined"))
    try:
        yield Do.COMMIT
    except Exception as error:  # noqa: BLE001  # as above
        yield from roll_back()
        return (yield from _doubted(place, outcome, error))
    return Committed(outcome.result), None


def _undone(place: Place, outcome: Outcome, broken: str | None) -> Steps[Settled]:
    """Roll the work back; OutcomeUnknown where it had been committed before.

    On PostgreSQL the connection is asked first whether its transaction is still ours, in place of the store afterwards:
    a pool may have lent it to somebody else meanwhile.
    """
    if broken is None and place.dialect == "postgresql" and not place.identified:
        joined = True
        with contextlib.suppress(Exception):  # whatever the driver raises: then it has failed, and is rolled back
            joined = yield from postgres.is_joined_plan(place.hold, place.table)
        if joined:
            yield from roll_back()
            return outcome, None
    else:
        yield from roll_back()
        if broken is None and place.identified:
            return outcome, None
    if isinstance(outcome, LeaseLost) or not (yield from committed(place)):
        return outcome, None
    # Who was cancelled, or said that the outcome is unknown, is raised that.
    return Raised(unknown=True), committed_alone(place) if outcome == Raised() else None


def committed(place: Place) -> Steps[bool | None]:
    """Whether work of this operation was committed without its result; None where the store does not say."""
    found = yield Ask(Look(place.hold.id))
    if not isinstance(found, Found):
        return None
    return found.record is not None and found.record.committed


def roll_back() -> Steps[None]:
    """Undo the work, whatever the connection makes of it."""
    try:
        yield Do.ROLLBACK
    except Exception as error:  # noqa: BLE001  # whatever the driver raises
        # The connection is of no use then, and the server rolls back what it leaves behind.
        logger.debug("A transaction could not be rolled back: %s", error)


def _ended(place: Place, reason: str) -> Steps[Settled]:
    """The transaction that was joined is over, and we have not ended it: what became of the work."""
    found = yield Ask(Look(place.hold.id))
    if not isinstance(found, Found):
        return Raised(unknown=True), not_open(place, reason, "Whether its work was committed is not known")
    alone = found.record is not None and found.record.committed
    if not place.ours(found, State.IN_PROGRESS):
        if alone:
            logger.error(
                "Operation %s: an attempt that had lost its lease committed its work by itself, beside another one.",
                short_digest(place.hold.id),
            )
        return LeaseLost(), None
    if alone:
        return Raised(unknown=True), committed_alone(place)
    return Raised(), not_open(place, reason, "Its work was rolled back")


def not_open(place: Place, reason: str, what: str) -> ConfigurationError:
    """The error of a handler that ended its transaction."""
    return ConfigurationError(
        f"The handler ended the transaction that it had joined ({reason}). {what}, and its result is not stored. Leave "
        "the transaction open: it is committed after the handler returns. A connection that a block closes is handed "
        "over with its block: operation.transaction(pool.connection()).",
        digest=short_digest(place.hold.id),
    )


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
        self.place = replace(self.place, identified=bool(getattr(self._adapted, "IDENTIFIED", False)))
        self._thread = threading.get_ident()
        self._driver: object = None

    def join(self, ask: Callable[[Any], Any]) -> None:
        """Take the transaction; `ask` gives a command to the store."""
        if self.block is not None:
            self._adapted.begin()
        _check_usable(self._adapted, lent=self.block is not None)
        self._driver = self._adapted.driver()
        with _carrying(self, self._driver, self.place):
            self.place = replace(self.place, held=self.pump(joining(self.place), ask))
        self._adapted.guard()

    def settle(self, outcome: Outcome, ask: Callable[[Any], Any]) -> Settled:
        """Commit the work with its result, or roll it back."""
        try:
            return self.pump(settling(self.place, outcome, self.broken()), ask)
        finally:
            self.let_go()
            self._close()

    async def asettle(self, outcome: Outcome, ask: Callable[[Any], Awaitable[Any]]) -> Settled:
        """`settle` for an event loop: what blocks is done in a thread, or here when the handler blocked here too."""
        loop, here = asyncio.get_running_loop(), threading.get_ident() == self._thread

        async def call(function: Callable[..., Any], *args: Any) -> Any:
            return function(*args) if here else await loop.run_in_executor(None, function, *args)

        async def perform(step: Step) -> Any:
            match step:
                case Ask(command):
                    return await ask(command)
                case Pause(seconds):
                    return await asyncio.sleep(seconds)
                case _:
                    return await call(self._on_connection, step)

        try:
            return await apump(settling(self.place, outcome, self.broken()), perform)
        finally:
            self.let_go()
            await call(self._close)

    def let_go(self) -> None:
        """The connection carries this operation no more; before its end, after which a pool may have lent it again."""
        _let_go(self, self._driver)

    def _close(self) -> None:
        if self.block is not None:
            try:
                self.block.__exit__(None, None, None)
            except Exception as error:  # noqa: BLE001  # whatever it is: the work has ended one way or the other
                _log_unclosed(self.place, error)

    def broken(self) -> str | None:
        """Why the transaction is of no use any more; from here on it may be committed."""
        self._adapted.unguard()
        return self._adapted.unusable(to_commit=True)

    def pump(self, steps: Steps[T], ask: Callable[[Any], Any]) -> T:
        """Do the steps; `ask` gives a command to the store."""

        def perform(step: Step) -> Any:
            match step:
                case Ask(command):
                    return ask(command)
                case Pause(seconds):
                    return time.sleep(seconds)
                case _:
                    return self._on_connection(step)

        return pump(steps, perform)

    def _on_connection(self, step: Statement | Do) -> Any:
        match step:
            case Do.COMMIT:
                self.let_go()
                return self._adapted.commit()
            case Do.ROLLBACK:
                self.let_go()
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
        self.place = replace(self.place, identified=bool(getattr(self._adapted, "IDENTIFIED", False)))
        self._driver: object = None

    async def join(self, ask: Callable[[Any], Awaitable[Any]]) -> None:
        """Take the transaction; `ask` gives a command to the store."""
        if self.block is not None:
            await self._adapted.begin()
        await self._adapted.check_open()
        _check_usable(self._adapted, lent=self.block is not None)
        self._driver = await self._adapted.driver()
        with _carrying(self, self._driver, self.place):
            self.place = replace(self.place, held=await self.pump(joining(self.place), ask))
        self._adapted.guard()

    async def asettle(self, outcome: Outcome, ask: Callable[[Any], Awaitable[Any]]) -> Settled:
        """Commit the work with its result, or roll it back."""
        try:
            return await self.pump(settling(self.place, outcome, self.broken()), ask)
        finally:
            self.let_go()
            if self.block is not None:
                try:
                    await self.block.__aexit__(None, None, None)
                except Exception as error:  # noqa: BLE001  # as above
                    _log_unclosed(self.place, error)

    def let_go(self) -> None:
        """The connection carries this operation no more; before its end, after which a pool may have lent it again."""
        _let_go(self, self._driver)

    def broken(self) -> str | None:
        """Why the transaction is of no use any more; from here on it may be committed."""
        self._adapted.unguard()
        return self._adapted.unusable(to_commit=True)

    async def pump(self, steps: Steps[T], ask: Callable[[Any], Awaitable[Any]]) -> T:
        """Do the steps; `ask` gives a command to the store."""

        async def perform(step: Step) -> Any:
            match step:
                case Ask(command):
                    return await ask(command)
                case Pause(seconds):
                    return await asyncio.sleep(seconds)
                case _:
                    return await self._on_connection(step)

        return await apump(steps, perform)

    async def _on_connection(self, step: Statement | Do) -> Any:
        match step:
            case Do.COMMIT:
                self.let_go()
                return await self._adapted.commit()
            case Do.ROLLBACK:
                self.let_go()
                return await self._adapted.rollback()
            case _:
                return await self._adapted.execute(step)


_carried: weakref.WeakValueDictionary[int, BlockingTransaction | LoopTransaction] = weakref.WeakValueDictionary()
"""What is joined, by the identity of the driver's connection, which it keeps alive."""
_mutex = threading.Lock()


@contextlib.contextmanager
def _carrying(joined: BlockingTransaction | LoopTransaction, driver: object, place: Place) -> Iterator[None]:
    """From here on the connection carries this operation, unless the block raises; refused where it has another."""
    with _mutex:
        other = _carried.get(id(driver))
        if other is not None:
            raise ConfigurationError(
                f"This connection is in the transaction of operation {short_digest(other.place.hold.id)}, which would "
                "commit what is done here, or lose it. Give each operation a connection of its own. Nothing was "
                "written.",
                digest=short_digest(place.hold.id),
            )
        _carried[id(driver)] = joined
    try:
        yield
    except BaseException:
        _let_go(joined, driver)
        raise


def _let_go(joined: BlockingTransaction | LoopTransaction, driver: object) -> None:
    with _mutex:
        if _carried.get(id(driver)) is joined:
            del _carried[id(driver)]


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


def _check_usable(adapted: BlockingConnection | LoopConnection, *, lent: bool) -> None:
    """lent: with its block, which we leave; any other block around it would commit by itself."""
    reason = adapted.unusable(to_commit=True) or (None if lent else adapted.block())
    if reason is not None:
        raise refused(reason, getattr(adapted, "ADVICE", ""))


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
