"""Claims whose callers have gone without an answer: each is released if it was applied, even if it is applied late
(C3).

A claim is looked up by its nonce, and released if it is in progress. It may still be under way, in the buffers of a
server that hung, or of a network that sends again. So it is looked up several times, with growing pauses, during a
minute in which the store answers. It is never sent again: that would write a record for a request whose caller has
learnt "nothing was done", and could take over an operation whose lease ended in the outage. If it arrives even later,
it holds its operation for one lease, as every attempt that dies.

The number and the time are bounded. A claim that is given up changes nothing that was known before, and is logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from itertools import islice

from retryproof.core.commands import Acquired, Claim, Done, Lost, Release, Reply
from retryproof.core.errors import Unreadable
from retryproof.core.hold import NEVER
from retryproof.core.record import Record, State
from retryproof.stores.base import Store

logger = logging.getLogger("retryproof")

FIRST_LOOK, LAST_LOOK = 0.05, 30.0
"""Seconds until the first look-up, and the longest pause between two look-ups; the pause is doubled each time."""
PATIENCE = 600.0
"""Seconds after which a claim is given up, whether the store answered or not."""
MAX_DISOWNED = 10_000
"""How many claims may wait; any more are given up at once."""
LOOKS = 32
"""How many claims are looked up in one call, since a found record may have a large result."""


class _Claim:
    """One claim. token: set if the claim is known to be applied."""

    __slots__ = ("delay", "due", "id", "nonce", "token", "until")

    def __init__(self, claim: Claim, token: int | None, now: float) -> None:
        self.id = claim.id
        self.nonce = claim.nonce
        self.token = token
        self.delay = FIRST_LOOK
        self.due = now if token is not None else now + FIRST_LOOK
        self.until = now + PATIENCE


class Disowned:
    """The claims to release. Any thread may add one; everything else happens in the keeper's thread."""

    def __init__(self, max_batch: int) -> None:
        self._batch = min(max_batch, LOOKS)
        self._claims: dict[bytes, _Claim] = {}
        self._given_up = 0
        self._mutex = threading.Lock()
        self._hurried = False

    def __len__(self) -> int:
        return len(self._claims)

    def add(self, claim: Claim, reply: Reply, now: float) -> None:
        """Release this claim; `reply` is the store's answer, if one came that nobody read."""
        token = reply.token if isinstance(reply, Acquired) else None
        with self._mutex:
            if len(self._claims) >= MAX_DISOWNED:
                self._given_up += 1
            else:
                self._claims[claim.nonce] = _Claim(claim, token, now)

    @property
    def due(self) -> float:
        """When to look up the next one."""
        with self._mutex:
            return min((claim.due for claim in self._claims.values()), default=NEVER)

    def hurry(self) -> None:
        """Look all of them up now."""
        with self._mutex:
            for claim in self._claims.values():
                claim.due, claim.delay = 0.0, FIRST_LOOK

    def give_up(self, now: float) -> None:
        """Give up the claims whose time is over, and log how many."""
        with self._mutex:
            for claim in [claim for claim in self._claims.values() if now >= claim.until]:
                del self._claims[claim.nonce]
                self._given_up += 1
            given_up, self._given_up = self._given_up, 0
        if given_up:
            logger.warning(
                "%d claims whose answers were lost are given up: one that was applied holds its operation for a lease.",
                given_up,
            )

    def work(self, store: Store, now: float, *, last: bool = False) -> bool:
        """Look up the due claims; return whether the store answered. last: for the last time."""
        self.give_up(now)
        with self._mutex:  # once: what is hurried meanwhile has its turn in the next round
            due = {claim.nonce: claim for claim in self._claims.values() if claim.due <= now}
        while due:
            batch = list(islice({claim.id: claim for claim in due.values()}.values(), self._batch))
            for claim in batch:
                del due[claim.nonce]
            try:
                self._give_back(store, batch, now, last)
            except Exception:  # noqa: BLE001  # whatever a store raises: no answer, and tried again
                return False
        return True

    def _give_back(self, store: Store, batch: Sequence[_Claim], now: float, last: bool) -> None:
        unknown = [claim for claim in batch if claim.token is None]
        for claim, record in zip(unknown, _records(store, unknown), strict=True):
            self._found(claim, record, now, last)
        found = [claim for claim in batch if claim.token is not None]
        if not found:
            return
        replies = store.release([Release(claim.id, claim.nonce, claim.token or 0) for claim in found])
        for claim, reply in zip(found, replies, strict=True):
            if isinstance(reply, Done | Lost):
                self._end(claim)
            else:
                self._again(claim, now, last)

    def _found(self, claim: _Claim, record: Record | Unreadable | None, now: float, last: bool) -> None:
        if isinstance(record, Unreadable) or (record is not None and record.state >= State.COMPLETED):
            self._end(claim)  # however late it arrives, it is told so and changes nothing
        elif record is None or record.nonce != claim.nonce:
            self._again(claim, now, last)
        elif record.state is State.IN_PROGRESS:
            claim.token = record.token
        else:
            self._end(claim)

    def _again(self, claim: _Claim, now: float, last: bool) -> None:
        claim.delay *= 2
        claim.due = now + claim.delay
        if last or claim.delay > LAST_LOOK:
            self._end(claim)

    def _end(self, claim: _Claim) -> None:
        with self._mutex:
            self._claims.pop(claim.nonce, None)


def _records(store: Store, claims: Sequence[_Claim]) -> Sequence[Record | Unreadable | None]:
    """Each claim's record; one that cannot be read fails none of its neighbours."""
    if not claims:
        return []
    try:
        return store.get([claim.id for claim in claims])
    except Unreadable as error:
        if len(claims) == 1:
            return [error]
        return [record for claim in claims for record in _records(store, [claim])]
