"""What must hold whatever happens: checked by the explorer at every write and every conclusion."""

from __future__ import annotations

from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Release,
    Renew,
    StoreCommand,
)
from retryproof.core.hold import Hold
from retryproof.core.record import Record, State


class Violation(AssertionError):
    """An invariant does not hold; says which, and the steps that lead there."""


def holds(record: Record | None, hold: Hold) -> bool:
    return record is not None and (record.nonce, record.token) == (hold.nonce, hold.token) and not record.settled


def is_stored(record: Record | None, birth: bytes, result: bytes | None) -> bool:
    done = record is not None and record.state in (State.COMPLETED, State.TOMBSTONE)
    return record is not None and done and (record.birth, record.result) == (birth, result)


def check_write(
    before: Record | None, after: Record | None, command: StoreCommand, reply: ClaimReply | FenceReply, now: int
) -> None:
    if before is not None and after != before:
        _check_change(before, after, command, now)
    if isinstance(command, Claim):
        _check_claimed(before, after, command, reply, now)
    elif reply == DONE:
        _check_done(after, command)
    elif isinstance(command, Complete) and before is not None and reply == LOST:
        current = (before.nonce, before.token) == (command.nonce, command.token)
        if current and before.state in (State.IN_PROGRESS, State.COMPLETED, State.TOMBSTONE):
            raise Violation("C3: a current or repeated complete is told that it lost")


def _check_change(before: Record, after: Record | None, command: StoreCommand, now: int) -> None:
    if after is None:
        raise Violation("I7: a record is gone")
    if before.state in (State.COMPLETED, State.TOMBSTONE) and not before.expired(now):
        raise Violation(f"I3: a completed record is changed by {command}")
    if before.state is State.IN_PROGRESS and after.birth != before.birth:
        raise Violation("I7: an operation without an outcome is dropped")
    if after.token < before.token:
        raise Violation("C2: a token comes back")
    if isinstance(command, Claim):
        if before.live(now):
            raise Violation("I1: a live lease is taken")
        if not before.expired(now) and before.fingerprint != command.fingerprint:
            raise Violation("I4: other input takes the operation")
        if before.nonce == command.nonce and not before.expired(now):
            raise Violation("C3: a repeated claim changes the record; nobody will run what it takes")
        if after.token <= before.token:
            raise Violation("C2: a new holder has an old token")
    elif before.settled or (before.nonce, before.token) != (command.nonce, command.token):
        raise Violation(f"I2: the record is changed by a stale {command}")


def _check_claimed(
    before: Record | None, after: Record | None, claim: Claim, reply: ClaimReply | FenceReply, now: int
) -> None:
    same = before is not None and before.nonce == claim.nonce and before.fingerprint == claim.fingerprint
    current = before.token if before is not None and same and before.state is State.IN_PROGRESS else None
    if current is not None and (not isinstance(reply, Acquired) or reply.token != current):
        raise Violation("C3: a repeated claim gets another answer")
    if not isinstance(reply, Acquired):
        return
    if after is None or after.settled or (after.nonce, after.token) != (claim.nonce, reply.token):
        raise Violation("I1: acquired without a record that says so")
    if before is not None and not before.expired(now):
        if before.fingerprint != claim.fingerprint:
            raise Violation("I4: a mismatch is about to run")
        handed_on = (before.birth, before.first_seen, dict(before.checkpoints))
        if (reply.birth, reply.first_seen, dict(reply.checkpoints)) != handed_on:
            raise Violation("C13, C14: an attempt is not given what earlier ones left")


def _check_done(after: Record | None, command: Complete | Release | Renew | Checkpoint) -> None:
    if after is None or (after.nonce, after.token) != (command.nonce, command.token):
        raise Violation(f"I2: a stale {command} is told that it is done")
    match command:
        case Complete(result=result) if not is_stored(after, after.birth, result):
            raise Violation("I5: a result is called stored and is not")
        case Release() if after.state is not State.RELEASED:
            raise Violation("I5: a release is called done and is not")
        case Checkpoint(name=name, value=value) if after.checkpoints.get(name) != value:
            raise Violation("I5: a step is called kept and is not")
        case Renew() if after.state is not State.IN_PROGRESS:
            raise Violation("I2: a settled operation is renewed")
        case _:
            pass
