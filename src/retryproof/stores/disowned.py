"""Claims whose callers have gone without an answer: each is given back if it was applied, and may be applied late (C3).

A claim is looked for by its nonce, and released where it is found in progress. It may still be on its way, in the
buffers of a server that hung or of a network that sends again; so it is looked for several times, ever later, for a
minute of the store's being there. It is never sent again: that would write a record for a request that was told
"nothing was done", and could take over an operation whose lease ended in the outage. One that arrives later still holds
its operation for one lease, as any attempt does that dies.

The number is bounded, and so is the time: who gives up leaves what was known before, and says so in the log.
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
"""Seconds from a claim's being disowned to the first look, and at most from one look to the next: each time doubled."""
PATIENCE = 600.0
"""Seconds after which a claim is given up, whether the store was there or not."""
MAX_DISOWNED = 10_000
"""Claims that are looked for at once; more are given up at once."""
LOOKS = 32
"""Claims that are looked for in one call, since a record that is found may have a large result."""


class _Claim:
    """One claim. token: where it is known that it was applied."""

    __slots__ = ("delay", "due", "id", "nonce", "token", "until")

    def __init__(self, claim: Claim, token: int | None, now: float) -> None:
        self.id = claim.id
        self.nonce = claim.nonce
        self.token = token
        self.delay = FIRST_LOOK
        self.due = now if token is not None else now + FIRST_LOOK
        self.until = now + PATIENCE


class Disowned:
    """The claims to give back. Added to from any thread; all else is the keeper's."""

    def __init__(self, max_batch: int) -> None:
        self._batch = min(max_batch, LOOKS)
        self._claims: dict[bytes, _Claim] = {}
        self._given_up = 0
        self._mutex = threading.Lock()
        self._hurried = False

    def __len__(self) -> int:
        return len(self._claims)

    def add(self, claim: Claim, reply: Reply, now: float) -> None:
        """Give this claim back; `reply` is the store's answer, where one came that nobody reads."""
        token = reply.token if isinstance(reply, Acquired) else None
        with self._mutex:
            if len(self._claims) >= MAX_DISOWNED:
                self._given_up += 1
            else:
                self._claims[claim.nonce] = _Claim(claim, token, now)

    @property
    def due(self) -> float:
        """When the next is to be looked for."""
        with self._mutex:
            return min((claim.due for claim in self._claims.values()), default=NEVER)

    def hurry(self) -> None:
        """Look for all of them now."""
        with self._mutex:
            for claim in self._claims.values():
                claim.due, claim.delay = 0.0, FIRST_LOOK

    def give_up(self, now: float) -> None:
        """Forget those whose time is over, and say how many."""
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
        """Look for those that are due; whether the store answered. last: and look for none again."""
        self.give_up(now)
        while True:
            with self._mutex:
                due = {claim.id: claim for claim in self._claims.values() if claim.due <= now}
            batch = list(islice(due.values(), self._batch))
            if not batch:
                return True
            try:
                self._give_back(store, batch, now, last)
            except Exception:  # noqa: BLE001  # whatever a store raises: no answer, and tried again
                return False

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
