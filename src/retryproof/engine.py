"""Engines: a store, a policy, a codec and listeners, behind one call that runs a function once.

`run` is what people call: a key and a function in, an `Outcome` out, or an error that says what to do. Adapters build
on `flow`, `listen` and `conclude`, with the pumps of `drive`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Any, Generic, Self, TypeVar, overload

from retryproof.conclusions import error_of, event_of, kind_of
from retryproof.core import errors
from retryproof.core.codec import Codec, JsonCodec, Unencodable, decode_value, encode_and_replay
from retryproof.core.commands import Cancelled, Claim, LeaseLost, Pause, Paused, Raised, Reply, Returned, Run
from retryproof.core.failure import outcome_of
from retryproof.core.fingerprint import Method, seal
from retryproof.core.flow import Busy, Completed, Conclusion, Down, Flow, Replayed, attempt
from retryproof.core.hold import Hold
from retryproof.core.keys import REMEMBERED, check_key, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.drive import abegin, afinish, arenew, clock, drive
from retryproof.observe.events import Event, Kind, Listener, recorded_trace, tell, tracing, wanted
from retryproof.observe.logging import log_event
from retryproof.operation import ENDED, EPOCH, BlockingOperation, LoopOperation, Settled, asettle, enter, leave, settle
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.opened import AsyncOpened, AsyncView, Opened, Source

T = TypeVar("T")
Scope = str | Sequence[str]
Refingerprint = Callable[[bytes], bytes | None]

logger = logging.getLogger("retryproof")


class Outcome(Generic[T]):
    """A function's value, and how it came about.

    replayed: the value was stored by an earlier call. attempt: which attempt made it.
    """

    __slots__ = ("_first_seen", "attempt", "replayed", "value")

    def __init__(self, value: T, replayed: bool, attempt: int, first_seen: int) -> None:
        self.value = value
        self.replayed = replayed
        self.attempt = attempt
        self._first_seen = first_seen

    @property
    def first_seen(self) -> datetime:
        """When the operation was first claimed, by the store's clock, in UTC."""
        return EPOCH + timedelta(microseconds=self._first_seen)

    def __repr__(self) -> str:
        return f"Outcome(value={self.value!r}, replayed={self.replayed}, attempt={self.attempt})"


def unknown_algorithm(stored: bytes) -> bytes | None:
    """The input's fingerprint by another algorithm: not known."""
    return None


class Engine:
    """What the engines of both colours have in common, and what adapters build on."""

    def __init__(
        self,
        store: str | Store | AsyncStore,
        *,
        policy: Policy | None = None,
        codec: Codec | None = None,
        events: Sequence[Listener] = (log_event,),
        pepper: bytes = b"",
    ) -> None:
        self.policy = Policy() if policy is None else policy
        if not isinstance(self.policy, Policy):
            raise errors.ConfigurationError(f"policy={policy!r} is no Policy.")
        self._codec = JsonCodec() if codec is None else codec
        self._source = Source(store, self.policy.store_timeout, self.policy.max_unstored)
        self._events = tuple(events)
        self._traces = tracing(self._events)
        self._pepper = pepper
        self._waiters = 0
        self._counting = threading.Lock()
        _say_what_rerun_means(self.policy)

    def id_of(self, scope: Scope, key: str) -> bytes:
        """The record's id of a key in a scope."""
        parts = (scope,) if isinstance(scope, str) else scope
        return record_id(parts, key, pepper=self._pepper)

    def tell(self, event: Event) -> None:
        """Tell the listeners."""
        tell(self._events, event)

    def flow(
        self,
        opened: Opened | AsyncOpened | AsyncView,
        id: bytes,
        fingerprint: bytes,
        policy: Policy,
        tenant: bytes = b"",
        trace: str = "",
        refingerprint: Refingerprint = unknown_algorithm,
        *,
        beside: bool = False,
    ) -> Flow:
        """An attempt at an operation, to be pumped; its end is told by `opened.background.leave()`.

        beside: others that were taken over run side by side with it, so that its death would not count (C15).
        """
        alone = opened.background.enter()
        claim = Claim(  # in the order of its fields: by name it takes twice as long
            id,
            fingerprint,
            os.urandom(16),
            policy.lease,
            policy.retention,
            policy.unsettled_retention,
            policy.on_abandoned,
            policy.max_attempts,
            tenant,
            trace if self._traces is None else recorded_trace(self._traces, trace),
            0 if beside else alone,
        )
        return attempt(claim, policy, clock(), refingerprint)

    def listen(self, hold: Hold, where: str) -> None:
        """Hear from the keeper what becomes of a hold."""
        hold.where = where
        hold.on_overrun = self._overran
        hold.on_settled = self._settled_late

    def conclude(self, conclusion: Conclusion, id: bytes, where: str, began: float) -> None:
        """Tell the listeners how an attempt ended that began at this time of the monotonic clock."""
        kind = kind_of(conclusion)
        if wanted(self._events, kind):
            self.tell(event_of(conclusion, kind, short_digest(id), where, clock() - began))

    def _overran(self, hold: Hold) -> None:
        self.tell(_event_of_hold(Kind.OVERRUN, hold))

    def _settled_late(self, hold: Hold, stored: bool) -> None:
        self.tell(_event_of_hold(Kind.STORED_LATE if stored else Kind.NEVER_STORED, hold))


def _event_of_hold(kind: Kind, hold: Hold) -> Event:
    digest = short_digest(hold.id)
    return Event(kind=kind, digest=digest, where=hold.where, attempt=hold.attempt, trace=hold.trace)


def _limit(policy: Policy, opened: Opened | AsyncOpened | AsyncView) -> int:
    own = opened.capabilities.max_result
    return policy.max_result if own is None else min(policy.max_result, own)


def _seal(fingerprint: bytes) -> bytes:
    return (_sealed if len(fingerprint) <= REMEMBERED else _sealed.__wrapped__)(fingerprint)


@lru_cache(maxsize=256)
def _sealed(fingerprint: bytes) -> bytes:
    return seal(Method.CUSTOM, sha256(fingerprint).digest())


class Idempotency(Engine):
    """Runs functions once, in threads.

    store: a URL, which is opened at the first call and closed by `close`, or a store, which belongs to its caller.
    codec: how results are kept; JSON by default. events: listeners; the log by default.
    pepper: a secret mixed into every record's id, the same in every process that shares the store.
    """

    def run(
        self,
        key: str,
        fn: Callable[[], T],
        *,
        scope: Scope,
        fingerprint: bytes = b"",
        policy: Policy | None = None,
        codec: Codec | None = None,
    ) -> Outcome[T]:
        """Run `fn` unless the operation is done; its value, fresh or replayed.

        scope: what the key is unique in: a name, or parts from the tenant down. fingerprint: of the input; a key that
        comes back with another raises Mismatch.
        Raises InProgress, Mismatch, OutcomeUnknown, LeaseLost, StoreUnavailable, ResultOmitted, InvalidKey, Unreadable,
        and what `fn` raises, after which it may run again.
        """
        if inspect.iscoroutinefunction(fn):
            raise errors.ConfigurationError("Idempotency runs plain functions; use AsyncIdempotency for a coroutine.")
        id = self.id_of(scope, check_key(key))
        return self.run_record(
            id,
            fn,
            where=_name(scope),
            fingerprint=_seal(fingerprint),
            tenant=_tenant(scope, self._pepper),
            policy=policy,
            codec=codec,
        )

    def run_record(
        self,
        id: bytes,
        fn: Callable[[], T],
        *,
        where: str,
        fingerprint: bytes,
        tenant: bytes,
        policy: Policy | None = None,
        codec: Codec | None = None,
        beside: bool = False,
    ) -> Outcome[T]:
        """`run` for a record whose id is known, and its fingerprint as it is stored. beside: as for `flow`."""
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.opened()
        work = _Work(codec, _limit(policy, opened), policy.unknown_on)

        def run_fn(hold: Hold) -> Reply:
            self.listen(hold, where)
            operation = BlockingOperation(hold, opened, policy)
            token = enter(operation)
            try:
                value = fn()
                if inspect.iscoroutine(value):
                    value.close()
                    raise errors.ConfigurationError("The function returned a coroutine; use AsyncIdempotency.")
            except BaseException as error:  # noqa: BLE001  # raised again once the record says what it means
                return work.settled(settle(operation, work.failed(error)))
            finally:
                leave(token)
            return work.settled(settle(operation, work.returned(value)))

        began = clock()
        flow = self.flow(opened, id, fingerprint, policy, tenant, beside=beside)
        try:
            conclusion = drive(flow, opened, policy.store_timeout, run_fn, lambda pause: self._pause(pause, policy))
        finally:
            opened.background.leave()
        self.conclude(conclusion, id, where, began)
        return work.outcome(conclusion, id)

    def _pause(self, pause: Pause, policy: Policy) -> Paused:
        if not pause.waiting:
            time.sleep(pause.seconds)
            return Paused()
        with self._counting:
            if self._waiters >= policy.max_waiters:
                return Paused(on=False)
            self._waiters += 1
        try:
            time.sleep(pause.seconds)
        finally:
            with self._counting:
                self._waiters -= 1
        return Paused()

    def opened(self) -> Opened:
        """The opened store of this process; opens it at the first call."""
        return self._source.opened()

    def close(self, drain: float = 5.0) -> None:
        """Wait for what runs and lingers, for up to `drain` seconds, and close a store that was opened from a URL."""
        self._source.close(drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncIdempotency(Engine):
    """Runs functions once, in the tasks of event loops. The arguments are those of Idempotency."""

    @overload
    async def run(
        self,
        key: str,
        fn: Callable[[], Awaitable[T]],
        *,
        scope: Scope,
        fingerprint: bytes = b"",
        policy: Policy | None = None,
        codec: Codec | None = None,
    ) -> Outcome[T]: ...

    @overload
    async def run(
        self,
        key: str,
        fn: Callable[[], T],
        *,
        scope: Scope,
        fingerprint: bytes = b"",
        policy: Policy | None = None,
        codec: Codec | None = None,
    ) -> Outcome[T]: ...

    async def run(
        self,
        key: str,
        fn: Callable[[], Any],
        *,
        scope: Scope,
        fingerprint: bytes = b"",
        policy: Policy | None = None,
        codec: Codec | None = None,
    ) -> Outcome[Any]:
        """`Idempotency.run`, awaited; `fn` may be a plain function or a coroutine function.

        Cancelled while `fn` runs, it cancels `fn`, and the record stays in progress unless the policy says
        `release_on_cancel`. Cancelled while the result is being stored, it first stores it.
        """
        id = self.id_of(scope, check_key(key))
        return await self.run_record(
            id,
            fn,
            where=_name(scope),
            fingerprint=_seal(fingerprint),
            tenant=_tenant(scope, self._pepper),
            policy=policy,
            codec=codec,
        )

    async def run_record(
        self,
        id: bytes,
        fn: Callable[[], Any],
        *,
        where: str,
        fingerprint: bytes,
        tenant: bytes,
        policy: Policy | None = None,
        codec: Codec | None = None,
        beside: bool = False,
    ) -> Outcome[Any]:
        """`run` for a record whose id is known, and its fingerprint as it is stored. beside: as for `flow`."""
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.aopened()
        work = _LoopWork(codec, _limit(policy, opened), policy.unknown_on)
        began = clock()
        flow = self.flow(opened, id, fingerprint, policy, tenant, beside=beside)
        try:
            step = await abegin(flow, opened, policy.store_timeout, lambda pause: self.pause(pause, policy))
            if isinstance(step, Run):
                self.listen(step.hold, where)
                step = await work.carry_out(flow, step.hold, fn, opened, policy)
        finally:
            opened.background.leave()
        self.conclude(step, id, where, began)
        return work.outcome(step, id)

    async def pause(
        self, command: Pause, policy: Policy, sleep: Callable[[float], Awaitable[bool]] | None = None
    ) -> Paused:
        """Wait, if there is room for another waiter; `sleep` is how, and says False when the caller has left."""
        if not command.waiting:
            await asyncio.sleep(command.seconds)
            return Paused()
        if self._waiters >= policy.max_waiters:
            return Paused(on=False)
        self._waiters += 1
        try:
            if sleep is not None:
                return Paused(on=await sleep(command.seconds))
            await asyncio.sleep(command.seconds)
            return Paused()
        finally:
            self._waiters -= 1

    def opened(self) -> AsyncOpened | AsyncView:
        """The opened store for the running event loop; opens it at the first call."""
        return self._source.aopened()

    async def aclose(self, drain: float = 5.0) -> None:
        """Wait for what runs and lingers, for up to `drain` seconds, and close a store that was opened from a URL."""
        await self._source.aclose(drain)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class _Work:
    """What a function's run came to: its value as every caller is to see it, or what it raised."""

    __slots__ = ("_codec", "_error", "_limit", "_unknown_on", "_value")

    def __init__(self, codec: Codec, limit: int, unknown_on: tuple[type[BaseException], ...]) -> None:
        self._codec = codec
        self._limit = limit
        self._unknown_on = unknown_on
        self._value: Any = None
        self._error: BaseException | None = None

    def returned(self, value: Any) -> Returned:
        """A result as it is stored, and as every caller is to see it (C16).

        One that cannot be encoded or is over the limit becomes a tombstone, and its caller gets the real value (C17).
        """
        self._value = value
        try:
            data, seen = encode_and_replay(self._codec, value)
        except Unencodable as error:
            logger.warning("A result could not be encoded and is not kept: %s", error)
            return Returned(None)
        if len(data) > self._limit:
            logger.warning("A result of %d bytes is over the limit of %d and is not kept.", len(data), self._limit)
            return Returned(None)
        self._value = seen
        return Returned(data)

    def failed(self, error: BaseException) -> Raised | Cancelled:
        """What an exception means for the record (C5)."""
        self._error = error
        return outcome_of(error, self._unknown_on)

    def settled(self, settled: Settled) -> Reply:
        """What came of the work after its transaction; the error of that is what the caller is raised."""
        outcome, error = settled
        if error is not None:
            self._error = error
        return outcome

    def outcome(self, conclusion: Conclusion, id: bytes) -> Outcome[Any]:
        """What the caller gets; raises what the function raised, or the error that the conclusion is."""
        error = self._error
        if error is not None and not (isinstance(error, Exception) and _is_overtaken(conclusion)):
            raise error
        if isinstance(conclusion, Completed):
            hold = conclusion.hold
            return Outcome(self._value, False, hold.attempt, hold.first_seen)
        if not isinstance(conclusion, Replayed):
            raise error_of(conclusion, short_digest(id)) from error
        finished = conclusion.finished
        if finished.result is None:
            raise errors.ResultOmitted(
                "The operation is done and its result was not kept: it was too large, or could not be encoded. "
                "It will not run again; read its effect where it was written.",
                digest=short_digest(id),
            )
        return Outcome(decode_value(self._codec, finished.result), True, finished.attempt, finished.first_seen)


def _is_overtaken(conclusion: Conclusion) -> bool:
    """Whether another attempt took over: then its result counts, whatever this one came to (C8)."""
    return isinstance(conclusion, Replayed | Busy | Down) and conclusion.overtaken


class _LoopWork(_Work):
    """The run of a function that an event loop runs, and what it came to."""

    __slots__ = ("_rest",)

    def __init__(self, codec: Codec, limit: int, unknown_on: tuple[type[BaseException], ...]) -> None:
        super().__init__(codec, limit, unknown_on)
        self._rest: asyncio.Task[Conclusion] | None = None

    async def carry_out(
        self, flow: Flow, hold: Hold, fn: Callable[[], Any], opened: AsyncOpened | AsyncView, policy: Policy
    ) -> Conclusion:
        """Run the function under its hold, and settle what it came to.

        A cancellation that arrives while it is being settled cannot lose its result: the rest of the flow goes on in a
        task of its own, is waited for, and only then the cancellation goes on. A second one does not wait.
        """
        operation = LoopOperation(hold, opened, policy, opened.loop)
        opened.background.watch(hold)
        if not hold.may_begin(clock()):
            conclusion = await arenew(flow, hold, opened, policy.store_timeout)
            if conclusion is not None:
                return conclusion
        overtaking = _Overtaking(hold, opened.loop) if policy.on_lease_lost == "cancel" else None
        try:
            outcome = await self._run(fn, operation, overtaking)
            reply = self.settled(await asettle(operation, outcome)) if operation.joined else operation.said(outcome)
        except BaseException:
            opened.background.unwatch(hold)
            raise
        try:
            return await afinish(flow, reply, hold, opened, policy.store_timeout, self._adopt)
        except asyncio.CancelledError:
            if self._rest is not None:
                await asyncio.wait({self._rest})
            raise

    async def _run(
        self, fn: Callable[[], Any], operation: LoopOperation, overtaking: _Overtaking | None
    ) -> Returned | Raised | Cancelled | LeaseLost:
        """Run the function: what came of it. What is raised here is none of its own, and leaves its outcome unknown."""
        token = enter(operation)
        try:
            value: Any = fn()
            if inspect.isawaitable(value):
                value = await value
        except BaseException as error:  # noqa: BLE001  # raised again once the record says what it means
            lost = overtaking is not None and overtaking.caused(error)
            return LeaseLost() if lost else self.failed(error)
        else:
            return self.returned(value)
        finally:
            operation.refuses_transactions = ENDED
            if overtaking is not None:
                overtaking.end()
            with contextlib.suppress(ValueError):  # whoever closes this in another context has nothing to leave
                leave(token)

    def _adopt(self, rest: asyncio.Task[Conclusion]) -> None:
        self._rest = rest


class _Overtaking:
    """Cancels the task that runs a function when its lease is lost (C8), and tells that cancellation from others."""

    __slots__ = ("_active", "_hold", "_loop", "_others", "_ours", "_task")

    def __init__(self, hold: Hold, loop: asyncio.AbstractEventLoop) -> None:
        self._hold = hold
        self._loop = loop
        self._task = asyncio.current_task(loop)
        self._others = 0 if self._task is None else self._task.cancelling()  # cancellations of others, before
        self._active = True
        self._ours = False
        hold.on_lost = self._lost
        if hold.lost:  # told meanwhile, in the keeper's thread
            self._lost()

    def end(self) -> None:
        """The function has ended; once or more."""
        active, self._active = self._active, False
        self._hold.on_lost = None
        if active and self._ours and self._task is not None:
            self._task.uncancel()

    def caused(self, error: BaseException) -> bool:
        """End, and say whether that is the cancellation that we made, and nobody else cancelled the task as well."""
        self.end()
        alone = self._task is None or self._task.cancelling() == self._others
        return self._ours and alone and isinstance(error, asyncio.CancelledError)

    def _lost(self) -> None:
        """Called from the keeper's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the task has ended with it
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._active and not self._ours and self._task is not None:
            self._ours = True
            self._task.cancel("the lease was lost")


def tenant_of(scope: Scope, engine: Engine) -> bytes:
    """The digest of a scope's tenant, or none."""
    return _tenant(scope, engine._pepper)


def sealed_fingerprint(fingerprint: bytes) -> bytes:
    """The fingerprint of an input as it is stored."""
    return _seal(fingerprint)


def _name(scope: Scope) -> str:
    return scope if isinstance(scope, str) else (scope[-1] if scope else "")


def _tenant(scope: Scope, pepper: bytes) -> bytes:
    """A scope of several parts starts with the tenant."""
    return b"" if isinstance(scope, str) or len(scope) < 2 else tenant_digest(scope[0], pepper=pepper)


_said: set[str] = set()


def _say_what_rerun_means(policy: Policy) -> None:
    """Once in a process: what `rerun` repeats (C7)."""
    if policy.on_abandoned == "rerun" and "rerun" not in _said:
        _said.add("rerun")
        logger.info(
            "on_abandoned='rerun': when an attempt dies, the next one repeats what it did, except what is covered by "
            "the caller's transaction, phases, steps or derived keys; 'refuse' leaves it to an operator."
        )
