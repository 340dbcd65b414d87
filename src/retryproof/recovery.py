"""What an attempt leaves for later ones: the names and stored values of its steps and phases (T3). No I/O.

`stepping` is a step as a generator: it yields what the store or the caller has to do, blocking or awaited.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from retryproof.core.codec import OMITTED_VALUE, Codec, JsonCodec, Unencodable, decode_value, encode_and_replay
from retryproof.core.commands import Checkpoint, Done, Found, Look, Lost, Renew, Reply, Unreachable
from retryproof.core.errors import ConfigurationError, LeaseLost, ResultOmitted, StoreUnavailable
from retryproof.core.hold import Hold
from retryproof.core.keys import short_digest
from retryproof.core.policy import Policy
from retryproof.drive import clock

logger = logging.getLogger("retryproof")

PLAIN = JsonCodec()
ENDED = (
    "The operation has ended, and so has its transaction: what is done now (in a background task, say) is no part of "
    "it. Open a transaction of your own."
)
"""Why an operation takes no transaction any more."""
_STEP_BESIDE = (
    "The operation's transaction holds its record (on SQLite always, on PostgreSQL above READ COMMITTED), so the "
    "step's result could not be kept. Nothing was called. Take the step before you ask for the transaction, or between "
    "phases."
)


@dataclass(frozen=True, slots=True)
class StepCall:
    """Call the step's function. key: its idempotency key for foreign calls."""

    key: UUID


Stepping: TypeAlias = Generator[Renew | Checkpoint | Look | StepCall, Any, Any]


class Recovery:
    """The recovery points of one attempt, for its steps and its phases. Safe to use from threads.

    limit: how many bytes the store keeps of all values together, if it has a limit.
    """

    __slots__ = ("_limit", "_names", "hold", "policy")

    def __init__(self, hold: Hold, policy: Policy, limit: int | None) -> None:
        self.hold = hold
        self.policy = policy
        self._limit = limit
        self._names: set[str] = set()

    @property
    def refuses(self) -> str:
        """Why the operation takes no transaction any more; ENDED once it has ended."""
        return self.hold.refuses

    @property
    def digest(self) -> str:
        """16 hex digits that name the operation."""
        return short_digest(self.hold.id)

    def begin(self, name: str, codec: Codec) -> tuple[bool, Any]:
        """Use a name; return whether an earlier attempt stored a value under it, and the value.

        Raises ConfigurationError for a name that was used before, or after the end; LeaseLost.
        """
        if self.refuses == ENDED:
            raise ConfigurationError(
                f"The operation has ended: its result was stored, or it was given back. {name!r} was not begun, since "
                "nothing more can be kept of this attempt.",
                digest=self.digest,
            )
        with _mutex:
            if name in self._names:
                raise ConfigurationError(
                    f"The name {name!r} was used twice in one attempt; give each step and phase a name of its own.",
                    digest=self.digest,
                )
            self._names.add(name)
        if self.hold.lost:
            raise lease_lost(self.hold)
        kept = self.hold.checkpoints.get(name)
        if kept is None:
            return False, None
        if kept != OMITTED_VALUE:
            return True, decode_value(codec, kept)
        raise ResultOmitted(
            f"{name!r} was done by an earlier attempt, and its result could not be kept: it could not be encoded, or "
            "was too large. It is not run again; read its effect where it was written.",
            digest=self.digest,
        )

    def forget(self, name: str) -> None:
        """Mark a name as unused again."""
        self._names.discard(name)

    def check_revivable(self, name: str) -> None:
        """Refuse to extend a lease after `max_run` (C6)."""
        if clock() >= self.hold.stops:
            self.forget(name)
            raise LeaseLost(
                f"This attempt ran past max_run, and its lease is over: {name!r} was not begun, since another attempt "
                "may take over at any time.",
                digest=self.digest,
            )

    def encoded(self, codec: Codec, value: Any) -> tuple[bytes, Any]:
        """A value of a step or a phase, as it is stored and as every attempt sees it (C16).

        Raises Unencodable for a value that cannot be stored, because of its type or its size.
        """
        data, seen = encode_and_replay(codec, value)
        too_much = len(data) > self.policy.max_result
        if self._limit is not None:
            too_much = too_much or sum(map(len, self.hold.checkpoints.values())) + len(data) > self._limit
        if too_much:
            raise Unencodable(f"it has {len(data)} bytes, which is over the limit")
        return data, seen

    def kept(self, name: str, data: bytes) -> None:
        """Remember that the value is in the record."""
        self.hold.checkpoints = {**self.hold.checkpoints, name: data}


def stepping(recovery: Recovery, name: str, codec: Codec, key: UUID, *, held: bool) -> Stepping:
    """Do a step: renew the lease if it is over by our own count (C6), call the function, store its result.

    If the result cannot be stored, the caller gets it all the same, and the function must not run again (C14).
    held: a joined transaction holds the record, so that nothing could be stored.
    """
    hold = recovery.hold
    known, value = recovery.begin(name, codec)
    if known:
        return value
    if held:
        recovery.forget(name)
        raise ConfigurationError(_STEP_BESIDE, digest=recovery.digest)
    if clock() >= hold.deadline:
        recovery.check_revivable(name)
        sent = clock()
        _renewed(recovery, name, (yield hold.renew()), sent)
    value = yield StepCall(key)
    try:
        data, value = recovery.encoded(codec, value)
    except Unencodable as error:
        logger.warning("The result of the step %r is not kept: %s", name, error)
        data = OMITTED_VALUE
    yield from _keeping(recovery, name, data)
    return value


def _renewed(recovery: Recovery, name: str, reply: Reply, sent: float) -> None:
    hold = recovery.hold
    if isinstance(reply, Done):
        hold.renewed(sent)
        if clock() < hold.deadline:
            return
    recovery.forget(name)
    if isinstance(reply, Lost):
        hold.lose()
        raise lease_lost(hold)
    raise StoreUnavailable(
        f"The lease had run out and could not be renewed, so {name!r} was not begun.", digest=recovery.digest
    ) from getattr(reply, "error", None)


def _keeping(recovery: Recovery, name: str, data: bytes) -> Generator[Checkpoint | Look, Any, None]:
    """Store a step's result, fenced; repeat it as long as a completion may take while the store gives no answer.

    If the record is gone, nobody took over, and the attempt continues (C10).
    """
    hold, began = recovery.hold, clock()
    while True:
        reply: Reply = yield hold.checkpoint(name, data)
        if not isinstance(reply, Unreachable) or clock() - began > recovery.policy.complete_timeout:
            break
    if isinstance(reply, Lost):
        found = yield Look(hold.id)
        gone = isinstance(found, Found) and found.record is None
        if not gone and recovery.refuses == ENDED:
            raise ConfigurationError(
                f"The operation ended while {name!r} was done, so that its result could not be kept.",
                digest=recovery.digest,
            )
        if not gone:
            hold.lose()
            raise lease_lost(hold)
    elif not isinstance(reply, Done):
        raise StoreUnavailable(
            f"The result of the step {name!r} could not be stored; a later attempt runs it again, under the same "
            "derived key.",
            digest=recovery.digest,
        ) from (reply.error if isinstance(reply, Unreachable) else None)
    recovery.kept(name, data)


def lease_lost(hold: Hold) -> LeaseLost:
    """The error for an attempt that was overtaken."""
    return LeaseLost(
        "Another attempt took this operation over while this one ran past its lease; what this one does is not "
        "recorded any more. Stop, and let the other one answer.",
        digest=short_digest(hold.id),
    )


_mutex = threading.Lock()
"""Held while a name is reserved, since threads of a handler use names too."""
