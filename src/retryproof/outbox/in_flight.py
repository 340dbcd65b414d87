"""What a relay is sending: batches given to the publisher, and messages that take longer than a batch may (T6).

A batch has a moment, the relay's patience, or less where others hang already. What is being sent when it is over goes
on by itself, one message for each of its queues; what was not begun is given back, as untried. The relay holds those
queues back, ends what is done, and takes its next batch. A message that a dead relay left has its moment by itself:
what kills a relay does so at once, as a rule, and where it takes longer, all that was on its way is tried by itself
again. Its last attempt has nothing that is begun beside it, however long it takes, so that no message is given up for
what another one did (C15).

What landed stays here until the database knows, so that a lost answer costs nothing.
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
"""Messages that may be on their way beside a batch; with more, the relay waits for one to end."""

LATE = 60.0
"""Seconds after which a publisher is named that has a batch, and does not say how far it is."""
SHORTEST = 16
"""Parts of the patience, of which a batch has one at least after the last of its messages ended."""
LOOK = 0.25
"""Seconds between two looks whether the relay is to stop, while a batch is waited for."""
LETTING_GO = 1.0
"""Seconds that what is being sent has to notice that it is cancelled."""

log = logging.getLogger("retryproof.relay")


class Pace:
    """How long a batch is waited for: its patience, and less once the rest of it has ended and others go on already.

    Where one message of a hundred hangs, each batch has one; with the whole patience for each, all keys would wait.
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
    """Sends batches with one publisher. changed: called when something landed."""

    def __init__(self, publisher: Publisher, changed: Callable[[], None]) -> None:
        self._publisher = publisher
        self._changed = changed
        self._sendings: list[_Sending] = []

    def __bool__(self) -> bool:
        """Whether the database does not know yet what came of something."""
        return bool(self._sendings)

    async def begin(
        self, messages: Sequence[Message], live: Callable[[], bool], timeout: float, *, as_one_queue: bool = False
    ) -> bool:
        """Begin to send a batch; whether that was all. as_one_queue: one message after another."""
        sent = [replace(message, queue=b"") for message in messages] if as_one_queue else list(messages)
        sending = _Sending(messages, sent, self._changed)
        batch = Batch(sent, lambda: live() and not sending.closed, timeout, sending.progress)
        sending.task = asyncio.create_task(handed(self._publisher, batch))
        self._sendings.append(sending)
        await asyncio.sleep(0)
        return sending.task.done()

    async def go_on(self, patience: float, over: Callable[[], bool]) -> None:
        """Wait until the batch that was begun last ended, or patience is over; over: whether nothing is waited for.

        A publisher that does not say which messages it has begun has as long as it takes.
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
        """Begin no more messages; what may have been begun goes on."""
        for sending in self._sendings:
            if not (sending.kept or sending.task.done()):
                sending.close()
                sending.task.add_done_callback(lambda task: self._changed())

    def landed(self) -> tuple[list[Message], list[Outcome]]:
        """What the database has to be told, in order; the same again until `noted`."""
        if len(self._sendings) == 1:
            return self._sendings[0].landed()
        messages: list[Message] = []
        outcomes: list[Outcome] = []
        for sending in self._sendings:
            more, theirs = sending.landed()
            messages += more
            outcomes += theirs
        return messages, outcomes

    def slow(self) -> list[Message]:
        """What goes on beside the next batches, as it stands there: parked."""
        return [message for sending in self._sendings for message in sending.slow()]

    def on_their_way(self) -> list[Message]:
        """Whatever the database does not know the end of."""
        return [sending.messages[position] for sending in self._sendings for position in sending.left]

    @property
    def any_landed(self) -> bool:
        """Whether there is something that the database does not know of."""
        return bool(self.landed()[0])

    @property
    def unheld(self) -> bool:
        """Whether the database does not know yet of a message that goes on."""
        return any(not sending.held for sending in self._sendings)

    @property
    def full(self) -> bool:
        """Whether no other batch is to be begun."""
        return len(self.on_their_way()) >= SLOW

    def noted(self) -> None:
        """The database knows what `landed` said last, and what goes on."""
        self._sendings = [sending for sending in self._sendings if sending.noted()]

    async def abandon(self) -> None:
        """Let go of everything: it is another relay's by now, or will be."""
        tasks = [sending.task for sending in self._sendings]
        self._sendings = []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LETTING_GO)


class _Sending:
    """One call of the publisher. left: positions of messages whose end the database does not know.

    closed: no more messages are begun. kept: it goes on beside others, or after its relay. held: the database knows.
    """

    task: asyncio.Task[Sequence[Outcome]]

    def __init__(self, messages: Sequence[Message], sent: list[Message], changed: Callable[[], None]) -> None:
        self.messages = list(messages)
        self._sent = sent
        self.left = list(range(len(messages)))
        self.closed = False
        self.kept = False
        self.held = True
        self._told: list[int] = []
        self.progress = Progress(lambda: changed() if self.kept else None)

    @property
    def told_how_far(self) -> bool:
        """Whether the publisher says which messages it has begun."""
        return bool(self.progress.under_way or self.progress.ended)

    def close(self) -> None:
        """Begin no more messages, and go on with those begun: all, where the publisher does not say which."""
        self.closed = self.told_how_far
        self.kept = True
        self.held = False
        for position in self._begun():
            self.messages[position] = replace(self.messages[position], parked=True)

    def _begun(self) -> Collection[int]:
        """Places of messages that are being sent, or may be."""
        if self.task.done():
            return ()
        return self.progress.under_way if self.closed else self.left

    def landed(self) -> tuple[list[Message], list[Outcome]]:
        """What ended, or was not begun and is not to be."""
        if self.task.done():
            return self._all_landed(self.task.result())
        begun, ended = self._begun(), self.progress.ended
        self._told = [position for position in self.left if position not in begun]
        return [self.messages[position] for position in self._told], [
            ended.get(position, UNTRIED) for position in self._told
        ]

    def _all_landed(self, outcomes: Sequence[Outcome]) -> tuple[list[Message], list[Outcome]]:
        """The same at the end of the call; what was noted of a message stands, whatever became of the call."""
        self._told = self.left
        if not self.closed:
            return self.messages, list(outcomes)
        ended = self.progress.ended
        return [self.messages[position] for position in self.left], [
            ended.get(position, outcomes[position]) for position in self.left
        ]

    def noted(self) -> bool:
        """The database knows what was told last; whether there is more to come."""
        told = set(self._told) if self._told is not self.left else None
        self.left = [] if told is None else [position for position in self.left if position not in told]
        if self.left and told:
            self._let_go(told)
        self._told = []
        self.held = True
        return bool(self.left)

    def _let_go(self, positions: Collection[int]) -> None:
        """Forget what was in messages that ended: one that takes long must not keep a batch of them in memory."""
        for position in positions:
            self.messages[position] = self._sent[position] = replace(self.messages[position], payload=b"", headers={})

    def slow(self) -> list[Message]:
        """What is being sent still."""
        begun = self._begun()
        return [self.messages[position] for position in self.left if position in begun]


def _say_late(count: int) -> None:
    log.warning(
        "the publisher has had %d messages for %g s and does not say how far it is; nothing else is sent. "
        "A function that is not a coroutine function needs time-outs of its own",
        count,
        LATE,
    )
