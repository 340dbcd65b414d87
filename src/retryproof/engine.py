"""Engines: a store, a policy, a codec and listeners, behind one call that runs a function once.

`attempt` is what adapters build on: an operation's id and fingerprint in, a conclusion out. `run` is what people call:
a key and a function in, an `Outcome` out, or an error that says what to do.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Generic, NoReturn, TypeVar, cast

from retryproof.core import errors
from retryproof.core.codec import Codec, JsonCodec, Unencodable, decode_value, encode_and_replay
from retryproof.core.commands import Cancelled, Claim, LeaseLost, Pause, Paused, Raised, Reply, Returned
from retryproof.core.fingerprint import Method, seal
from retryproof.core.flow import (
    Busy,
    Completed,
    Conclusion,
    Down,
    Failed,
    Foreign,
    Mismatched,
    Refused,
    Replayed,
    attempt,
)
from retryproof.core.hold import Hold
from retryproof.core.keys import check_key, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.drive import adrive, clock, drive
from retryproof.observe.events import Event, Kind, Listener, recorded_trace, tell, tracing
from retryproof.observe.logging import log_event
from retryproof.operation import EPOCH, blocking_operation, enter, lease_lost, leave, loop_operation
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.opened import AsyncOpened, AsyncView, Opened, Source

T = TypeVar("T")
Scope = str | Sequence[str]
Refingerprint = Callable[[bytes], bytes | None]

logger = logging.getLogger("retryproof")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """A function's value, and how it came about.

    replayed: the value was stored by an earlier call. attempt: which attempt made it. first_seen: when the operation
    was first claimed, by the store's clock.
    """

    value: T
    replayed: bool
    attempt: int
    first_seen: datetime


def unknown_algorithm(stored: bytes) -> bytes | None:
    """The input's fingerprint by another algorithm: not known."""
    return None


class _Engine:
    """What the engines of both colours have in common."""

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
        self._source = Source(store, self.policy.store_timeout)
        self._events = tuple(events)
        self._traces = tracing(self._events)
        self._pepper = pepper
        self._waiters = 0
        _say_what_rerun_means(self.policy)

    def id_of(self, scope: Scope, key: str) -> bytes:
        """The record's id of a key in a scope."""
        parts = (scope,) if isinstance(scope, str) else scope
        return record_id(parts, key, pepper=self._pepper)

    def tell(self, event: Event) -> None:
        """Tell the listeners."""
        tell(self._events, event)

    def _flow(
        self,
        opened: Opened | AsyncOpened | AsyncView,
        id: bytes,
        fingerprint: bytes,
        policy: Policy,
        tenant: bytes,
        trace: str,
        refingerprint: Refingerprint,
    ) -> Any:
        claim = Claim(
            id=id,
            fingerprint=fingerprint,
            nonce=os.urandom(16),
            lease=policy.lease,
            retention=policy.retention,
            unsettled_retention=policy.unsettled_retention,
            on_abandoned=policy.on_abandoned,
            max_attempts=policy.max_attempts,
            tenant=tenant,
            trace=trace if self._traces is None else recorded_trace(self._traces, trace),
            alone=opened.background.enter(),
        )
        return attempt(claim, policy, clock(), refingerprint)

    def _listen(self, hold: Hold, where: str) -> None:
        digest = short_digest(hold.id)

        def overrun() -> None:
            self.tell(Event(kind=Kind.OVERRUN, digest=digest, where=where, attempt=hold.attempt))

        def settled(stored: bool) -> None:
            kind = Kind.STORED_LATE if stored else Kind.NEVER_STORED
            self.tell(Event(kind=kind, digest=digest, where=where, attempt=hold.attempt))

        hold.on_overrun = overrun
        hold.on_settled = settled

    def _conclude(self, conclusion: Conclusion, id: bytes, where: str, began: float) -> None:
        if self._events:
            event = _event(conclusion, short_digest(id), where, clock() - began)
            self.tell(event)

    def _outcome(self, codec: Codec, conclusion: Completed | Replayed, value: Any) -> Outcome[Any]:
        match conclusion:
            case Completed(hold):
                return Outcome(value, False, hold.attempt, _instant(hold.first_seen))
            case Replayed(finished):
                if finished.result is None:
                    raise errors.ResultOmitted(
                        "The operation is done and its result was not kept: it was too large, or could not be encoded. "
                        "It will not run again; read its effect where it was written."
                    )
                value = decode_value(codec, finished.result)
                return Outcome(value, True, finished.attempt, _instant(finished.first_seen))


def _instant(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


def _encode(codec: Codec, value: Any, limit: int) -> tuple[Returned, Any]:
    """A result as it is stored, and as every caller is to see it (C16).

    One that cannot be encoded or is over the limit becomes a tombstone, and its caller gets the real value (C17).
    """
    try:
        data, seen = encode_and_replay(codec, value)
    except Unencodable as error:
        logger.warning("A result could not be encoded and is not kept: %s", error)
        return Returned(None), value
    return (Returned(data), seen) if len(data) <= limit else (Returned(None), value)


def _limit(policy: Policy, opened: Opened | AsyncOpened | AsyncView) -> int:
    own = opened.capabilities.max_result
    return policy.max_result if own is None else min(policy.max_result, own)


def _seal(fingerprint: bytes) -> bytes:
    return seal(Method.CUSTOM, sha256(fingerprint).digest())


def _event(conclusion: Conclusion, digest: str, where: str, seconds: float) -> Event:
    match conclusion:
        case Completed(hold, _, stored):
            kind = Kind.FRESH if stored else Kind.UNSTORED
            return Event(kind=kind, digest=digest, where=where, attempt=hold.attempt, seconds=seconds, trace=hold.trace)
        case Replayed(finished, overtaken):
            kind = Kind.LEASE_LOST if overtaken else Kind.REPLAYED
            return Event(
                kind=kind, digest=digest, where=where, attempt=finished.attempt, seconds=seconds, trace=finished.trace
            )
        case Busy(_, overtaken):
            kind = Kind.LEASE_LOST if overtaken else Kind.IN_PROGRESS
            return Event(kind=kind, digest=digest, where=where, seconds=seconds)
        case Failed(hold, released):
            kind = Kind.FAILED if released else Kind.UNKNOWN
            return Event(kind=kind, digest=digest, where=where, attempt=hold.attempt, seconds=seconds, trace=hold.trace)
        case Mismatched():
            return Event(kind=Kind.MISMATCH, digest=digest, where=where, seconds=seconds)
        case Refused(reason, number):
            return Event(kind=Kind.ABANDONED, digest=digest, where=where, attempt=number, seconds=seconds, note=reason)
        case Down(error, overtaken):
            note = "overtaken" if overtaken else ""
            return Event(kind=Kind.STORE_ERROR, digest=digest, where=where, seconds=seconds, error=error, note=note)
        case Foreign():
            return Event(kind=Kind.UNREADABLE, digest=digest, where=where, seconds=seconds)


def conclusion_error(conclusion: Conclusion, digest: str) -> errors.IdempotencyError:
    """The error that says what a conclusion without a result means, and what to do."""
    match conclusion:
        case Busy(left, True):
            return errors.LeaseLost(
                "Another attempt took this operation over and is not done yet; ask again for its result.",
                digest=digest,
                retry_after=left,
            )
        case Busy(left):
            return errors.InProgress(
                "The same operation is running elsewhere; try again with the same key.", digest=digest, retry_after=left
            )
        case Mismatched():
            return errors.Mismatch(
                "The key was used before with other input; use a new key for a new operation.", digest=digest
            )
        case Refused(reason, number):
            why = "too many attempts died" if reason == "poisoned" else "an attempt died"
            return errors.OutcomeUnknown(
                f"Whether this operation had its effect is unknown: {why} (attempt {number}). Find out, then settle it "
                "with `retryproof keys settle`.",
                digest=digest,
            )
        case Down(errors.ConfigurationError() as error):
            return error
        case Down(error):
            unavailable = errors.StoreUnavailable(
                f"{error.message if isinstance(error, errors.IdempotencyError) else error}",
                digest=digest,
                retry_after=1.0,
            )
            unavailable.__cause__ = error
            return unavailable
        case Foreign(fingerprint):
            return errors.Unreadable(
                f"The record's fingerprint was made by an algorithm ({fingerprint[:2].hex()}) that is not known here; "
                "it is neither run nor called a mismatch. Upgrade, or use the fingerprint option that made it.",
                digest=digest,
            )
        case _:
            raise TypeError(f"{conclusion!r} is no error")


def _raise(conclusion: Conclusion, id: bytes) -> NoReturn:
    raise conclusion_error(conclusion, short_digest(id))


class Idempotency(_Engine):
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
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.opened()
        limit = _limit(policy, opened)
        value: Any = None
        raised: BaseException | None = None

        def run_fn(hold: Hold) -> Reply:
            nonlocal value, raised
            self._listen(hold, _name(scope))
            token = enter(blocking_operation(hold, opened, policy.store_timeout, policy.complete_timeout))
            try:
                value = fn()
                if inspect.iscoroutine(value):
                    value.close()
                    raise errors.ConfigurationError("The function returned a coroutine; use AsyncIdempotency.")
            except BaseException as error:
                raised = error
                return failure(error)
            finally:
                leave(token)
            returned, value = _encode(codec, value, limit)
            return returned

        id = self.id_of(scope, check_key(key))
        conclusion = self.attempt(
            id,
            fingerprint=_seal(fingerprint),
            run=run_fn,
            policy=policy,
            tenant=_tenant(scope, self._pepper),
            where=_name(scope),
        )
        if raised is not None:
            raise raised
        if isinstance(conclusion, Completed | Replayed):
            return self._outcome(codec, conclusion, value)
        _raise(conclusion, id)

    def attempt(
        self,
        id: bytes,
        *,
        fingerprint: bytes,
        run: Callable[[Hold], Reply],
        policy: Policy,
        tenant: bytes = b"",
        trace: str = "",
        where: str = "",
        refingerprint: Refingerprint = unknown_algorithm,
    ) -> Conclusion:
        """One attempt at an operation, for adapters: `run` does the work and answers Returned, Raised or Cancelled."""
        opened = self._source.opened()
        began = clock()
        flow = self._flow(opened, id, fingerprint, policy, tenant, trace, refingerprint)
        try:
            conclusion: Conclusion = drive(
                flow, opened, policy.store_timeout, run, lambda pause: self._pause(pause, policy)
            )
        finally:
            opened.background.leave()
        self._conclude(conclusion, id, where, began)
        return conclusion

    def _pause(self, pause: Pause, policy: Policy) -> Paused:
        if not pause.waiting:
            time.sleep(pause.seconds)
            return Paused()
        if self._waiters >= policy.max_waiters:
            return Paused(on=False)
        self._waiters += 1
        try:
            time.sleep(pause.seconds)
        finally:
            self._waiters -= 1
        return Paused()

    def close(self, drain: float = 5.0) -> None:
        """Settle what lingers, for up to `drain` seconds, and close a store that was opened from a URL."""
        self._source.close(drain)

    def __enter__(self) -> Idempotency:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncIdempotency(_Engine):
    """Runs functions once, in the tasks of event loops. The arguments are those of Idempotency."""

    async def run(
        self,
        key: str,
        fn: Callable[[], T] | Callable[[], Awaitable[T]],
        *,
        scope: Scope,
        fingerprint: bytes = b"",
        policy: Policy | None = None,
        codec: Codec | None = None,
    ) -> Outcome[T]:
        """`Idempotency.run`, awaited; `fn` may be a plain function or a coroutine function.

        Cancelled while `fn` runs, it cancels `fn`, and the record stays in progress unless the policy says
        `release_on_cancel`. Cancelled while the result is being stored, it first stores it.
        """
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.aopened()
        limit = _limit(policy, opened)
        value: Any = None
        raised: BaseException | None = None

        async def run_fn(hold: Hold) -> Reply:
            nonlocal value, raised
            self._listen(hold, _name(scope))
            overtaking = Overtaking(hold, cancels=policy.on_lease_lost == "cancel")
            token = enter(loop_operation(hold, opened, policy.store_timeout, policy.complete_timeout))
            try:
                with overtaking:
                    value = fn()
                    if inspect.isawaitable(value):
                        value = await value
            except BaseException as error:
                if overtaking.cancelled(error):
                    return LeaseLost()
                raised = error
                return failure(error)
            finally:
                leave(token)
            returned, value = _encode(codec, value, limit)
            return returned

        id = self.id_of(scope, check_key(key))
        conclusion = await self.attempt(
            id,
            fingerprint=_seal(fingerprint),
            run=run_fn,
            policy=policy,
            tenant=_tenant(scope, self._pepper),
            where=_name(scope),
        )
        if raised is not None:
            raise raised
        if isinstance(conclusion, Completed | Replayed):
            return cast("Outcome[T]", self._outcome(codec, conclusion, value))
        _raise(conclusion, id)

    async def attempt(
        self,
        id: bytes,
        *,
        fingerprint: bytes,
        run: Callable[[Hold], Awaitable[Reply]],
        policy: Policy,
        tenant: bytes = b"",
        trace: str = "",
        where: str = "",
        refingerprint: Refingerprint = unknown_algorithm,
        sleep: Callable[[float], Awaitable[bool]] | None = None,
    ) -> Conclusion:
        """One attempt at an operation, for adapters: `run` does the work and answers Returned, Raised, Cancelled or
        LeaseLost.

        sleep: how a duplicate waits for some seconds; False when its caller has left.
        """
        opened = self._source.aopened()
        began = clock()
        flow = self._flow(opened, id, fingerprint, policy, tenant, trace, refingerprint)

        async def pause(command: Pause) -> Paused:
            return await self._pause(command, policy, sleep)

        try:
            conclusion: Conclusion = await adrive(flow, opened, policy.store_timeout, run, pause)
        finally:
            opened.background.leave()
        self._conclude(conclusion, id, where, began)
        return conclusion

    async def _pause(self, pause: Pause, policy: Policy, sleep: Callable[[float], Awaitable[bool]] | None) -> Paused:
        if not pause.waiting:
            await asyncio.sleep(pause.seconds)
            return Paused()
        if self._waiters >= policy.max_waiters:
            return Paused(on=False)
        self._waiters += 1
        try:
            if sleep is not None:
                return Paused(on=await sleep(pause.seconds))
            await asyncio.sleep(pause.seconds)
            return Paused()
        finally:
            self._waiters -= 1

    def opened(self) -> AsyncOpened | AsyncView:
        """The opened store for the running event loop; opens it at the first call."""
        return self._source.aopened()

    async def aclose(self, drain: float = 5.0) -> None:
        """Settle what lingers, for up to `drain` seconds, and close a store that was opened from a URL."""
        await self._source.aclose(drain)

    async def __aenter__(self) -> AsyncIdempotency:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class Overtaking:
    """Cancels the task that runs a handler when its lease is lost (C8), and tells that cancellation from others."""

    def __init__(self, hold: Hold, *, cancels: bool) -> None:
        self._hold = hold
        self._cancels = cancels
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._active = True
        self._ours = False

    def __enter__(self) -> Overtaking:
        if self._cancels:
            self._hold.on_lost = self._lost
            if self._hold.lost:
                self._cancel()
        return self

    def __exit__(self, *exc: object) -> None:
        self._active = False
        self._hold.on_lost = None
        if self._ours and self._task is not None:
            self._task.uncancel()

    def cancelled(self, error: BaseException) -> bool:
        """Whether that is the cancellation that we made, and nobody else cancelled the task as well."""
        return (
            self._ours
            and isinstance(error, asyncio.CancelledError)
            and (self._task is None or self._task.cancelling() == 0)
        )

    def _lost(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._active and not self._ours and self._task is not None:
            self._ours = True
            self._task.cancel("the lease was lost")


def failure(error: BaseException) -> Raised | Cancelled:
    """What a handler's exception means for its record (C5)."""
    if isinstance(error, errors.OutcomeUnknown):
        return Raised(unknown=True)
    return Raised() if isinstance(error, Exception) else Cancelled()


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


__all__ = ["AsyncIdempotency", "Idempotency", "Outcome", "conclusion_error", "lease_lost"]
