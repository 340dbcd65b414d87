"""A relay's messages in flight: the batch that it sends, and slow messages of earlier batches (T6).

The relay waits for a batch as long as its patience, or less while messages of earlier batches are in flight. After
that:

- A message that is being sent continues beside the next batches, and its queue is held back until it ends. So each
  queue has at most one message in flight.
- A message that was not begun is returned as untried, and a later claim takes it again.

A message that a dead relay left is sent alone at first, since a message that kills a relay usually does so at once. If
it takes longer than the patience, other messages are sent beside it. If the relay dies then, each of them is tried
alone. The relay waits for the last attempt until its end, with nothing beside it. So no message is given up because of
another one (C15).

A message that has ended stays here until its outcome is recorded, so a lost answer of the database costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from math import inf
from time import monotonic

from retryproof.core.message import Message
from retryproof.publishers.base import UNTRIED, Batch, Outcome, Progress, Publisher, handed

SLOW = 256
"""How many messages may be in flight beside a batch; with more, the relay waits until one ends."""

LATE = 60.0
"""After this many seconds with a batch, the log names a publisher that does not report its progress."""
SHORTEST = 16
"""The relay waits at least this fraction of the patience (1/16) after the last message of the batch that ended."""
LOOK = 0.25
"""While it waits for a batch, the relay checks after this many seconds whether it has to stop."""
LETTING_GO = 1.0
"""Seconds that a cancelled call of a publisher has to end."""

log = logging.getLogger("retryproof.relay")


class Pace:
    """How long to wait for a batch: the patience, and less while messages of earlier batches are in flight.

    If one message in a hundred hangs, each batch has one. With the whole patience for each, all keys would wait.
    """

    def __init__(self, patience: float, others: int) -> None:
        self._begun = self._last = monotonic()
        self.until = self._begun + patience
        self._quiet = max(patience / SHORTEST, patience / (1 + others))
        self._first = 0.0
        self._ended = 0
        self.look = min(LOOK, self._quiet / 2)

    def left(self, ended: int) -> float:
        """Seconds that are left; ended: messages of the batch that have."""
        now = monotonic()
        if ended > self._ended:
            self._first = self._first or now - self._begun
            self._ended, self._last = ended, now
        if not ended:
            return self.until - now
        return min(self.until, self._last + max(self._quiet, 2 * self._first)) - now


class InFlight:
    """Sends batches with one publisher. changed: called when a message ended."""

    def __init__(self, publisher: Publisher, changed: Callable[[], None]) -> None:
        self._publisher = publisher
        self._changed = changed
        self._sendings: list[_Sending] = []

    def __bool__(self) -> bool:
        """Whether there is a message whose outcome is not recorded."""
        return bool(self._sendings)

    async def begin(
        self, messages: Sequence[Message], live: Callable[[], bool], timeout: float, *, as_one_queue: bool = False
    ) -> bool:
        """Begin to send a batch; return whether it ended at once. as_one_queue: one message after another."""
        sent = [replace(message, queue=b"") for message in messages] if as_one_queue else list(messages)
        sending = _Sending(messages, sent, self._changed)
        batch = Batch(sent, lambda: live() and not sending.closed, timeout, sending.progress)
        sending.task = asyncio.create_task(handed(self._publisher, batch))
        self._sendings.append(sending)
        await asyncio.sleep(0)
        return sending.task.done()

    async def wait(self, patience: float, over: Callable[[], bool]) -> None:
        """Wait for the last batch until it has ended, the patience is over, or `over` says so.

        If a publisher does not say which messages it has begun, wait until it ends.
        """
        *others, sending = self._sendings
        pace = Pace(patience, sum(len(other.left) for other in others))
        late = pace.until + LATE
        while not sending.task.done() and not over():
            left = pace.left(len(sending.progress.ended))
            if left <= 0 and sending.told_how_far:
                break
            await asyncio.wait({sending.task}, timeout=min(left, pace.look) if left > 0 else LOOK)
            if monotonic() > late:
                late = inf
                _say_late(len(sending.messages))
        self.close()

    def close(self) -> None:
        """Begin no more messages; messages that may have begun continue."""
        for sending in self._sendings:
            if not (sending.continues or sending.task.done()):
                sending.close()
                sending.task.add_done_callback(lambda task: self._changed())

    def ended(self) -> tuple[list[Message], list[Outcome]]:
        """The messages that have ended, with their outcomes, in order; the same ones again until `recorded`."""
        if len(self._sendings) == 1:
            return self._sendings[0].ended()
        messages: list[Message] = []
        outcomes: list[Outcome] = []
        for sending in self._sendings:
            more, theirs = sending.ended()
            messages += more
            outcomes += theirs
        return messages, outcomes

    def slow(self) -> list[Message]:
        """The messages that continue beside the next batches."""
        return [message for sending in self._sendings for message in sending.slow()]

    def messages(self) -> list[Message]:
        """All messages whose outcomes are not recorded."""
        return [sending.messages[position] for sending in self._sendings for position in sending.left]

    @property
    def any_ended(self) -> bool:
        """Whether a message has ended whose outcome is not recorded."""
        return bool(self.ended()[0])

    @property
    def unrecorded(self) -> bool:
        """Whether a message continues that is not recorded as slow yet."""
        return any(not sending.known for sending in self._sendings)

    @property
    def full(self) -> bool:
        """Whether no other batch may begin."""
        return len(self.messages()) >= SLOW

    def recorded(self) -> None:
        """The outcomes that `ended` returned last are recorded, and so are the messages that continue."""
        self._sendings = [sending for sending in self._sendings if sending.recorded()]

    async def abandon(self) -> None:
        """Cancel everything: another relay has these messages now, or will have them."""
        tasks = [sending.task for sending in self._sendings]
        self._sendings = []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LETTING_GO)


class _Sending:
    """One call of the publisher. left: positions of messages whose end the database does not know.

    closed: no more messages are begun. continues: it goes on beside others, or while its relay stops.
    known: whether the database knows which messages go on.
    """

    task: asyncio.Task[Sequence[Outcome]]

    def __init__(self, messages: Sequence[Message], sent: list[Message], changed: Callable[[], None]) -> None:
        self.messages = list(messages)
        self._sent = sent
        self.left = list(range(len(messages)))
        self.closed = False
        self.continues = False
        self.known = True
        self._told: list[int] = []
        self.progress = Progress(lambda: changed() if self.continues else None)

    @property
    def told_how_far(self) -> bool:
        """Whether the publisher says which messages it has begun."""
        return bool(self.progress.under_way or self.progress.ended)

    def close(self) -> None:
        """Begin no more messages, and go on with those that were begun: all, where the publisher does not say which."""
        self.closed = self.told_how_far
        self.continues = True
        self.known = False
        for position in self._begun():
            self.messages[position] = replace(self.messages[position], parked=True)

    def _begun(self) -> Collection[int]:
        """Places of messages that are being sent, or may be."""
        if self.task.done():
            return ()
        return self.progress.under_way if self.closed else self.left

    def ended(self) -> tuple[list[Message], list[Outcome]]:
        """The messages that ended, and those that will not be begun."""
        if self.task.done():
            return self._all_ended(self.task.result())
        begun, ended = self._begun(), self.progress.ended
        self._told = [position for position in self.left if position not in begun]
        return [self.messages[position] for position in self._told], [
            ended.get(position, UNTRIED) for position in self._told
        ]

    def _all_ended(self, outcomes: Sequence[Outcome]) -> tuple[list[Message], list[Outcome]]:
        """The same at the end of the call. What the publisher said of a message stands, whatever the call gave."""
        self._told = self.left
        if not self.closed:
            return self.messages, list(outcomes)
        ended = self.progress.ended
        return [self.messages[position] for position in self.left], [
            ended.get(position, outcomes[position]) for position in self.left
        ]

    def recorded(self) -> bool:
        """The database knows what `ended` said last; whether there is more to come."""
        told = set(self._told) if self._told is not self.left else None
        self.left = [] if told is None else [position for position in self.left if position not in told]
        if self.left and told:
            self._let_go(told)
        self._told = []
        self.known = True
        return bool(self.left)

    def _let_go(self, positions: Collection[int]) -> None:
        """Drop the payloads of messages that ended: one slow message must not keep its whole batch in memory."""
        for position in positions:
            self.messages[position] = self._sent[position] = replace(self.messages[position], payload=b"", headers={})

    def slow(self) -> list[Message]:
        """The messages that are still being sent."""
        begun = self._begun()
        return [self.messages[position] for position in self.left if position in begun] if begun else []


def _say_late(count: int) -> None:
    log.warning(
        "the publisher has had %d messages for %g s and does not say how far it is; nothing else is sent. "
        "A function that is not a coroutine function needs time-outs of its own",
        count,
        LATE,
    )
