"""Where a relay's claims begin in each partition: a shortcut past deleted rows that are not vacuumed yet (T6). Pure.

A claim takes the lowest numbers that it can see. After it, a partition has nothing left below the last number taken,
except what transactions may still commit there that were open at the claim. A transaction has its id before it draws
a number, so those transactions had their ids when the claim looked. There are two kinds:

- The claim's snapshot lists a transaction as open.
- A transaction's id lies between the end of that list and the claim's own id. (A snapshot lists ids up to the highest
  that has ended, and not those that began after it.) By the next claim it is known which of these are open. That claim
  begins low in any case.

Each open transaction is kept with the highest number that was seen before it had its id: all of its own numbers are
higher. The next claim is told of them. Where one of them has ended by then, it begins at the lowest of these numbers.
The claim decides that in its own snapshot, so it looks for a message, and for what was added by whoever saw that
message, from the same number. A transaction that stays open costs nothing; one that ends costs one walk over what was
deleted since it began.

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
        """The floors once all of the batch in flight is done."""

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
        """The batch is done: the floors move on."""
        self.at.update(self._ahead)
        self._ahead = {}

    def stay(self) -> None:
        """Something of the batch is left: the next one begins where this one did."""
        self._ahead = {}

    def _rotate(self, found: Collection[int]) -> None:
        """Begin after the last partition that gave something."""
        floors = list(self.at.items())
        last = max((position for position, partition in enumerate(self.at, 1) if partition in found), default=0)
        self.at = dict(floors[last:] + floors[:last])
