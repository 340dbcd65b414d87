"""How often a relay tries a destination that is out of reach (T6).

Each message has its own pauses, but ten thousand due messages would each try a dead receiver. So after a few failures
in a row without any answer, a relay tries only some messages, and then pauses, longer each time. Any answer, about any
message, ends this at once. The breaker is in a relay's memory: nothing is counted against a message that waits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import monotonic

from retryproof.publishers.base import Delivered, Failed, Outcome

PROBES = 8
"""Failures in a row without an answer after which a destination counts as down; and messages that one look tries, of
those that never failed and of others each."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""The longest pause in seconds, after which a receiver that came back is noticed."""


class Breaker:
    """Whether a destination seems to be down, and when it may be tried again."""

    def __init__(self) -> None:
        self._silent = 0
        self._pause = 0.0
        self._until = 0.0
        self._left = {False: 0, True: 0}

    @property
    def down(self) -> bool:
        """Whether it seems to be down."""
        return self._silent >= PROBES

    @property
    def closed_for(self) -> float:
        """Seconds until it may be tried; 0 at once."""
        return max(0.0, self._until - monotonic()) if self.down else 0.0

    def admits(self, *, fresh: bool) -> bool:
        """Whether one more message may be sent to it now; those that never failed have room of their own.

        Where some keys are answered and others never, messages that failed before must not take all of it.
        """
        if not self.down:
            return True
        if self.closed_for or not self._left[fresh]:
            return False
        self._left[fresh] -= 1
        return True

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Update the state from the outcomes of messages that were sent."""
        silent = [outcome for outcome in outcomes if isinstance(outcome, Failed) and outcome.counts_as == "unreachable"]
        if any(isinstance(outcome, Delivered) or _answered(outcome) for outcome in outcomes):
            self._silent, self._pause = 0, 0.0
        elif silent:
            self._silent += len(silent)
            if self.down:
                self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
                self._until = monotonic() + self._pause * random.uniform(0.5, 1.0)
                self._left = {False: PROBES, True: PROBES}


def _answered(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and outcome.counts_as == "answer"
