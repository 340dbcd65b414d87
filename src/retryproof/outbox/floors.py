"""Where a relay's claims begin in each partition: a short cut past what was deleted and is not vacuumed yet (T6). Pure.

A claim takes the lowest numbers that it can see. Below the last one of a partition nothing is left, and only those
transactions can still bring something there that had their id when the claim looked: a transaction has its id before it
draws a number. Those are the ones that the claim's snapshot lists as open, and any whose ids are between the end of
the list and the claim's own. (A snapshot lists ids up to the highest that has ended, and not who began after that.)

Each is kept with the highest number that was seen before it had its id: all of its own are higher. The next claim is
told of them, and begins at the lowest of these numbers where one has ended by then. That is decided in the claim's own
snapshot: a message, and what was added by whoever saw it, are looked for from the same number. Of those that were not
listed, it is known by then which are open; that claim begins low in any case. So a transaction that stays open costs
nothing, and one that ends costs one walk over what was deleted since it began.

A server that was promoted or restarted may have lost what was seen: the floors hold for one start of one server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter

from retryproof.core.message import Message
from retryproof.sql.outbox import ClaimedBatch

_PARTITION = attrgetter("partition")


class Floors:
    """The floors of one relay.

    at: by partition, in the order in which they are asked. open: transactions, with the number that each is above.
    server: whose numbers these are. highest: the highest number that was seen.
    """

    def __init__(self) -> None:
        self.at: dict[int, int] = {}
        self.open: Mapping[int, int] = {}
        self.server = 0
        self.highest = 0
        self._before = 0
        """The highest number that was seen before the last claim."""
        self._own = 0
        """The last claim's transaction id."""
        self._unlisted = False
        """Whether others may have had their ids at the last claim that its snapshot did not list."""
        self._ahead: dict[int, int] = {}
        """The floors once all of the batch on its way is done."""

    def own(self, partitions: Collection[int]) -> bool:
        """Have these partitions; whether they are others than before."""
        if set(partitions) == self.at.keys():
            return False
        self.at = {partition: self.at.get(partition, 0) for partition in partitions}
        return True

    def reset(self) -> None:
        """Begin at the first message again, whatever was seen."""
        self.at, self.open = dict.fromkeys(self.at, 0), dict.fromkeys(self.open, 0)
        self.highest = self._before = 0
        self._ahead = {}

    def begin(self) -> Mapping[int, int]:
        """Where the next claim begins."""
        if self._unlisted:
            self._lower(self._before)
        return self.at

    def learn(self, taken: ClaimedBatch) -> None:
        """Take note of what a claim says: from where it began, and who was open."""
        if taken.low is not None:
            self._lower(taken.low)
        if taken.server != self.server:
            self.server, self.open = taken.server, {}
            self.highest = self._before = self._own = 0
        self.open = {xid: self.open.get(xid, self.highest if xid >= self._own else self._before) for xid in taken.open}
        self._before, self._own = self.highest, taken.own
        self.highest = max([self.highest, *(message.sequence for message in taken.messages)])
        self._unlisted = taken.unlisted
        self._ahead = {}

    def _lower(self, low: int) -> None:
        self.at = {partition: min(floor, low) for partition, floor in self.at.items()}

    def follow(
        self, messages: Sequence[Message], waiting: Sequence[int], *, quota: int, batch: int
    ) -> Mapping[int, int]:
        """Go on behind a batch, in its order, once it is done; how many messages there were, by partition.

        waiting: the partition of each message that was found and parked. quota, batch: what the claim was limited to.
        """
        ready = [message for message in messages if not message.parked]
        found = Counter(waiting)
        found.update(map(_PARTITION, ready))
        self._ahead = {message.partition: message.sequence for message in ready}  # the last of each
        if found.total() < batch:  # all partitions were asked
            for partition in self.at:
                if found[partition] < quota:  # and this one had no more
                    self._ahead[partition] = self.highest
        if len(ready) < len(messages):
            found.update(message.partition for message in messages if message.parked)
        if not messages:
            self.advance()
        self._rotate(found)
        return found

    def follow_all(self, number: int) -> None:
        """Go on behind this number once the batch is done: it had the lowest ones of all partitions."""
        self._ahead = dict.fromkeys(self.at, number)

    def advance(self) -> None:
        """The batch is done."""
        self.at.update(self._ahead)
        self._ahead = {}

    def stay(self) -> None:
        """Something of the batch is left: the next one begins where this one did."""
        self._ahead = {}

    def _rotate(self, found: Collection[int]) -> None:
        """Begin after the last partition that gave something."""
        order = list(self.at)
        last = max((position for position, partition in enumerate(order) if partition in found), default=-1) + 1
        self.at = {partition: self.at[partition] for partition in (*order[last:], *order[:last])}
