"""Callers: their commands, and the real state machine replayed from the replies that they got."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass, field, fields
from types import GeneratorType
from typing import Any, Protocol

from retryproof.core import flow, twin
from retryproof.core import record as table
from retryproof.core.commands import (
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Command,
    Complete,
    Disown,
    FenceReply,
    LeaseLost,
    Linger,
    Look,
    Lost,
    Pause,
    Release,
    Renew,
    Reply,
    Run,
    Unreachable,
)
from retryproof.core.errors import StoreUnavailable
from retryproof.core.hold import Hold
from retryproof.core.policy import Policy
from retryproof.core.record import Record

ID = b"i" * 32
LEASE = 10.0
RETENTION = 1_000.0
NO_ANSWER = Unreachable(StoreUnavailable("no answer"))
NOT_SENT = Unreachable(NO_ANSWER.error, sent=False)
Written = tuple[Record | None, ClaimReply | FenceReply]


@dataclass(frozen=True)
class Rules:
    """What is explored: the real rules, unless a test puts a faulty one in."""

    decide: Callable[[Record | None, Claim, int], Written] = table.decide
    settle: Callable[[Record | None, Complete | Release, int], Written] = table.settle
    renew: Callable[[Record | None, Renew, int], Written] = table.renew
    checkpoint: Callable[[Record | None, Checkpoint], Written] = table.checkpoint
    disown: Callable[[Claim, Acquired], Release] = lambda claim, held: Release(claim.id, claim.nonce, held.token)
    attempt: Callable[..., flow.Flow] = flow.attempt
    may_begin: Callable[[Hold, float], bool] = Hold.may_begin
    twin_first: Callable[[Hold, twin.Last | None, float], twin.Last | Renew | None] = twin.first
    twin_told: Callable[[Hold, twin.Last | None, Claim, Reply, float], Reply] = twin.told


def policy(**changes: Any) -> Policy:
    """A policy with one repeat of a failed settling."""
    options = {"lease": LEASE, "retention": RETENTION, "complete_timeout": 0.06, "poll": 6.0}
    return Policy(**{**options, **changes})


@dataclass(frozen=True)
class Caller:
    """One caller with its input. known: its input's fingerprints by earlier versions of the algorithm."""

    name: str
    policy: Policy = field(default_factory=policy)
    fingerprint: bytes = b"\1\1same"
    known: tuple[bytes, ...] = ()

    def claim(self) -> Claim:
        """Its claim, with a nonce of its own."""
        return Claim(
            id=ID,
            fingerprint=self.fingerprint,
            nonce=self.name.encode(),
            lease=self.policy.lease,
            retention=self.policy.retention,
            unsettled_retention=self.policy.unsettled_retention,
            on_abandoned=self.policy.on_abandoned,
            max_attempts=self.policy.max_attempts,
        )

    def refingerprint(self, stored: bytes) -> bytes | None:
        """Its input's fingerprint by the algorithm that made a stored one."""
        algorithm = stored[: flow.ALGORITHM]
        return next((known for known in self.known if known[: flow.ALGORITHM] == algorithm), None)


@dataclass(frozen=True)
class Told:
    """What a caller learnt, and when by its clock; `what` is a reply or one of the words below."""

    what: Reply | str
    now: float


BEGUN, STEP, RENEWED = "begun", "step", "renewed"
TRANSPARENT = (Pause, Disown, Linger)
STATES: dict[type[Any], str] = {
    Claim: flow.START,
    Run: flow.RUNNING,
    Complete: flow.SETTLING,
    Release: flow.SETTLING,
    Renew: flow.RENEWING,
    Look: flow.OVERTAKEN,
}

Edge = tuple[str, str, str]


class Beside(Protocol):
    """Other ways through the same attempt, which get the same replies."""

    def note(self, item: Told, command: Command | None) -> None: ...

    def tell(self, reply: Reply, now: float) -> None: ...


class Replay:
    """A caller rebuilt from the replies that it got; `beside` gets the same replies."""

    def __init__(self, rules: Rules, caller: Caller, told: tuple[Told, ...], beside: Beside | None = None) -> None:
        self._rules = rules
        self._beside = beside
        self.edges: list[Edge] = []
        self._from: tuple[str, str] | None = None
        self.conclusion: flow.Conclusion | None = None
        self.hold: Hold | None = None
        self.begun = self.stepped = self.renewed = False
        self._flow = rules.attempt(caller.claim(), caller.policy, told[0].now, caller.refingerprint)
        self.command: Command | None = next(self._flow)
        for item in told[1:]:
            self._tell(item)

    @property
    def running(self) -> bool:
        """Whether its handler runs, in a step or not."""
        return self.begun and isinstance(self.command, Run | Checkpoint)

    def _tell(self, item: Told) -> None:
        if self._beside is not None:
            self._beside.note(item, self.command)
        if item.what == BEGUN:
            self.begun = True
        elif item.what == STEP:
            assert self.hold is not None
            self.stepped = True
            self.command = self.hold.checkpoint("step", b"kept")
        elif item.what == RENEWED:
            assert self.hold is not None
            self.renewed = True
            self.hold.renewed(item.now)
        elif not isinstance(item.what, str):
            self._reply(item.what, item.now)

    def _reply(self, reply: Reply, now: float) -> None:
        if isinstance(self.command, Checkpoint):
            assert self.hold is not None
            self.command = Run(self.hold)
            if isinstance(reply, Lost):
                self._reply(LeaseLost(), now)
            return
        self._note(reply)
        if self._beside is not None:
            self._beside.tell(reply, now)
        try:
            self.command = self._flow.send((reply, now))
        except StopIteration as stop:
            self.command, self.conclusion = None, stop.value
            self._arrive(type(stop.value).__name__)
            return
        if isinstance(self.command, Run):
            self.hold = self.command.hold
        if not isinstance(self.command, TRANSPARENT):
            self._arrive(STATES[type(self.command)])

    def _note(self, reply: Reply) -> None:
        asked = self.command
        if not isinstance(asked, TRANSPARENT):
            self._from = (STATES[type(asked)], type(reply).__name__)

    def _arrive(self, where: str) -> None:
        if self._from is not None:
            self.edges.append((*self._from, where))
            self._from = None

    def standing(self) -> Hashable:
        """Equal for two callers that will do the same from here on."""
        return (frozen(self._flow), frozen(self.command), self._from, self.begun, self.stepped, self.renewed)


_CONSTANT = (bytes, int, float, str, type(None), Claim, Complete, Release, Policy)


def frozen(value: Any) -> Hashable:
    if isinstance(value, _CONSTANT):
        return value
    if isinstance(value, Generator):
        return _frozen_frames(value)
    if isinstance(value, Hold):
        return tuple(frozen(getattr(value, name)) for name in Hold.__slots__ if not name.startswith("on_"))
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    if isinstance(value, Exception) or callable(value):
        return (type(value),)
    return (type(value), *(frozen(getattr(value, item.name)) for item in fields(value)))


def _frozen_frames(generator: Generator[Any, Any, Any]) -> Hashable:
    """Where a generator stands and what it remembers, and those that it delegates to."""
    frames: list[Hashable] = []
    inner: object = generator
    while isinstance(inner, GeneratorType) and inner.gi_frame is not None:
        frame = inner.gi_frame
        frames += [frame.f_code, frame.f_lasti, tuple((name, frozen(held)) for name, held in frame.f_locals.items())]
        inner = inner.gi_yieldfrom
    return tuple(frames)
