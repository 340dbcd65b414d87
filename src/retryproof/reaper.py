"""Reaping: deleting records whose time is over, in bounded passes beside the traffic (C19).

Any number of processes may reap at once. An operation without an outcome is never deleted silently: it is reported as
an event and to `on_ended`, and only then deleted. So its end may be reported twice (by two reapers at once, after a
reaper died, after a lost reply), but it is never missed (C12).

    reap_all(store, events=[log_event])     # from a timer, a cron job, or `retryproof reap`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retryproof.core.keys import short_digest
from retryproof.core.record import SETTLED_BY_HAND, Record, State
from retryproof.observe.events import Event, Kind, Listener, tell
from retryproof.observe.logging import log_event
from retryproof.stores.base import AsyncStore, Reaped, Store

LIMIT = 1_000
"""The most records that a pass deletes: some tens of milliseconds, after which others have their turn."""
ENDED = "its unsettled retention ended; whether it had its effect was never settled"


@dataclass(frozen=True, slots=True)
class Totals:
    """The results of all passes. unsettled: operations that ended without an outcome. more: there is more to delete."""

    passes: int = 0
    settled: int = 0
    unsettled: int = 0
    more: bool = False


OnPass = Callable[[Totals], None]
OnEnded = Callable[[Record], None]


def reap_all(
    store: Store,
    *,
    limit: int = LIMIT,
    passes: int | None = None,
    events: Sequence[Listener] = (log_event,),
    on_ended: OnEnded = lambda record: None,
    on_pass: OnPass = lambda totals: None,
) -> Totals:
    """Reap until there is nothing more, or for a number of passes of at most `limit` records each.

    on_ended: called with each operation that ended without an outcome, before it is deleted. If it raises, the
        operations reported so far are deleted, the others stay for the next time, and its exception is raised.
    on_pass: called after each pass.
    Raises StoreUnavailable.
    """
    totals = Totals(more=True)
    while totals.more and (passes is None or totals.passes < passes):
        reaped, told = store.reap(limit), list[Record]()
        ended: Sequence[bytes] = ()
        try:
            _tell(reaped, told, events, on_ended)
        finally:
            if told:
                ended = store.reap(0, told).ended
        totals = _add(totals, reaped, ended)
        on_pass(totals)
    return totals


async def areap_all(
    store: AsyncStore,
    *,
    limit: int = LIMIT,
    passes: int | None = None,
    events: Sequence[Listener] = (log_event,),
    on_ended: OnEnded = lambda record: None,
    on_pass: OnPass = lambda totals: None,
) -> Totals:
    """`reap_all` for an async store."""
    totals = Totals(more=True)
    while totals.more and (passes is None or totals.passes < passes):
        reaped, told = await store.reap(limit), list[Record]()
        ended: Sequence[bytes] = ()
        try:
            _tell(reaped, told, events, on_ended)
        finally:
            if told:
                ended = (await store.reap(0, told)).ended
        totals = _add(totals, reaped, ended)
        on_pass(totals)
    return totals


def _tell(reaped: Reaped, told: list[Record], events: Sequence[Listener], on_ended: OnEnded) -> None:
    """Report each end, and record it as reported, one by one."""
    for record in reaped.unsettled:
        if not _is_settled_by_hand(record):
            event = Event(
                kind=Kind.EVICTED,
                digest=short_digest(record.id),
                attempt=record.attempt,
                trace=record.trace,
                note=ENDED,
            )
            tell(events, event)
            on_ended(record)
        told.append(record)


def _add(totals: Totals, reaped: Reaped, ended: Sequence[bytes]) -> Totals:
    by_hand = {record.id for record in reaped.unsettled if _is_settled_by_hand(record)}
    settled = len(by_hand.intersection(ended))
    return Totals(
        totals.passes + 1,
        totals.settled + reaped.settled + settled,
        totals.unsettled + len(ended) - settled,
        reaped.more,
    )


def _is_settled_by_hand(record: Record) -> bool:
    """Whether an operator said that it never happened, nothing else is stored, and no attempt ended unknown since."""
    released = record.state is State.RELEASED and record.attempt == 1
    return released and record.checkpoints.keys() == {SETTLED_BY_HAND}
