"""Transactional mode: the caller's own transaction, which an operation's work and result commit with (T1).

Theory. The store has committed the claim before. The handler works in a transaction of its own. A fenced statement
stores its result in this transaction: it waits for the record's row, and locks it until the commit. So a crash leaves
both or neither. An overtaken holder cannot commit: token and nonce are compared with the row locked, and this needs no
renewed lease.

If the answer to a commit is lost, a fenced release decides. If it is done, the record was in progress and not locked,
so the transaction has not committed and never will. If it is `Lost`, the record says whether we committed. A completion
is never written outside the transaction, since it could record an effect that was rolled back.

The handler must leave the transaction open. Joining marks the transaction: on PostgreSQL with a setting that ends with
it, on SQLite with a savepoint (SQLAlchemy knows its own transactions). So another transaction on the same connection,
perhaps of a caller that got the connection from its pool, is recognised, and is neither committed nor rolled back.

A marker is a row of the joined transaction that the completion deletes. It shows what happened to work that we did not
commit. If another connection can see the marker, the work was committed without its result (by the handler's own
`commit`, by a block that commits by itself, or before a crash). No claim takes such an operation over. If there is no
marker, the work was rolled back. One case remains: a holder lost its lease and then commits by itself. The attempt that
took over sees the marker when it joins or completes in a transaction; it does not see it if it works in none, or had
ended before.

A connection carries one operation at a time; otherwise one would commit the other's unfinished work (`carried`).

The steps are generators: they yield what has to be done on the connection or in the store, blocking or awaited. `fence`
has what the databases do.
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
"""The outcome of the work when its transaction is over, and the exception for its caller."""
ANOTHER = "another transaction is open on it than the one that was joined"


Do: TypeAlias = Literal["begin", "check_open", "driver", "commit", "rollback"]
"""A step on the connection that is no statement: the adapter's method."""


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
    """One caller's transaction that an attempt has joined, for all its work or for a phase.

    given: a connection, or a context manager that gives one, which is entered and left again.
    on_loop: whether the connection must be awaited; checked when it is joined. ask: sends the store a command, blocking
        or awaited. held: only this transaction can write the record before its end.
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
        """Run `settle` on an event loop, for every kind of connection.

        Blocking calls run in a thread, or here if the handler blocked here too. ask: sends the store a command.
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
        """Join the connection's transaction, or raise; then nothing was written."""
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
            # Any block but the one that we leave would commit by itself.
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
        """Refuse a connection that is awaited instead of blocking, or vice versa, or to another kind of database."""
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
        """Why the transaction cannot be used any more; from here on it may be committed."""
        self._adapted.unguard()
        reason: str | None = self._adapted.unusable(to_commit=True)
        return reason

    def let_go(self) -> None:
        """The connection stops carrying this operation, before its end, since a pool may lend it again after that."""
        driver, self._driver = self._driver, None
        if driver is not None:
            carried.let_go(self, driver)

    def roll_back(self) -> Steps[None]:
        """Roll the work back, whatever the connection raises."""
        self.let_go()
        try:
            yield "rollback"
        except Exception as error:  # noqa: BLE001  # whatever the driver raises
            # The connection is unusable then, and the server rolls back its transaction.
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
        """Commit the work with its result, or roll it back; return the outcome, and the error that says why not."""
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
        """broken: why the joined transaction cannot be used any more."""
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

        Unless the library knows it, the connection is asked first whether its transaction is still ours (instead of
        asking the store afterwards), since a pool may have lent it to another caller meanwhile.
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
        # A cancelled caller gets the cancellation, and one that said "unknown" gets that.
        return Raised(unknown=True), self.committed_alone() if outcome == Raised() else None

    def _committed(self) -> Steps[bool | None]:
        """Whether work of this operation was committed without its result; None if the store gives no answer."""
        found = yield Ask(Look(self._hold.id))
        if not isinstance(found, Found):
            return None
        return found.record is not None and found.record.committed

    def _ended(self, reason: str) -> Steps[Settled]:
        """The joined transaction is over, and we did not end it: find out what happened to the work."""
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
        """Whether this is the attempt's record, in one of these states."""
        record = found.record if isinstance(found, Found) else None
        return (
            record is not None
            and (record.nonce, record.token) == (self._hold.nonce, self._hold.token)
            and record.state in states
        )

    def committed_alone(self) -> OutcomeUnknown:
        """The error for work that was committed without its result."""
        return OutcomeUnknown(
            "The work of this operation was committed without its result: the handler, or a block around its work, "
            "ended the transaction that it had joined. Leave it open: it is committed after the handler returns "
            "(flush, do not commit). This operation does not run again; find out what it did, then settle it with "
            "`retryproof keys settle`.",
            digest=self._recovery.digest,
        )
