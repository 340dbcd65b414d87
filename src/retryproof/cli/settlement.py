"""Settling an operation by hand that died or failed in the middle, with the protocol's own fence.

The operator's claim takes the record over as an attempt does: it does not wait for a lease, it is refused if a lease is
live, and every earlier holder that wakes up is fenced off. Then the record is completed or released.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retryproof.cli.command import Refused
from retryproof.cli.find import named
from retryproof.cli.output import duration
from retryproof.cli.shown import state_of
from retryproof.core.commands import Acquired, Checkpoint, Claim, Complete, Done, Release, Running
from retryproof.core.errors import StoreUnavailable, Unreadable
from retryproof.core.record import MICROSECONDS, SETTLED_BY_HAND, Record, State
from retryproof.stores import Store

LEASE = 15.0
"""The lease of the operator's claim, in seconds: enough for a few calls of the store."""
UNSETTLED_RETENTION = 2_592_000.0
"""If this process dies in the middle, the record stays abandoned as before, for another 30 days."""
ANY_NUMBER = 1_000_000
CHANGED = "it changed while you decided: look at it again (`keys show`), and decide again"


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision: never happened (released), or done with a result; None as the result leaves a tombstone."""

    happened: bool
    result: bytes | None = None


def check_settleable(record: Record) -> None:
    """Refuse an operation that is settled, or that has a live lease."""
    if record.settled:
        raise Refused(f"{named(record)} is {state_of(record)} already; a settled record never changes.")
    if record.live(record.read_at):
        left = (record.lease_until - record.read_at) / MICROSECONDS
        raise Refused(
            f"{named(record)} is running: its lease is live for another {duration(left)}. A live operation is never "
            "settled or evicted; wait until it ends or its lease does."
        )


def settle(store: Store, record: Record, settlement: Decision, entry: dict[str, Any]) -> None:
    """Take the record over and settle it; raises Refused if another attempt was faster, or StoreUnavailable."""
    claim = Claim(
        id=record.id,
        fingerprint=record.fingerprint,
        nonce=os.urandom(16),
        lease=LEASE,
        retention=record.retention,
        unsettled_retention=UNSETTLED_RETENTION,
        on_abandoned="settle",
        max_attempts=ANY_NUMBER,
        alone=0,  # if this process dies, that says nothing about the operation
    )
    held = _take_over(store, record, claim)
    if settlement.happened:
        _must(store.complete([Complete(claim.id, claim.nonce, held.token, settlement.result)]))
    else:
        _release(store, claim, held, entry)
    unmark = getattr(store, "unmark", None)  # where work can commit in the caller's transaction; last, and it can be
    if unmark is not None:  # done again: with a marker the operation stays unsettled
        unmark([claim.id])


def _release(store: Store, claim: Claim, held: Acquired, entry: dict[str, Any]) -> None:
    note = json.dumps(entry).encode()
    _must(store.checkpoint([Checkpoint(claim.id, claim.nonce, held.token, SETTLED_BY_HAND, note)]))
    _must(store.release([Release(claim.id, claim.nonce, held.token, settles=True)]))


def _take_over(store: Store, record: Record, claim: Claim) -> Acquired:
    (reply,) = store.claim([claim])
    match reply:
        case StoreUnavailable() | Unreadable():
            raise reply
        case Acquired() if reply.birth == claim.nonce:
            # The record was gone, and this claim made a new one; nobody has run it.
            _must(store.release([Release(claim.id, claim.nonce, reply.token)]))
            store.evict([claim.id])
            raise Refused(f"{named(record)} is gone: evicted, or past its retention.")
        case Acquired() if (reply.birth, reply.attempt, reply.checkpoints) != _expected(record):
            raise Refused(f"{named(record)}: {CHANGED}; until then it is held for {LEASE:g} s.")
        case Acquired():
            return reply
        case Running(left):
            raise Refused(f"{named(record)} was taken up by a retry just now (lease live for {duration(left)}).")
        case _:
            raise Refused(f"{named(record)}: {CHANGED}.")


def _expected(record: Record) -> tuple[bytes, int, Mapping[str, bytes]]:
    """Birth, attempt and checkpoints, which the operator's claim finds unchanged if nothing has happened."""
    return record.birth, record.attempt + (record.state is State.IN_PROGRESS), record.checkpoints


def _must(replies: Sequence[object]) -> None:
    (reply,) = replies
    if isinstance(reply, StoreUnavailable | Unreadable):
        raise reply
    if not isinstance(reply, Done):
        raise Refused(f"The lease of this settlement was lost: {CHANGED}.")
