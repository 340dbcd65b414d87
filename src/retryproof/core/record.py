"""The record that a store keeps, and the table that decides what a claim finds.

    record found                              same fingerprint                      other fingerprint
    none, or settled and past its retention   Acquired                              Acquired
    in progress, lease live                   Running                               Mismatch
    in progress, lease over                   taken over: Acquired, or Abandoned    Mismatch
    released                                  Acquired (attempt not counted)        Mismatch
    released, an earlier one ended unknown    the same, or Abandoned, by policy     Mismatch
    neither live nor completed, committed     Abandoned                             Mismatch
    completed, or a tombstone                 Finished                              Mismatch

`decide` is that table. Stores written in Python call it. Other stores decide in a script or in SQL, and one model-based
test compares them all with the table.

A released record keeps its row, so that its token never comes back. It counts as settled, since its attempt said that
it had no effect. There are two exceptions (C12):

- It stored something, a step's result or a recovery point. Then a part of the effect exists, and forgetting the record
  would repeat it.
- An earlier attempt ended unknown. A clean failure of a later attempt does not change that. This needs no column: an
  attempt is counted when it takes over a record in progress, so `attempt` is above 1 exactly if some attempt ended
  unknown. If nobody wants a claim any more, it is released too, and leaves exactly this state.

Such a record is settled only by completing it, or by an operator who says that it never happened; then attempts are
counted from the start again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from enum import IntEnum
from typing import TypeGuard

from retryproof.core.commands import (
    DONE,
    LOST,
    NOTHING,
    Abandoned,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Finished,
    Mismatch,
    Release,
    Renew,
    Running,
)
from retryproof.core.value import value

MICROSECONDS = 1_000_000
SETTLED_BY_HAND = "retryproof.settled"
"""If an operator released a record, the checkpoint of this name says who did it, and why."""


class State(IntEnum):
    """The state of a record; the numbers are stored."""

    IN_PROGRESS = 1
    RELEASED = 2
    COMPLETED = 3
    TOMBSTONE = 4


@value(kw_only=True)
class Record:
    """Times are microseconds of the store's clock since the epoch.

    expires_at: the end of retention once settled, of unsettled retention until then.
    deaths: how many attempts died alone; `counts`: whether the death of the current one would count (C15).
    committed: a marker shows that an attempt's work was committed in the caller's transaction without its result (T1).
    read_at: the store's time when it was read.
    """

    id: bytes
    state: State
    fingerprint: bytes
    birth: bytes
    nonce: bytes
    token: int
    attempt: int
    deaths: int
    counts: bool
    first_seen: int
    lease_until: int
    expires_at: int
    retention: float
    result: bytes | None = None
    tenant: bytes = b""
    trace: str = ""
    checkpoints: Mapping[str, bytes] = field(default_factory=lambda: NOTHING)
    read_at: int = 0
    committed: bool = False

    @property
    def settled(self) -> bool:
        """Whether its outcome is known: completed, a tombstone, or released with nothing stored and nothing unknown."""
        if self.state is State.RELEASED:
            return self.attempt == 1 and not (self.checkpoints or self.committed)
        return self.state is not State.IN_PROGRESS

    def expired(self, now: int) -> bool:
        """Whether a claim may treat it as absent. A record without an outcome never is: only reaping ends it."""
        return self.settled and now >= self.expires_at

    def over(self, now: int) -> bool:
        """Whether reaping may end it: its time is over, with or without an outcome, and nobody holds it."""
        return now >= self.expires_at and not self.live(now)

    def live(self, now: int) -> bool:
        """Whether an attempt holds it."""
        return self.state is State.IN_PROGRESS and now < self.lease_until


def microseconds(seconds: float) -> int:
    """Whole microseconds of a duration."""
    return round(seconds * MICROSECONDS)


def decide(record: Record | None, claim: Claim, now: int) -> tuple[Record | None, ClaimReply]:
    """What a claim finds at the store's time `now`: the record to write (None: nothing changes) and the reply."""
    if record is None or record.expired(now):
        return _born(claim, now, record.token if record else 0)
    if record.fingerprint != claim.fingerprint:
        return None, Mismatch(record.fingerprint)
    match record.state:
        case State.COMPLETED | State.TOMBSTONE:
            return None, Finished(record.result, record.attempt, record.first_seen, record.trace)
        case State.RELEASED:
            if record.nonce == claim.nonce:  # a late duplicate of the claim: its attempt has ended
                return None, Running(0.0)
            if record.committed and claim.on_abandoned != "settle":
                return None, Abandoned("committed", record.attempt)
            if record.attempt > 1 and claim.on_abandoned == "refuse":
                return None, Abandoned("refused", record.attempt)
            return _take(record, claim, now)
        case State.IN_PROGRESS:
            return _decide_in_progress(record, claim, now)


def _decide_in_progress(record: Record, claim: Claim, now: int) -> tuple[Record | None, ClaimReply]:
    if record.nonce == claim.nonce:  # the same claim, repeated after a lost reply (C3)
        return None, _acquired(record)
    if now < record.lease_until:
        return None, Running((record.lease_until - now) / MICROSECONDS)
    if record.committed and claim.on_abandoned != "settle":
        return None, Abandoned("committed", record.attempt)
    if claim.on_abandoned == "refuse":
        return None, Abandoned("refused", record.attempt)
    deaths = record.deaths + record.counts
    if deaths >= claim.max_attempts:
        return None, Abandoned("poisoned", record.attempt)
    return _take(replace(record, attempt=record.attempt + 1, deaths=deaths), claim, now, taken_over=True)


def _born(claim: Claim, now: int, token: int) -> tuple[Record, Acquired]:
    """The same as `_take` for a new operation, at a fraction of the cost, since most operations are new."""
    token = max(token + 1, now)
    born = Record(
        id=claim.id,
        state=State.IN_PROGRESS,
        fingerprint=claim.fingerprint,
        birth=claim.nonce,
        nonce=claim.nonce,
        token=token,
        attempt=1,
        deaths=0,
        counts=claim.alone == 2,
        first_seen=now,
        lease_until=now + microseconds(claim.lease),
        expires_at=now + microseconds(claim.unsettled_retention),
        retention=claim.retention,
        tenant=claim.tenant,
        trace=claim.trace,
    )
    return born, Acquired(token, 1, now, claim.nonce, NOTHING, claim.trace)


def _take(record: Record, claim: Claim, now: int, *, taken_over: bool = False) -> tuple[Record, Acquired]:
    taken = replace(
        record,
        state=State.IN_PROGRESS,
        nonce=claim.nonce,
        token=max(record.token + 1, now),
        counts=claim.alone == 2 or (taken_over and claim.alone == 1),
        lease_until=now + microseconds(claim.lease),
        expires_at=now + microseconds(claim.unsettled_retention),
        retention=claim.retention,
        result=None,
    )
    return taken, _acquired(taken)


def _acquired(record: Record) -> Acquired:
    return Acquired(record.token, record.attempt, record.first_seen, record.birth, record.checkpoints, record.trace)


def settle(record: Record | None, command: Complete | Release, now: int) -> tuple[Record | None, FenceReply]:
    """Complete or release, fenced: the record to write (None: nothing changes) and the reply.

    If the command is repeated after a lost reply, the record shows that it is done already (C3).
    """
    if record is None or (record.nonce, record.token) != (command.nonce, command.token):
        return None, LOST
    if record.state is not State.IN_PROGRESS:
        # A repeat of the command that settled it, or a late command of an attempt that settled in another way.
        same = isinstance(command, Release) == (record.state is State.RELEASED)
        return None, DONE if same else LOST
    return _released(record, command, now) if isinstance(command, Release) else _completed(record, command, now), DONE


def _completed(record: Record, command: Complete, now: int) -> Record:
    """By the constructor, as `_born`: `replace` takes twice as long, and most operations come here once."""
    return Record(
        id=record.id,
        state=State.TOMBSTONE if command.result is None else State.COMPLETED,
        fingerprint=record.fingerprint,
        birth=record.birth,
        nonce=record.nonce,
        token=record.token,
        attempt=record.attempt,
        deaths=record.deaths,
        counts=record.counts,
        first_seen=record.first_seen,
        lease_until=now,
        expires_at=now + microseconds(record.retention),
        retention=record.retention,
        result=command.result,
        tenant=record.tenant,
        trace=record.trace,
        read_at=record.read_at,
        committed=record.committed,
    )


def _released(record: Record, command: Release, now: int) -> Record:
    """Retention starts now if nothing is unsettled; otherwise the record keeps the end that it has."""
    if command.settles:
        record = replace(record, attempt=1, deaths=0)
    released = replace(record, state=State.RELEASED, result=None, lease_until=now)
    return replace(released, expires_at=now + microseconds(record.retention)) if released.settled else released


def renew(record: Record | None, command: Renew, now: int) -> tuple[Record | None, FenceReply]:
    """Extend the lease, fenced. A lease that is over is extended too, if nobody has taken over."""
    if not _held(record, command):
        return None, LOST
    until = max(record.lease_until, now + microseconds(command.lease))
    return replace(record, lease_until=until, counts=record.counts and command.alone), DONE


def checkpoint(record: Record | None, command: Checkpoint) -> tuple[Record | None, FenceReply]:
    """Store a step's result, fenced."""
    if not _held(record, command):
        return None, LOST
    return replace(record, checkpoints={**record.checkpoints, command.name: command.value}), DONE


def _held(record: Record | None, command: Renew | Checkpoint) -> TypeGuard[Record]:
    return (
        record is not None
        and record.state is State.IN_PROGRESS
        and (record.nonce, record.token) == (command.nonce, command.token)
    )
