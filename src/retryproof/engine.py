"""Engines: a store, a policy, a codec and listeners, behind one call that runs a function once.

Applications call `run` with a key and a function, and get an `Outcome`, or an error that says what to do. Adapters use
`attempts`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from types import CoroutineType
from typing import Any, Generic, Self, TypeVar, overload

from retryproof.attempt import Attempts, BlockingAttempt, LoopAttempt, Overtaking
from retryproof.conclusions import error_of
from retryproof.core import commands, errors
from retryproof.core.codec import Codec, JsonCodec, Unencodable, decode_value, encode_and_replay
from retryproof.core.commands import LeaseLost, Returned
from retryproof.core.failure import outcome_of
from retryproof.core.fingerprint import Method, seal
from retryproof.core.flow import Busy, Completed, Conclusion, Down, Replayed
from retryproof.core.keys import REMEMBERED, check_key, record_id, short_digest, tenant_digest
from retryproof.core.policy import Policy
from retryproof.drive import clock
from retryproof.observe.events import Event, Listener
from retryproof.observe.logging import log_event
from retryproof.operation import EPOCH, current_operation, enter, leave, settle
from retryproof.stores.base import AsyncStore, DatabaseEngine, Store
from retryproof.stores.opened import AsyncOpened, AsyncView, Opened, Source

T = TypeVar("T")
Scope = str | Sequence[str]
_Record = tuple[bytes, bytes, str, bytes]
"""Its id, its fingerprint as stored, the endpoint or function, the tenant's digest."""

logger = logging.getLogger("retryproof")


class Outcome(Generic[T]):
    """A function's value, and where it came from.

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


class Engine:
    """What both engines share, and what adapters use."""

    def __init__(
        self,
        store: str | Store | AsyncStore | DatabaseEngine,
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
        self.attempts = Attempts(events)
        self._pepper = pepper
        _say_what_rerun_means(self.policy)

    def id_of(self, scope: Scope, key: str) -> bytes:
        """The record's id of a key in a scope."""
        return record_id(_parts(scope), key, pepper=self._pepper)

    def tell(self, event: Event) -> None:
        """Tell the listeners."""
        self.attempts.tell(event)

    def _record(self, scope: Scope, key: str, fingerprint: bytes) -> _Record:
        parts = _parts(scope)
        id = record_id(parts, check_key(key), pepper=self._pepper)
        sealed = sealed_fingerprint(fingerprint) if fingerprint else _NO_INPUT
        return id, sealed, parts[-1] if parts else "", tenant_of(scope, self) if len(parts) > 1 else b""


class Idempotency(Engine):
    """Runs functions once, in threads.

    store: a URL, which is opened at the first call and closed by `close`, or a store, which belongs to its caller; or a
        SQLAlchemy engine, which is used like a URL and stays its caller's.
    codec: how results are encoded; by default JSON. events: listeners; by default the log.
    pepper: a secret that is mixed into every record's id, the same in every process that shares the store.
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
        """Run `fn` unless the operation is done; return its value, fresh or replayed.

        scope: where the key is unique: a name, or parts from the tenant down. fingerprint: of the input; the same key
        with another fingerprint raises Mismatch.
        Raises InProgress, Mismatch, OutcomeUnknown, LeaseLost, StoreUnavailable, ResultOmitted, InvalidKey, Unreadable,
        and the exceptions of `fn`, after which it may run again.
        """
        if inspect.iscoroutinefunction(fn):
            raise errors.ConfigurationError("Idempotency runs plain functions; use AsyncIdempotency for a coroutine.")
        id, sealed, where, tenant = self._record(scope, key, fingerprint)
        return self.run_record(id, fn, where=where, fingerprint=sealed, tenant=tenant, policy=policy, codec=codec)

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
        """`run` for a record whose id is known, and its fingerprint as stored. beside: as for `Attempts.begin`."""
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.opened()
        value: Any = None
        error: BaseException | None = None
        final: commands.WorkOutcome | None = None
        attempt: BlockingAttempt | Conclusion | None = None
        held: BlockingAttempt | None = None
        begun = False
        try:
            attempt = self.attempts.begin(opened, policy, id, fingerprint, where, tenant, beside=beside)
            if not isinstance(attempt, BlockingAttempt):
                return _answer(attempt, codec, id)
            held = attempt
            # Asked in the same step that calls the work (C6).
            conclusion = None if attempt.hold.may_begin(clock()) else attempt.renew()
            if conclusion is None:
                outer = current_operation(None)
                try:
                    enter(attempt.operation)
                    begun = True
                    value = fn()
                    if inspect.iscoroutine(value):
                        value.close()
                        raise errors.ConfigurationError("The function returned a coroutine; use AsyncIdempotency.")
                except BaseException as raised:  # noqa: BLE001  # raised again once the record says what it means
                    error = raised
                finally:
                    leave(attempt.operation, outer)
                outcome: commands.WorkOutcome
                if error is None:
                    outcome, value = _encoded(value, codec, policy, opened)
                elif begun:
                    outcome = outcome_of(error, policy.unknown_on)
                else:
                    raise error
                final, undone = settle(attempt.operation, outcome)
                conclusion = attempt.finish(final)
                error = undone or error
        except BaseException:  # an interruption
            if isinstance(attempt, BlockingAttempt):
                held = attempt
                if final is not None:
                    attempt.interrupt(final)
                elif not begun:
                    attempt.give_back()
            raise
        finally:
            if held is not None:
                try:
                    held.leave()
                except BaseException:  # an interruption: once more
                    held.leave()
                    raise
        return _answer(conclusion, codec, id, value, error)

    def opened(self) -> Opened:
        """The opened store of this process; opens it at the first call."""
        return self._source.opened()

    def close(self, drain: float = 5.0) -> None:
        """Wait up to `drain` seconds for running and unsettled operations; close a store that was opened from a URL."""
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
        _record: _Record | None = None,
        _beside: bool = False,
    ) -> Outcome[Any]:
        """`Idempotency.run`, awaited; `fn` may be a plain function or a coroutine function.

        If it is cancelled while `fn` runs, it cancels `fn`, and the record stays in progress unless the policy says
        `release_on_cancel`. If it is cancelled while the result is being stored, it first stores the result.
        """
        id, sealed, where, tenant = _record or self._record(scope, key, fingerprint)
        policy, codec = policy or self.policy, codec or self._codec
        opened = self._source.aopened()
        attempt = await self.attempts.abegin(opened, policy, id, sealed, where, tenant, beside=_beside)
        if not isinstance(attempt, LoopAttempt):
            return _answer(attempt, codec, id)
        value: Any = None
        error: BaseException | None = None
        try:
            # Asked in the same step that calls the work (C6).
            conclusion = None if attempt.hold.may_begin(clock()) else await attempt.renew()
            if conclusion is None:
                overtaking = Overtaking(attempt.hold, opened.loop) if policy.on_lease_lost == "cancel" else None
                outer = enter(attempt.operation)
                outcome: commands.WorkOutcome
                try:
                    value = fn()
                    if type(value) is CoroutineType or inspect.isawaitable(value):
                        value = await value
                except BaseException as raised:  # noqa: BLE001  # raised again once the record says what it means
                    if overtaking is not None and overtaking.caused(raised):
                        outcome = LeaseLost()
                    else:
                        error, outcome = raised, outcome_of(raised, policy.unknown_on)
                else:
                    outcome, value = _encoded(value, codec, policy, opened)
                finally:
                    if overtaking is not None:
                        overtaking.end()
                    leave(attempt.operation, outer)
                outcome = attempt.operation.end(outcome)
                joins = attempt.operation.joins  # looked at after the end: nobody joins a transaction from there on
                if joins is not None:
                    outcome, undone = await joins.asettle(outcome)
                    error = undone or error
                try:
                    conclusion = await attempt.finish(outcome)
                except asyncio.CancelledError:  # waits for the result to be stored; a second one does not wait
                    if attempt.rest is not None:
                        await asyncio.wait({attempt.rest})
                    raise
        finally:
            attempt.leave()
        return _answer(conclusion, codec, id, value, error)

    def run_record(
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
    ) -> Coroutine[Any, Any, Outcome[Any]]:
        """`run` for a record whose id is known, and its fingerprint as stored. beside: as for `Attempts.begin`."""
        run: Any = self.run  # it takes a record as well, which is nobody else's business
        record = (id, fingerprint, where, tenant)
        answer: Coroutine[Any, Any, Outcome[Any]] = run(
            "", fn, scope="", policy=policy, codec=codec, _record=record, _beside=beside
        )
        return answer

    def opened(self) -> AsyncOpened | AsyncView:
        """The opened store for the running event loop; opens it at the first call."""
        return self._source.aopened()

    async def aclose(self, drain: float = 5.0) -> None:
        """Wait up to `drain` seconds for running and unsettled operations; close a store that was opened from a URL."""
        await self._source.aclose(drain)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


def _encoded(
    value: Any, codec: Codec, policy: Policy, opened: Opened | AsyncOpened | AsyncView
) -> tuple[Returned, Any]:
    """A result as it is stored, and as every caller gets it (C16).

    A result that cannot be encoded, or is over the limit, becomes a tombstone, and its caller gets the real value
    (C17).
    """
    try:
        data, seen = encode_and_replay(codec, value)
    except Unencodable as error:
        logger.warning("A result could not be encoded and is not kept: %s", error)
        return Returned(None), value
    own = opened.capabilities.max_result
    limit = policy.max_result if own is None else min(policy.max_result, own)
    if len(data) > limit:
        logger.warning("A result of %d bytes is over the limit of %d and is not kept.", len(data), limit)
        return Returned(None), value
    return Returned(data), seen


def _answer(
    conclusion: Conclusion, codec: Codec, id: bytes, value: Any = None, error: BaseException | None = None
) -> Outcome[Any]:
    """The outcome for the caller; raises the function's exception, or the error of the conclusion.

    value, error: what came of the function in this attempt.
    """
    if error is not None and not (isinstance(error, Exception) and _is_overtaken(conclusion)):
        raise error
    if isinstance(conclusion, Completed):
        hold = conclusion.hold
        return Outcome(value, False, hold.attempt, hold.first_seen)
    if not isinstance(conclusion, Replayed):
        raise error_of(conclusion, short_digest(id)) from error
    finished = conclusion.finished
    if finished.result is None:
        raise errors.ResultOmitted(
            "The operation is done and its result was not kept: it was too large, or could not be encoded. "
            "It will not run again; read its effect where it was written.",
            digest=short_digest(id),
        )
    return Outcome(decode_value(codec, finished.result), True, finished.attempt, finished.first_seen)


def _is_overtaken(conclusion: Conclusion) -> bool:
    """Whether another attempt took over: then its result counts, whatever this one came to (C8)."""
    return isinstance(conclusion, Replayed | Busy | Down) and conclusion.overtaken


def tenant_of(scope: Scope, engine: Engine) -> bytes:
    """The digest of a scope's tenant, with whom a scope of several parts starts; or none."""
    parts = _parts(scope)
    return tenant_digest(parts[0], pepper=engine._pepper) if len(parts) > 1 else b""


def sealed_fingerprint(fingerprint: bytes) -> bytes:
    """The fingerprint of an input as it is stored."""
    return (_sealed if len(fingerprint) <= REMEMBERED else _sealed.__wrapped__)(fingerprint)


@lru_cache(maxsize=256)
def _sealed(fingerprint: bytes) -> bytes:
    return seal(Method.CUSTOM, sha256(fingerprint).digest())


_NO_INPUT = _sealed(b"")


def _parts(scope: Scope) -> Sequence[str]:
    return (scope,) if isinstance(scope, str) else scope


_said: set[str] = set()


def _say_what_rerun_means(policy: Policy) -> None:
    """Once in a process: what `rerun` repeats (C7)."""
    if policy.on_abandoned == "rerun" and "rerun" not in _said:
        _said.add("rerun")
        logger.info(
            "on_abandoned='rerun': when an attempt dies, the next one repeats what it did, except what is covered by "
            "the caller's transaction, phases, steps or derived keys; 'refuse' leaves it to an operator."
        )
