"""Phases: local work that commits together with its recovery point (T3).

    async with operation.phase("create_order", pool.acquire()) as phase:
        if phase.pending:                                   # not done by an earlier attempt
            await phase.connection.execute("INSERT …")
            phase.result = order_id
    order_id = phase.result

    order_id = await operation.phase("create_order", pool.acquire()).arun(create_order)    # the same, as a call

Theory. A phase is a transaction that also writes its name and result into the operation's record, fenced: the
statement waits for the record's row, compares token and nonce under its lock, and keeps the lock until the commit that
follows at once. So the work and its recovery point are there together or not at all, no later attempt repeats a phase
that was committed, and a holder that another attempt took over cannot commit one. Until then the transaction holds no
lock that the store needs, however long the phase takes: its own lease and everybody else's are renewed as ever.

A `with` block cannot be skipped, so a phase that is done says so (`pending` is False), has its result, and gives no
connection to work with.

A commit whose answer is lost is settled by the record: a renewal passes over a locked row, so once it is done the
transaction has ended, and the record either has the recovery point or never will.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from retryproof.clock import wall_clock
from retryproof.core.codec import Codec, JsonCodec
from retryproof.core.commands import Checkpoint, Done, FenceReply, Found, Look, Lost, Pause
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.flow import FIRST_BACKOFF, LAST_BACKOFF
from retryproof.core.keys import short_digest
from retryproof.core.record import State
from retryproof.drive import clock
from retryproof.operation import Operation, lease_lost
from retryproof.sql.callers import missing_table
from retryproof.sql.dialects import DIALECTS
from retryproof.sql.plan import Plan
from retryproof.sql.postgres import records as postgres
from retryproof.sql.sqlite import records as sqlite_plans
from retryproof.sql.worklist import Entry
from retryproof.transaction.joined import (
    ANOTHER,
    Ask,
    BlockingTransaction,
    Do,
    LoopTransaction,
    Place,
    Steps,
    ajoin,
    committed_alone,
    join,
    roll_back,
)

T = TypeVar("T")
logger = logging.getLogger("retryproof")
_PLAIN = JsonCodec()


class PhaseBlock:
    """What `operation.phase` gives; see `operation.Phase`."""

    def __init__(self, operation: Operation, name: str, given: Any, codec: Codec | None) -> None:
        self.name = name
        self.pending = False
        self.result: Any = None
        self._operation = operation
        self._given = given
        self._codec = codec or _PLAIN
        self._joined: Any = None

    @property
    def connection(self) -> Any:
        """See Phase."""
        if self._joined is None:
            raise ConfigurationError(
                f"The phase {self.name!r} is not open: it is done already (ask `phase.pending` before working in it), "
                "or its block was left.",
                digest=self._operation.key_digest,
            )
        return self._joined.connection

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
        self._operation._check_step()
        if self._begin():
            with self._unused_on_error():
                if clock() >= self._operation._hold.deadline:
                    self._operation.check_revivable(self.name)
                self._joined = join(self._operation, self._connecting(), self._operation._ask)
            self._operation._phase_holds = self._joined.place.held
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._joined is None:
            return
        joined: BlockingTransaction = self._end()
        with contextlib.ExitStack() as stack:
            if joined.block is not None:
                stack.push(joined.block)
            broken = joined.broken()
            steps = roll_back() if error is not None else self._committing(joined.place, broken)
            try:
                joined.pump(steps, self._operation._ask)
            finally:
                joined.let_go()

    async def __aenter__(self) -> Self:
        self._operation._check_astep()
        if self._begin():
            with self._unused_on_error():
                if clock() >= self._operation._hold.deadline:
                    self._operation.check_revivable(self.name)
                self._joined = await ajoin(self._operation, self._connecting(), self._operation._aask)
            self._operation._phase_holds = self._joined.place.held
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._joined is None:
            return
        joined: LoopTransaction = self._end()
        broken = joined.broken()
        steps = roll_back() if error is not None else self._committing(joined.place, broken)
        await _together(self._leave(joined, steps))

    async def _leave(self, joined: LoopTransaction, steps: Steps[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if joined.block is not None:
                stack.push_async_exit(joined.block)
            try:
                await joined.pump(steps, self._operation._aask)
            finally:
                joined.let_go()

    def _end(self) -> Any:
        joined, self._joined = self._joined, None
        self._operation._phase = None
        self._operation._phase_holds = False
        return joined

    def _begin(self) -> bool:
        """Whether there is something to do; the name is used from now on."""
        operation = self._operation
        if operation._phase is not None or operation._joined is not None:
            raise ConfigurationError(
                f"The phase {self.name!r} is inside of {operation._phase or 'the transaction of the operation'}; each "
                "phase is a transaction of its own.",
                digest=operation.key_digest,
            )
        known, self.result = operation._begin_step(self.name, self._codec)
        self.pending = not known
        if self.pending:
            operation._phase = f"the phase {self.name!r}"
        return self.pending

    @contextlib.contextmanager
    def _unused_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._operation._phase = None
            self._operation._forget_name(self.name)
            raise

    def _connecting(self) -> Any:
        if self._given is not None:
            return self._given
        phased = self._operation._phased
        if phased is None or phased.connect is None:
            raise ConfigurationError(
                f"The phase {self.name!r} has no connection: pass one, `operation.phase({self.name!r}, connection)`, "
                "or register the function with Phased(engine, connect=…).",
                digest=self._operation.key_digest,
            )
        return phased.connect()

    def _committing(self, place: Place, broken: str | None) -> Steps[None]:
        operation, hold = self._operation, self._operation._hold
        try:
            data, seen = operation.encoded(self._codec, self.result)
            entry = None if operation._phased is None else operation._phased.entry(hold)
        except Exception:
            yield from roll_back()
            raise
        yield from committing(place, hold.checkpoint(self.name, data), entry, broken)
        hold.checkpoints = {**hold.checkpoints, self.name: data}
        if entry is not None:
            operation._phased.was_listed(hold)
        self.pending = False
        self.result = seen


# What is done, as steps


def committing(place: Place, command: Checkpoint, entry: Entry | None, broken: str | None) -> Steps[None]:
    """Commit the work with its recovery point, or roll it back and raise.

    entry: lists the operation for the completer. broken: why the transaction is of no use any more.
    """
    hold = place.hold
    if broken is not None:
        yield from roll_back()
        yield from _raise_why_lost(place, command.name, broken)
    try:
        renewed_at = yield from _renewed(place)
        reply = yield from _checkpoint(place, command, entry)
    except Exception as error:
        yield from roll_back()
        if missing_table(error):
            raise ConfigurationError(
                "The database has no worklist for the completer: run `retryproof migrate`.",
                digest=short_digest(hold.id),
            ) from error
        raise
    if isinstance(reply, Lost):
        yield from roll_back()
    if not isinstance(reply, Done):  # None: the transaction is somebody else's, and left alone
        yield from _raise_why_lost(place, command.name, ANOTHER)
    try:
        yield Do.COMMIT
    except Exception as error:  # noqa: BLE001  # whatever the driver raises; the record says what it means
        yield from roll_back()
        yield from _doubted(place, command.name, error)
    else:
        if renewed_at is not None:
            place.hold.renewed(renewed_at)


def _checkpoint(place: Place, command: Checkpoint, entry: Entry | None) -> Plan[FenceReply | None]:
    return DIALECTS[place.dialect].worklist(place.table).checkpoint(command, entry, place.hold.lease)


def _renewed(place: Place) -> Steps[float | None]:
    """Renew a lease that has run out by our own count (C6), or raise; the time to count it from, once it is committed.

    Where the caller's transaction may hold the record, as on SQLite always, the renewal is part of it.
    """
    hold = place.hold
    if hold.lost:
        raise lease_lost(hold)
    sent = clock()
    if sent < hold.deadline or sent >= hold.stops:  # past max_run it stands for as long as nobody takes over
        return None
    reply: FenceReply | Exception
    if place.dialect == "sqlite":
        (reply,) = yield from sqlite_plans.renew([hold.renew()], wall_clock())
    elif place.held:  # from nowhere else could it be written
        (reply,) = yield from postgres.renew_plan([hold.renew()], place.table)
    else:
        reply = yield Ask(hold.renew())
    if isinstance(reply, Done):
        return sent
    if isinstance(reply, Lost):
        hold.lose()
        raise lease_lost(hold)
    raise StoreUnavailable(
        "The lease had run out and could not be renewed, so the phase was rolled back.", digest=short_digest(hold.id)
    ) from getattr(reply, "error", None)


def _raise_why_lost(place: Place, name: str, reason: str) -> Steps[None]:
    found = yield Ask(Look(place.hold.id))
    if place.ours(found, State.IN_PROGRESS):
        raise committed_alone(place) if found.record.committed else _ended(place, name, reason)
    if not isinstance(found, Found):
        raise _ended(place, name, reason)
    place.hold.lose()
    raise lease_lost(place.hold)


def _ended(place: Place, name: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"The transaction of the phase {name!r} was ended inside of it ({reason}): its work was not committed with it, "
        "and there is no recovery point. Leave it open: it is committed at the end of the block.",
        digest=short_digest(place.hold.id),
    )


def _doubted(place: Place, name: str, error: Exception) -> Steps[None]:
    """The commit failed, or only its answer did: raise, unless the record has the recovery point."""
    hold, began, delay = place.hold, clock(), FIRST_BACKOFF
    while True:
        reply = yield Ask(hold.renew())
        if isinstance(reply, Lost):
            hold.lose()
            raise lease_lost(hold)
        if isinstance(reply, Done):
            found = yield Ask(Look(hold.id))
            if place.ours(found, State.IN_PROGRESS):
                if name in found.record.checkpoints:
                    return
                raise error
            if isinstance(found, Found):
                hold.lose()
                raise lease_lost(hold)
        if clock() - began + delay > place.policy.complete_timeout:
            break
        yield Pause(delay)
        delay = min(2 * delay, LAST_BACKOFF)
    raise StoreUnavailable(
        f"Whether the phase {name!r} was committed is not known yet: the answer to its commit was lost, and the "
        "database gives no other. A later attempt finds out; ask again with the same key.",
        digest=short_digest(hold.id),
        retry_after=hold.lease,
    ) from error


# How it is done on the event loop


async def _together(work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end; a cancellation does not part the work from its recovery point, and goes on afterwards."""
    task = asyncio.get_running_loop().create_task(work)
    _going_on.add(task)
    task.add_done_callback(_going_on.discard)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            logger.warning("A phase that was cancelled while it was committed failed: %s", task.exception())
        raise


_going_on: set[asyncio.Task[None]] = set()
"""Tasks that the loop must not lose."""
