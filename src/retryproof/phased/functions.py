"""Phased operations: functions that a completer can finish without their client (T3).

    phased = Phased(AsyncIdempotency("postgresql://…"), connect=pool.acquire)

    @phased.function("create_ride")
    async def create_ride(ride: Ride) -> Receipt:
        operation = current_operation()
        async with operation.phase("order") as phase:
            …

    outcome = await create_ride.run(key, Ride(…), scope=(tenant, user))

`run` is `AsyncIdempotency.run` with an input. The transaction of the first phase also writes the input, the function's
name and the scope to the completer's worklist; completing the operation deletes them. A completer (`Completer`, or
`retryproof completer module:phased`) continues abandoned and failed operations after their last recovery point, and the
client's retry gets the result that it stores. If an operation fails before its first phase was committed, the client
has to repeat it: it had no local effect.

BlockingPhased is the same for plain functions.

The input and the scope are stored as they are given, or sealed. Do not pass credentials: a function that needs one
finds it by the principal.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

from retryproof.core.codec import Codec, codec_for, decode_value, encode_value
from retryproof.core.errors import ConfigurationError, IdempotencyError, Unreadable
from retryproof.core.hold import Hold
from retryproof.core.keys import check_key, short_digest
from retryproof.core.policy import Policy
from retryproof.engine import AsyncIdempotency, Engine, Idempotency, Outcome, Scope, sealed_fingerprint, tenant_of
from retryproof.operation import current_operation
from retryproof.sql.worklist import WorklistEntry

I = TypeVar("I")  # noqa: E741  # the input
R = TypeVar("R")
MAX_NAME = 255
MAX_INPUT = 1 << 20
"""The most bytes that an encoded input may have, before it is sealed."""


class Sealer(Protocol):
    """Encrypts entries of the worklist, bound to their records."""

    def seal(self, data: bytes, id: bytes) -> bytes:
        """Return the bytes to store; authenticate the record's `id` with them."""

    def open(self, data: bytes, id: bytes) -> bytes:
        """Return the data that was sealed; raise if that is not possible."""


class RecordGone(IdempotencyError):
    """The record is not the listed one any more: it was settled, evicted or reaped."""


class _Registry:
    """What both kinds of Phased share: an engine, and the options of its functions."""

    def __init__(self, connect: Callable[[], Any] | None, sealer: Sealer | None) -> None:
        self.connect = connect
        self.sealer = sealer


class Phased(_Registry):
    """Functions by name, over one engine.

    connect: makes the connection of a phase that has none of its own, or a context manager that gives one, such as
        `pool.acquire` or `pool.connection`.
    sealer: encrypts inputs; without one they are stored unencrypted.
    """

    def __init__(
        self,
        engine: AsyncIdempotency,
        *,
        connect: Callable[[], Any] | None = None,
        sealer: Sealer | None = None,
    ) -> None:
        if not isinstance(engine, AsyncIdempotency):
            raise ConfigurationError(
                "Phased takes an AsyncIdempotency, over a postgresql:// or sqlite:// store; for an Idempotency use "
                "BlockingPhased."
            )
        super().__init__(connect, sealer)
        self.engine = engine
        self.functions: dict[str, PhasedFunction[Any, Any]] = {}

    def function(
        self, name: str, *, policy: Policy | None = None, input_codec: Codec | None = None, codec: Codec | None = None
    ) -> Callable[[Callable[[I], Awaitable[R]]], PhasedFunction[I, R]]:
        """Register a coroutine function of one argument under a name, which must not change when the code moves.

        input_codec, codec: how input and result are encoded; by default the annotations decide.
        """
        _check_name(name, self.functions)

        def register(fn: Callable[[I], Awaitable[R]]) -> PhasedFunction[I, R]:
            made = PhasedFunction(self, name, fn, policy, input_codec, codec)
            self.functions[name] = made
            return made

        return register


class BlockingPhased(_Registry):
    """`Phased` for plain functions, over an Idempotency. A completer runs them in threads."""

    def __init__(
        self, engine: Idempotency, *, connect: Callable[[], Any] | None = None, sealer: Sealer | None = None
    ) -> None:
        if not isinstance(engine, Idempotency):
            raise ConfigurationError(
                "BlockingPhased takes an Idempotency, over a postgresql:// or sqlite:// store; for an AsyncIdempotency "
                "use Phased."
            )
        super().__init__(connect, sealer)
        self.engine = engine
        self.functions: dict[str, BlockingPhasedFunction[Any, Any]] = {}

    def function(
        self, name: str, *, policy: Policy | None = None, input_codec: Codec | None = None, codec: Codec | None = None
    ) -> Callable[[Callable[[I], R]], BlockingPhasedFunction[I, R]]:
        """Register a function of one argument; see `Phased.function`."""
        _check_name(name, self.functions)

        def register(fn: Callable[[I], R]) -> BlockingPhasedFunction[I, R]:
            made = BlockingPhasedFunction(self, name, fn, policy, input_codec, codec)
            self.functions[name] = made
            return made

        return register


def _check_name(name: str, functions: Mapping[str, object]) -> None:
    if not name or len(name) > MAX_NAME or "\0" in name:
        raise ConfigurationError(f"The name of a phased function has 1 to {MAX_NAME} characters.")
    if name in functions:
        raise ConfigurationError(f"A phased function {name!r} is registered already.")


class _Function(Generic[I]):
    """What both kinds of registered functions share."""

    def __init__(
        self,
        registry: _Registry,
        engine: Engine,
        name: str,
        fn: Callable[[I], Any],
        policy: Policy | None,
        input_codec: Codec | None,
        codec: Codec | None,
    ) -> None:
        parameters = list(inspect.signature(fn).parameters)
        if len(parameters) != 1:
            raise ConfigurationError(
                f"The phased function {name!r} takes {len(parameters)} arguments, and must take 1."
            )
        hints = get_type_hints(fn)
        self.name = name
        self.policy = policy or engine.policy
        self._registry = registry
        self._ids = engine
        self._input = input_codec or codec_for(hints.get(parameters[0], Any))
        self._codec = codec or codec_for(hints.get("return", Any))

    def _given(self, key: str, input: I, scope: Scope) -> tuple[bytes, PhasedCall]:
        """The record's id and the client's input; wrong ones are refused before anything is claimed."""
        principal = (scope,) if isinstance(scope, str) else tuple(scope)
        if not all(isinstance(part, str) for part in principal):
            raise ConfigurationError(
                "The scope of a phased function is text: a completer is to read it as the principal."
            )
        data = encode_value(self._input, input)
        if len(data) > MAX_INPUT:
            raise ConfigurationError(f"The input has {len(data)} bytes; the worklist keeps at most {MAX_INPUT}.")
        where = (*principal, self.name)
        id = self._ids.id_of(where, check_key(key))
        tenant = tenant_of(where, self._ids)
        return id, PhasedCall(self._registry, self.name, principal, data, sealed_fingerprint(data), tenant)

    def _listed(self, entry: WorklistEntry) -> PhasedCall:
        """The input from the worklist."""
        principal, data = _unpack(self._registry.sealer, entry)
        return PhasedCall(
            self._registry, self.name, principal, data, entry.fingerprint, entry.tenant, listed=entry.birth
        )

    def _begin(self, given: PhasedCall) -> I:
        """Remember the attempt; return the input as a later attempt sees it, so that the first one gets the same."""
        operation = current_operation()
        given.begin(operation._hold)
        operation._phased = given
        input: I = decode_value(self._input, given.data)
        return input

    def _how(self, given: PhasedCall, beside: bool) -> dict[str, Any]:
        """The arguments of `run_record`."""
        return {
            "where": self.name,
            "fingerprint": given.fingerprint,
            "tenant": given.tenant,
            "policy": self.policy,
            "codec": self._codec,
            "beside": beside,
        }


class PhasedFunction(_Function[I], Generic[I, R]):
    """A registered function. `fn` is the function itself, for tests."""

    def __init__(
        self,
        phased: Phased,
        name: str,
        fn: Callable[[I], Awaitable[R]],
        policy: Policy | None,
        input_codec: Codec | None,
        codec: Codec | None,
    ) -> None:
        if not inspect.iscoroutinefunction(fn):
            raise ConfigurationError(f"The phased function {name!r} is no coroutine function.")
        super().__init__(phased, phased.engine, name, fn, policy, input_codec, codec)
        self.fn = fn
        self._engine = phased.engine

    async def run(self, key: str, input: I, *, scope: Scope) -> Outcome[R]:
        """Run the function unless the operation is done, or continue after its last recovery point.

        scope: as for `AsyncIdempotency.run`; its parts are the operation's `principal`. Another input with the same key
        raises Mismatch. Raises the same errors as `AsyncIdempotency.run`.
        """
        return await self._run(*self._given(key, input, scope))

    async def complete(self, entry: WorklistEntry, *, beside: bool = False) -> Outcome[R]:
        """Continue an operation of the worklist; for completers. Raises RecordGone if its record is another one now.

        beside: others run at the same time, so that its death would not count (C15).
        """
        return await self._run(entry.id, self._listed(entry), beside)

    async def _run(self, id: bytes, given: PhasedCall, beside: bool = False) -> Outcome[R]:
        async def work() -> R:
            return await self.fn(self._begin(given))

        return await self._engine.run_record(id, work, **self._how(given, beside))


class BlockingPhasedFunction(_Function[I], Generic[I, R]):
    """`PhasedFunction` for a plain function."""

    def __init__(
        self,
        phased: BlockingPhased,
        name: str,
        fn: Callable[[I], R],
        policy: Policy | None,
        input_codec: Codec | None,
        codec: Codec | None,
    ) -> None:
        if inspect.iscoroutinefunction(fn):
            raise ConfigurationError(f"The phased function {name!r} is a coroutine function; use Phased for it.")
        super().__init__(phased, phased.engine, name, fn, policy, input_codec, codec)
        self.fn = fn
        self._engine = phased.engine

    def run(self, key: str, input: I, *, scope: Scope) -> Outcome[R]:
        """See `PhasedFunction.run`."""
        return self._run(*self._given(key, input, scope))

    def complete(self, entry: WorklistEntry, *, beside: bool = False) -> Outcome[R]:
        """See `PhasedFunction.complete`."""
        return self._run(entry.id, self._listed(entry), beside)

    def _run(self, id: bytes, given: PhasedCall, beside: bool = False) -> Outcome[R]:
        return self._engine.run_record(id, lambda: self.fn(self._begin(given)), **self._how(given, beside))


class PhasedCall:
    """A running phased operation, and its row of the worklist.

    listed: the birth nonce of its row, if a completer runs it.
    """

    __slots__ = ("_function", "_listed", "_phased", "connect", "data", "fingerprint", "principal", "tenant")

    def __init__(
        self,
        phased: _Registry,
        function: str,
        principal: tuple[str, ...],
        data: bytes,
        fingerprint: bytes,
        tenant: bytes,
        listed: bytes = b"",
    ) -> None:
        self._phased = phased
        self._function = function
        self._listed = listed
        self.connect = phased.connect
        self.principal = principal
        self.data = data
        self.fingerprint = fingerprint
        self.tenant = tenant

    def begin(self, hold: Hold) -> None:
        """Remember the attempt; refuse a record that is not the listed one."""
        if self._listed and self._listed != hold.birth:
            raise RecordGone("The record was settled, evicted or reaped since.", digest=short_digest(hold.id))
        hold.listed = bool(self._listed or hold.checkpoints)

    def entry(self, hold: Hold) -> WorklistEntry | None:
        """The row that the next recovery point must write too, if any."""
        if self._listed:
            return None
        packed = _pack(self._phased.sealer, hold.id, self.principal, self.data)
        return WorklistEntry(hold.id, hold.birth, self.fingerprint, self.tenant, self._function, packed)

    def was_listed(self, hold: Hold) -> None:
        """The row exists now."""
        self._listed = hold.birth
        hold.listed = True


_VERSION = 1
_HEAD = struct.Struct(">BI")


def _pack(sealer: Sealer | None, id: bytes, principal: tuple[str, ...], data: bytes) -> bytes:
    """Version, length of the principal, the principal as JSON, the input."""
    who = json.dumps(principal).encode()
    plain = b"".join((_HEAD.pack(_VERSION, len(who)), who, data))
    return plain if sealer is None else sealer.seal(plain, id)


def _unpack(sealer: Sealer | None, entry: WorklistEntry) -> tuple[tuple[str, ...], bytes]:
    try:
        plain = entry.input if sealer is None else sealer.open(entry.input, entry.id)
        version, length = _HEAD.unpack_from(plain)
        if version != _VERSION:
            raise ValueError(f"version {version}")
        end = _HEAD.size + length
        return tuple(json.loads(plain[_HEAD.size : end])), plain[end:]
    except Exception as error:  # whatever a sealer raises
        raise Unreadable(
            "The input in the worklist cannot be read; was it sealed with another key?", digest=short_digest(entry.id)
        ) from error
