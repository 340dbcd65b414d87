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

The steps are generators: they yield what is to be done on the connection or in the store, and are pumped in either
colour. What a database does is in `fence`, which connection carries which operation in `carried`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

from retryproof.core.commands import (
    Committed,
    Done,
    Found,
    LeaseLost,
    Look,
    Lost,
    Pause,
    Raised,
    Release,
    Renew,
    Returned,
    WorkOutcome,
)
from retryproof.core.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from retryproof.core.flow import FIRST_BACKOFF, LAST_BACKOFF
from retryproof.core.record import State
from retryproof.drive import apump, clock
from retryproof.joined import carried
from retryproof.joined.fence import Fence, fence_of
from retryproof.recovery import Recovery, lease_lost
from retryproof.sql.callers import (
    SAVEPOINT,
    BlockingConnection,
    LoopConnection,
    adapt,
    adapter_of,
    missing_table,
    refused,
    unknown,
)
from retryproof.sql.plan import Joining, Statement

T = TypeVar("T")
logger = logging.getLogger("retryproof")

Settled: TypeAlias = tuple[WorkOutcome, BaseException | None]
"""What came of the work once its transaction is over, and what its caller is raised."""
ANOTHER = "another transaction is open on it than the one that was joined"


Do: TypeAlias = Literal["begin", "check_open", "driver", "commit", "rollback"]
"""What the steps ask of the connection beside statements: the adapter's method."""


@dataclass(slots=True)  # not frozen, which makes them four times as slow to make
class Ask:
    """A command for the store."""

    command: Release | Renew | Look


@dataclass(slots=True)
class Enter:
    """Enter the block that gives the connection."""

    block: Any


@dataclass(slots=True)
class Leave:
    """Leave it, as that error does."""

    block: Any
    error: BaseException | None


Step: TypeAlias = Statement | Do | Ask | Pause | Enter | Leave
Steps: TypeAlias = Generator[Step, Any, T]


class Transaction:
    """One transaction of a caller's that an attempt takes part in, for all of it or for a phase.

    given: a connection, or a context manager that gives one, which is entered and left again.
    on_loop: the colour, which is checked as the connection is joined. ask: gives the store a command, in that colour.
    held: nobody but this transaction can write the record before its end.
    """

    __slots__ = (
        "__weakref__",
        "_adapted",
        "_block",
        "_driver",
        "_hold",
        "_identified",
        "_on_loop",
        "_recovery",
        "_store",
        "_thread",
        "ask",
        "connection",
        "fence",
        "given",
        "held",
    )

    def __init__(self, recovery: Recovery, store: Any, given: Any, ask: Callable[[Any], Any], *, on_loop: bool) -> None:
        self.given = given
        self.connection: Any = None
        self.held = False
        self.ask = ask
        self._recovery = recovery
        self._hold = recovery.hold
        self._store = store
        self._on_loop = on_loop
        self.fence: Fence  # set as it is entered
        self._adapted: Any = None
        self._block: Any = None
        self._driver: object = None
        self._identified = False  # the library tells this transaction from its next one, and refuses to commit it
        self._thread = threading.get_ident()

    @property
    def id(self) -> bytes:
        """The record's."""
        return self._hold.id

    # How a step is performed

    def perform(self, step: Step) -> Any:
        """Do one step; on a loop, what is to be awaited for it."""
        if isinstance(step, Statement):  # in place of `match`, which takes twice as long
            return self._adapted.execute(step)
        if isinstance(step, str):
            return getattr(self._adapted, step)()
        if isinstance(step, Enter):
            return step.block.__aenter__() if self._on_loop else step.block.__enter__()
        if isinstance(step, Leave):
            error = step.error
            how = (None, None, None) if error is None else (type(error), error, error.__traceback__)
            return step.block.__aexit__(*how) if self._on_loop else step.block.__exit__(*how)
        if isinstance(step, Ask):
            return self.ask(step.command)
        return asyncio.sleep(step.seconds) if self._on_loop else time.sleep(step.seconds)

    async def asettle(self, outcome: WorkOutcome, ask: Callable[[Any], Any]) -> Settled:
        """Pump `settle` on an event loop, whichever kind of connection it is.

        What blocks is done in a thread, or here when the handler blocked here too. ask: gives the store a command.
        """
        if self._on_loop:
            return await apump(self.settle(outcome), self.perform)
        loop, here = asyncio.get_running_loop(), threading.get_ident() == self._thread

        async def perform(step: Step) -> Any:
            match step:
                case Ask(command):
                    return await ask(command)
                case Pause(seconds):
                    return await asyncio.sleep(seconds)
                case _:
                    return self.perform(step) if here else await loop.run_in_executor(None, self.perform, step)

        return await apump(self.settle(outcome), perform)

    # Joining

    def enter(self) -> Steps[None]:
        """Take the connection's transaction for the attempt, or raise. Nothing was written then."""
        fence = self.fence = fence_of(self._store, self._hold)
        given = connection = self.given
        if adapter_of(type(given)) is None:
            if not hasattr(given, "__aenter__" if self._on_loop else "__enter__"):
                raise unknown(given)
            connection = yield Enter(given)
            self._block = given
        try:
            adapted = adapt(connection)
            self._check(adapted, fence)
            self._adapted, self.connection = adapted, connection
            lent = self._block is not None
            if lent:
                yield "begin"
            if adapted.ASKS:
                yield "check_open"
            # Any other block than the one that we leave would commit by itself.
            reason = adapted.unusable(to_commit=True) or (None if lent else adapted.block())
            if reason is not None:
                raise refused(reason, adapted.ADVICE)
            self._identified = adapted.IDENTIFIED
            driver = adapted.known_driver()
            self._driver = (yield "driver") if driver is None else driver
            carried.take(self, self._driver)
            try:
                joining = yield from fence.plans.join(self._hold)
            except Exception as error:
                if missing_table(error):
                    raise self._elsewhere() from error
                raise
            if joining is None or joining.committed or joining.nested:
                yield from self._refuse(joining)
            else:
                self.held = joining.held
            adapted.guard()
        except BaseException as error:
            self.let_go()
            if self._block is not None:
                yield Leave(self._block, error)
            raise

    def _check(self, adapted: BlockingConnection | LoopConnection, fence: Fence) -> None:
        """Refuse a connection of the other colour, or to another kind of database."""
        if adapted.on_loop is not self._on_loop:
            call = "await operation.atransaction" if adapted.on_loop else "use operation.transaction"
            raise ConfigurationError(f"This connection {'is awaited' if adapted.on_loop else 'blocks'}: {call} for it.")
        if adapted.dialect != fence.dialect.name:
            raise ConfigurationError(
                f"The connection is one to {adapted.dialect} and the store is {fence.dialect.name}; they must be the "
                "same database.",
                digest=self._recovery.digest,
            )

    def _refuse(self, joining: Joining | None) -> Steps[NoReturn]:
        """Say why the transaction cannot be this attempt's."""
        hold = self._hold
        if joining is None:
            found = yield Ask(Look(hold.id))
            if not isinstance(found, Found) or self.ours(found, State.IN_PROGRESS):
                raise self._elsewhere()
            raise lease_lost(hold)
        if joining.committed:
            raise self.committed_alone()
        yield from self.fence.plans.unmark([hold.id])
        raise refused(SAVEPOINT, "Hand the transaction over outside of any savepoint.")

    def _elsewhere(self) -> ConfigurationError:
        return ConfigurationError(
            "The transaction does not see the operation's record: either the connection and the store lead to "
            f"different databases (or schemas: the store's table is {self.fence.table}), or the transaction was begun "
            "before the operation at an isolation level with a snapshot. Nothing was done.",
            digest=self._recovery.digest,
        )

    # Its end

    def broken(self) -> str | None:
        """Why the transaction is of no use any more; from here on it may be committed."""
        self._adapted.unguard()
        reason: str | None = self._adapted.unusable(to_commit=True)
        return reason

    def let_go(self) -> None:
        """The connection carries this operation no more; before its end, after which a pool may have lent it again."""
        driver, self._driver = self._driver, None
        if driver is not None:
            carried.let_go(self, driver)

    def roll_back(self) -> Steps[None]:
        """Undo the work, whatever the connection makes of it."""
        self.let_go()
        try:
            yield "rollback"
        except Exception as error:  # noqa: BLE001  # whatever the driver raises
            # The connection is of no use then, and the server rolls back what it leaves behind.
            logger.debug("A transaction could not be rolled back: %s", error)

    def leave(self, last: Steps[T]) -> Steps[T]:
        """Do the last steps, and leave the block that gave the connection."""
        try:
            result = yield from last
        except BaseException as error:
            self.let_go()
            if self._block is not None:
                yield Leave(self._block, error)
            raise
        self.let_go()
        if self._block is not None:
            yield Leave(self._block, None)
        return result

    def settle(self, outcome: WorkOutcome) -> Steps[Settled]:
        """Commit the work with its result, or roll it back; what came of it, and the error that says why not."""
        try:
            return (yield from self._settled(outcome, self.broken()))
        finally:
            self.let_go()
            if self._block is not None:
                try:
                    yield Leave(self._block, None)
                except Exception as error:  # whatever it is: what the work came to stands
                    digest = self._recovery.digest
                    logger.warning("The connection of operation %s could not be closed.", digest, exc_info=error)

    def _settled(self, outcome: WorkOutcome, broken: str | None) -> Steps[Settled]:
        """broken: why the transaction that was joined is of no use any more."""
        if not isinstance(outcome, Returned):
            return (yield from self._undone(outcome, broken))
        if broken is not None:
            yield from self.roll_back()
            return (yield from self._ended(broken))
        try:
            reply = yield from self.fence.plans.complete(self._hold.complete(outcome.result))
        except Exception as error:  # noqa: BLE001  # handed back, to be raised when the record says what it means
            yield from self.roll_back()
            alone = (yield from self._committed()) is True
            return (Raised(unknown=True), self.committed_alone()) if alone else (Raised(), error)
        if reply is None:  # it may be somebody else's, and is left alone, unless it would shut everybody out
            if self.fence.dialect.one_writer:
                yield from self.roll_back()
            return (yield from self._ended(ANOTHER))
        if isinstance(reply, Lost):
            yield from self.roll_back()
            return (yield from self._ended("it is not the one that was joined"))
        try:
            self.let_go()
            yield "commit"
        except Exception as error:  # noqa: BLE001  # as above
            yield from self.roll_back()
            return (yield from self._doubted(outcome, error))
        return Committed(outcome.result), None

    def _undone(self, outcome: WorkOutcome, broken: str | None) -> Steps[Settled]:
        """Roll the work back; OutcomeUnknown where it had been committed before.

        Unless the library knows, the connection is asked first whether its transaction is still ours, in place of the
        store afterwards: a pool may have lent it to somebody else meanwhile.
        """
        if broken is None and self.fence.dialect.tells_joined and not self._identified:
            joined = True
            with contextlib.suppress(Exception):  # whatever the driver raises: then it has failed, and is rolled back
                joined = yield from self.fence.plans.is_joined(self._hold)
            if joined:
                yield from self.roll_back()
                return outcome, None
        else:
            yield from self.roll_back()
            if broken is None and self._identified:
                return outcome, None
        if isinstance(outcome, LeaseLost) or not (yield from self._committed()):
            return outcome, None
        # Who was cancelled, or said that the outcome is unknown, is raised that.
        return Raised(unknown=True), self.committed_alone() if outcome == Raised() else None

    def _committed(self) -> Steps[bool | None]:
        """Whether work of this operation was committed without its result; None where the store does not say."""
        found = yield Ask(Look(self._hold.id))
        if not isinstance(found, Found):
            return None
        return found.record is not None and found.record.committed

    def _ended(self, reason: str) -> Steps[Settled]:
        """The transaction that was joined is over, and we have not ended it: what became of the work."""
        found = yield Ask(Look(self._hold.id))
        if not isinstance(found, Found):
            return Raised(unknown=True), self._not_open(reason, "Whether its work was committed is not known")
        alone = found.record is not None and found.record.committed
        if not self.ours(found, State.IN_PROGRESS):
            if alone:
                logger.error(
                    "Operation %s: an attempt that had lost its lease committed its work by itself, beside another "
                    "one.",
                    self._recovery.digest,
                )
            return LeaseLost(), None
        if alone:
            return Raised(unknown=True), self.committed_alone()
        return Raised(), self._not_open(reason, "Its work was rolled back")

    def _not_open(self, reason: str, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"The handler ended the transaction that it had joined ({reason}). {what}, and its result is not stored. "
            "Leave the transaction open: it is committed after the handler returns. A connection that a block closes "
            "is handed over with its block: operation.transaction(pool.connection()).",
            digest=self._recovery.digest,
        )

    def _doubted(self, outcome: Returned, error: Exception) -> Steps[Settled]:
        """The commit failed, or only its answer did."""
        hold, began, delay = self._hold, clock(), FIRST_BACKOFF
        while True:
            reply = yield Ask(hold.release())
            if isinstance(reply, Done):
                return Raised(), error
            if isinstance(reply, Lost):
                found = yield Ask(Look(hold.id))
                if self.ours(found, State.COMPLETED, State.TOMBSTONE):
                    return Committed(outcome.result), None
                if isinstance(found, Found):
                    return LeaseLost(), None
            if clock() - began + delay > self._recovery.policy.complete_timeout:
                break
            yield Pause(delay)
            delay = min(2 * delay, LAST_BACKOFF)
        unavailable = StoreUnavailable(
            "Whether the transaction was committed is not known yet: the answer to the commit was lost, and the "
            "database gives no other. Ask again with the same key.",
            digest=self._recovery.digest,
            retry_after=hold.lease,
        )
        unavailable.__cause__ = error
        return Raised(unknown=True), unavailable

    # What the record says

    def ours(self, found: Any, *states: State) -> bool:
        """Whether that is this attempt's record, in one of these states."""
        record = found.record if isinstance(found, Found) else None
        return (
            record is not None
            and (record.nonce, record.token) == (self._hold.nonce, self._hold.token)
            and record.state in states
        )

    def committed_alone(self) -> OutcomeUnknown:
        """The error of work that was committed without its result."""
        return OutcomeUnknown(
            "The work of this operation was committed without its result: the handler, or a block around its work, "
            "ended the transaction that it had joined. Leave it open: it is committed after the handler returns "
            "(flush, do not commit). This operation does not run again; find out what it did, then settle it with "
            "`retryproof keys settle`.",
            digest=self._recovery.digest,
        )
