"""Phases: local work that commits together with its recovery point (T3).

    async with operation.phase("create_order", pool.acquire()) as phase:
        if phase.pending:                                   # not done by an earlier attempt
            await phase.connection.execute("INSERT …")
            phase.result = order_id
    order_id = phase.result

    order_id = await operation.phase("create_order", pool.acquire()).arun(create_order)    # the same, as a call

Theory. A phase is a transaction that also writes its name and result to the operation's record, fenced. The statement
waits for the record's row, compares token and nonce with the row locked, and keeps the lock until the commit, which
follows at once. So the work and its recovery point are committed together or not at all, no later attempt repeats a
committed phase, and an overtaken holder cannot commit one. Before that statement, the transaction holds no lock that
the store needs, however long the phase takes: all leases are renewed as usual.

Python cannot skip a `with` block. So a phase that is done has `pending` False and its result, and gives no connection.

A phase writes a marker too, although we begin and commit its transaction ourselves; this costs a round trip. Nobody can
prevent a handler from a COMMIT of its own inside the phase, in SQL or by a driver's method. Without the marker, such
work would be repeated: after the error that reports it, and silently after a crash in between.

If the answer to a commit is lost, the record decides. A renewal skips a locked row. So when a renewal is done, the
transaction has ended, and the record either has the recovery point or never will.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

from retryproof.core.codec import Codec
from retryproof.core.commands import Done, Found, Look, Lost, Pause
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.flow import FIRST_BACKOFF, LAST_BACKOFF
from retryproof.core.hold import Hold
from retryproof.core.record import State
from retryproof.drive import apump, clock, pump
from retryproof.joined import Joined
from retryproof.joined.transaction import ANOTHER, Ask, Steps, Transaction
from retryproof.recovery import PLAIN, lease_lost
from retryproof.sql.callers import missing_table
from retryproof.sql.worklist import WorklistEntry

T = TypeVar("T")
logger = logging.getLogger("retryproof")


class Listing(Protocol):
    """A phased operation's row of the completer's worklist."""

    @property
    def connect(self) -> Callable[[], Any] | None:
        """Makes the connection of a phase that has none of its own."""

    def entry(self, hold: Hold) -> WorklistEntry | None:
        """The row that the next recovery point must write too, if any."""

    def was_listed(self, hold: Hold) -> None:
        """The row exists now."""


class PhaseBlock:
    """The result of `operation.phase`; see `operation.Phase`."""

    def __init__(
        self,
        joined: Joined,
        name: str,
        given: Any,
        codec: Codec | None,
        listing: Listing | None,
    ) -> None:
        self.name = name
        self.pending = False
        self.result: Any = None
        self._joined = joined
        self._recovery = joined.recovery
        self._given = given
        self._codec = codec or PLAIN
        self._listing = listing
        self._transaction: Transaction | None = None

    @property
    def connection(self) -> Any:
        """See Phase."""
        if self._transaction is None:
            raise ConfigurationError(
                f"The phase {self.name!r} is not open: it is done already (ask `phase.pending` before working in it), "
                "or its block was left.",
                digest=self._recovery.digest,
            )
        return self._transaction.connection

    def run(self, fn: Callable[[Any], T]) -> T:
        """See Phase."""
        with self:
            if self.pending:
                self.result = fn(self.connection)
        result: T = self.result
        return result

    async def arun(self, fn: Callable[[Any], Awaitable[T]]) -> T:
        """See Phase."""
        async with self:
            if self.pending:
                self.result = await fn(self.connection)
        result: T = self.result
        return result

    def __enter__(self) -> Self:
        self._joined.asking.check_blocking()
        if self._begin():
            transaction = self._joined.new(self._given, on_loop=False)
            pump(self._enter(transaction), transaction.perform)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        transaction = self._transaction
        if transaction is not None:
            pump(self._leave(transaction, error), transaction.perform)

    async def __aenter__(self) -> Self:
        self._joined.asking.check_awaited()
        if self._begin():
            transaction = self._joined.new(self._given, on_loop=True)
            await apump(self._enter(transaction), transaction.perform)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        transaction = self._transaction
        if transaction is not None:
            await _together(apump(self._leave(transaction, error), transaction.perform))

    def _begin(self) -> bool:
        """Return whether the phase has to be done; its name is used from now on."""
        joined, recovery = self._joined, self._recovery
        joined.refuse_phase(self.name)
        known, self.result = recovery.begin(self.name, self._codec)
        if not known:
            try:
                joined.begin_phase(self.name)
            except ConfigurationError:  # another thread was quicker
                recovery.forget(self.name)
                raise
        self.pending = not known
        return self.pending

    def _enter(self, transaction: Transaction) -> Steps[None]:
        """Join the phase's transaction."""
        try:
            if clock() >= self._recovery.hold.deadline:
                self._recovery.check_revivable(self.name)
            if transaction.given is None:
                transaction.given = self._connected()
            yield from transaction.enter()
        except BaseException:
            self._joined.phase = None
            self._recovery.forget(self.name)
            raise
        self._transaction = self._joined.part = transaction

    def _connected(self) -> Any:
        if self._listing is None or self._listing.connect is None:
            raise ConfigurationError(
                f"The phase {self.name!r} has no connection: pass one, `operation.phase({self.name!r}, connection)`, "
                "or register the function with Phased(engine, connect=…).",
                digest=self._recovery.digest,
            )
        return self._listing.connect()

    def _leave(self, transaction: Transaction, error: BaseException | None) -> Steps[None]:
        """The steps at the end: commit the phase, or roll it back because its block raised."""
        self._transaction = self._joined.part = None
        try:
            broken = transaction.broken()
            last = transaction.roll_back() if error is not None else self._commit(transaction, broken)
            yield from transaction.leave(last)
        finally:
            self._joined.phase = None

    def _commit(self, transaction: Transaction, broken: str | None) -> Steps[None]:
        """Commit the work with its recovery point, or roll it back and raise.

        broken: why the transaction cannot be used any more.
        """
        recovery, hold, listing = self._recovery, self._recovery.hold, self._listing
        try:
            data, seen = recovery.encoded(self._codec, self.result)
            entry = None if listing is None else listing.entry(hold)
        except Exception:
            yield from transaction.roll_back()
            raise
        if broken is not None:
            yield from transaction.roll_back()
            yield from self._raise_why_lost(transaction, broken)
        try:
            renewed_at = None if hold.may_begin(clock()) else (yield from self._renewed(transaction))
            command = hold.checkpoint(self.name, data)
            reply = yield from transaction.fence.worklist.checkpoint(command, entry, hold.lease)
        except Exception as error:
            yield from transaction.roll_back()
            if missing_table(error):
                raise ConfigurationError(
                    "The database has no worklist for the completer: run `retryproof migrate`.",
                    digest=recovery.digest,
                ) from error
            raise
        if isinstance(reply, Lost):
            yield from transaction.roll_back()
        if not isinstance(reply, Done):  # None: the transaction is somebody else's, and left alone
            yield from self._raise_why_lost(transaction, ANOTHER)
        try:
            transaction.let_go()
            yield "commit"
        except Exception as error:  # noqa: BLE001  # whatever the driver raises; the record says what it means
            yield from transaction.roll_back()
            yield from self._doubted(transaction, error)
        else:
            if renewed_at is not None:
                hold.renewed(renewed_at)
        recovery.kept(self.name, data)
        if entry is not None and listing is not None:
            listing.was_listed(hold)
        self.pending = False
        self.result = seen

    def _renewed(self, transaction: Transaction) -> Steps[float | None]:
        """Renew a lease that is over by our own count (C6), or raise; return the time to count from after the commit.

        If the caller's transaction may hold the record, as always on SQLite, the renewal is part of it: nobody else
        could write it.
        """
        hold = self._recovery.hold
        if hold.lost:
            raise lease_lost(hold)
        sent = clock()
        if sent < hold.deadline or sent >= hold.stops:  # past max_run it stands for as long as nobody takes over
            return None
        reply: object
        if transaction.held:
            [reply] = yield from transaction.fence.plans.renew([hold.renew()])
        else:
            reply = yield Ask(hold.renew())
        if isinstance(reply, Done):
            return sent
        if isinstance(reply, Lost):
            hold.lose()
            raise lease_lost(hold)
        raise StoreUnavailable(
            "The lease had run out and could not be renewed, so the phase was rolled back.",
            digest=self._recovery.digest,
        ) from getattr(reply, "error", None)

    def _raise_why_lost(self, transaction: Transaction, reason: str) -> Steps[NoReturn]:
        hold = self._recovery.hold
        found = yield Ask(Look(hold.id))
        if transaction.ours(found, State.IN_PROGRESS) and found.record.committed:
            raise transaction.committed_alone()
        if transaction.ours(found, State.IN_PROGRESS) or not isinstance(found, Found):
            raise ConfigurationError(
                f"The transaction of the phase {self.name!r} was ended inside of it ({reason}): its work was not "
                "committed with it, and there is no recovery point. Leave it open: it is committed at the end of the "
                "block.",
                digest=self._recovery.digest,
            )
        hold.lose()
        raise lease_lost(hold)

    def _doubted(self, transaction: Transaction, error: Exception) -> Steps[None]:
        """The commit failed, or only its answer did: raise, unless the record has the recovery point."""
        hold, began, delay = self._recovery.hold, clock(), FIRST_BACKOFF
        while True:
            reply = yield Ask(hold.renew())
            if isinstance(reply, Lost):
                hold.lose()
                raise lease_lost(hold)
            if isinstance(reply, Done):
                found = yield Ask(Look(hold.id))
                if transaction.ours(found, State.IN_PROGRESS):
                    if self.name in found.record.checkpoints:
                        return
                    raise error
                if isinstance(found, Found):
                    hold.lose()
                    raise lease_lost(hold)
            if clock() - began + delay > self._recovery.policy.complete_timeout:
                break
            yield Pause(delay)
            delay = min(2 * delay, LAST_BACKOFF)
        raise StoreUnavailable(
            f"Whether the phase {self.name!r} was committed is not known yet: the answer to its commit was lost, and "
            "the database gives no other. A later attempt finds out; ask again with the same key.",
            digest=self._recovery.digest,
            retry_after=hold.lease,
        ) from error


async def _together(work: Coroutine[Any, Any, None]) -> None:
    """Run to completion despite a cancellation, so that work and recovery point stay together; then raise it."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    over: asyncio.Future[None] = loop.create_future()  # as asyncio.shield does, with half of its callbacks

    def end(_: object) -> None:
        if not over.done():
            over.set_result(None)

    task.add_done_callback(end)
    try:
        await over
    except asyncio.CancelledError:
        _going_on.add(task)
        task.add_done_callback(_going_on.discard)
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            logger.warning("A phase that was cancelled while it was committed failed: %s", task.exception())
        raise
    await task  # which has ended, and raises what it raised


_going_on: set[asyncio.Task[None]] = set()
"""Tasks that the loop must not lose."""
