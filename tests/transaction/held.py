"""What an operation holds for long, and the short ones beside it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from retryproof import Idempotency, Policy

LEASE = 0.5


HELD = 4 * LEASE


SHORT = Policy(lease=LEASE)


def work(seconds: float) -> str:
    until = time.monotonic() + seconds
    threading.Event().wait(until - time.monotonic())
    return "done"


def run_short_ones(engine: Idempotency, seconds: float) -> float:
    """One short operation after the other, some of which fail; the longest any of them took."""
    longest, until, number = 0.0, time.monotonic() + seconds, 0
    while (began := time.monotonic()) < until:
        number += 1
        if number % 2:
            engine.run(f"short {number}", lambda: "done", scope="s")
        else:
            with pytest.raises(ValueError, match="refused"):
                engine.run(f"short {number}", refuse, scope="s")
        longest = max(longest, time.monotonic() - began)
    return longest


def refuse() -> None:
    raise ValueError("refused")


@contextlib.contextmanager
def in_a_thread(function: Any) -> Iterator[list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001  # for the test to look at
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(30)
