"""Runs that continue without their clients (H11)."""

from __future__ import annotations

from threading import Lock
from typing import Protocol

from retryproof.core.failure import causes

_TOO_MANY = "too many requests run without their clients"


class ClientLeft(OSError):
    """Raised in an app that sends to a client that has left, if the app has to stop."""


class Departing(Protocol):
    """The app's run for one request, which may continue without its client."""

    def stop(self, why: str) -> None:
        """Cancel it; `why` is for the log."""


class Departed:
    """The runs of one middleware without clients, in the order in which the clients left; their number is bounded.

    Above the limit, the run that has been without its client for longest is stopped. So a run that is about to end is
    usually not stopped, and one that never ends is stopped first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()  # a server may run requests in threads
        self._runs: dict[Departing, None] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Departing) -> None:
        """This run has no client any more."""
        with self._lock:
            self._runs[run] = None
            if len(self._runs) <= self._limit:
                return
            longest = next(iter(self._runs))
            del self._runs[longest]
        longest.stop(_TOO_MANY)

    def discard(self, run: Departing) -> None:
        """It has ended, or is about to."""
        self._runs.pop(run, None)


def is_of_departure(error: BaseException) -> bool:
    """Whether an exception comes of our telling the app that its client has left, however it was wrapped."""
    return any(isinstance(found, ClientLeft) for found in causes(error))
