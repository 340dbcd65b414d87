"""An exception that a signal raises, at each place where Python would raise it: nothing stays held, others go on.

Python calls a signal's handler where a function of Python code begins and where one of C has returned. A profiler is
told of both, and what it raises comes from there: unlike a tracer's, which may strike between a `with` and its lock.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from retryproof import Idempotency, Policy
from retryproof.attempt import BlockingAttempt
from retryproof.batches import Item, begin_many, finish_many
from retryproof.core.commands import Returned
from retryproof.core.record import State
from retryproof.stores.base import Store
from retryproof.stores.memory import MemoryStore
from retryproof.stores.opened import Opened
from retryproof.stores.sql.sqlite import SqliteStore
from tests.engine.support import SECONDS, in_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

OURS = "/src/retryproof/"
BESIDE = ("contextlib.py", "threading.py", "_base.py")
"""Python code of the standard library that ours calls while it holds something."""
SIDE_BY_SIDE = 16
"""Places that are tried at once: most of the time each waits for the keeper to see to what is left."""


class Interrupted(BaseException):
    """As Ctrl-C, or a task queue's time limit."""


class Signal:
    """A signal that comes at the nth place in our code; `where` says which that was."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_return") or not _is_ours(frame):
            return
        self._left -= 1
        if self._left == 0:
            self.where = f"{event} at {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name} {argument}"
            raise Interrupted


def _is_ours(frame: FrameType) -> bool:
    if not frame.f_code.co_filename.endswith(BESIDE):
        return OURS in frame.f_code.co_filename
    caller = frame.f_back
    return caller is not None and _is_ours(caller)


@contextlib.contextmanager
def memory(tmp_path: Path, number: int) -> Iterator[Store]:
    yield MemoryStore()


@contextlib.contextmanager
def sqlite(tmp_path: Path, number: int) -> Iterator[Store]:
    store = SqliteStore(str(tmp_path / f"{number}.db"))
    yield store
    store.close()


class Caller:
    """Who calls an engine. began: how often its work has begun."""

    def __init__(self, store: Store) -> None:
        self.engine = Idempotency(store, policy=Policy(lease=30.0))
        self.store = store
        self.began = 0

    def work(self) -> str:
        self.began += 1
        return "done"

    def fail(self) -> str:
        self.began += 1
        raise ValueError("declined")

    def id(self, key: str) -> bytes:
        return self.engine.id_of("s", key)

    def run(self, key: str = "k") -> object:
        return self.engine.run(key, self.work, scope="s").value


def first_of_all(caller: Caller) -> None:
    caller.run()


def new(caller: Caller) -> None:
    caller.run()


def failing(caller: Caller) -> None:
    with contextlib.suppress(ValueError):
        caller.engine.run("k", caller.fail, scope="s")


def replayed(caller: Caller) -> None:
    caller.run("before")


def many(caller: Caller) -> None:
    """A batch, in one commit."""
    opened, policy = caller.engine.opened(), caller.engine.policy
    items = [Item(caller.id(key), b"\0\0same") for key in ("k", "l", "m")]
    begun = begin_many(caller.engine.attempts, opened, policy, items)
    try:
        caller.began += 1
        finish_many([(attempt, Returned(b"1")) for attempt in begun if isinstance(attempt, BlockingAttempt)], opened)
    finally:
        held = [attempt for attempt in begun if isinstance(attempt, BlockingAttempt)]
        try:
            leave(held)
        except Interrupted:
            leave(held)
            raise


def leave(attempts: Sequence[BlockingAttempt]) -> None:
    for attempt in attempts:
        attempt.leave()


def administration(caller: Caller) -> None:
    ids = [caller.id("before"), caller.id("k")]
    caller.store.get(ids)
    caller.store.scan()
    caller.store.evict(ids)
    caller.store.reap()


SCENARIOS: list[Callable[[Caller], None]] = [first_of_all, new, failing, replayed, many, administration]


@pytest.mark.parametrize("make", [memory, sqlite], ids=lambda make: make.__name__)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interruption_at_any_place_leaves_nothing_held(
    make: Callable[[Path, int], contextlib.AbstractContextManager[Store]],
    scenario: Callable[[Caller], None],
    tmp_path: Path,
) -> None:
    found: list[tuple[str, list[str]]] = []
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for first in itertools.count(1, SIDE_BY_SIDE):
            tries = [
                pool.submit(interrupted_at, number, make, scenario, tmp_path)
                for number in range(first, first + SIDE_BY_SIDE)
            ]
            came = [place.result(4 * SECONDS) for place in tries]
            found += [(where, problems) for where, problems in came if problems]
            if not all(where for where, _ in came):
                break
    assert found == []
    assert first > 1


def interrupted_at(
    number: int,
    make: Callable[[Path, int], contextlib.AbstractContextManager[Store]],
    scenario: Callable[[Caller], None],
    tmp_path: Path,
) -> tuple[str, list[str]]:
    """At which place the scenario was interrupted, none where it ended before, and what was held afterwards."""
    signal = Signal(number)
    with make(tmp_path, number) as store:
        caller = Caller(store)
        if scenario is not first_of_all:
            caller.run("before")
        caller.began = 0
        in_thread(lambda: interrupt(caller, scenario, signal)).result(SECONDS)
        problems = what_is_left(caller)
        caller.engine.close(0.0)
    return signal.where, problems


def interrupt(caller: Caller, scenario: Callable[[Caller], None], signal: Signal) -> None:
    """The scenario, interrupted by this signal."""
    with contextlib.suppress(Interrupted):
        sys.setprofile(signal)
        try:
            scenario(caller)
        finally:
            sys.setprofile(None)


def what_is_left(caller: Caller) -> list[str]:
    """What another thread finds wrong; what the keeper is to see to has a moment."""
    other = threading.Thread(target=caller.run, args=("other",), daemon=True)
    other.start()
    other.join(1.5)  # less than a store's time-out
    if other.is_alive():
        return ["another thread waits"]
    until = time.monotonic() + 1.0
    opened = caller.engine.opened()
    while (problems := held(caller, opened)) and time.monotonic() < until:
        threading.Event().wait(0.005)
    return problems


def held(caller: Caller, opened: Opened) -> list[str]:
    keeper, line = opened.background, opened._threads
    signs: dict[str, object] = {
        "holds": keeper.holds,
        "a count of who is at work": keeper._active,
        "a count of who was taken over": keeper._suspects,
        "the line's lead": line.leader,
        "the line's mutex": line.mutex.locked(),
        "commands in line": line._pending,
        "commands on their way": line._flying,
    }
    if isinstance(caller.store, SqliteStore):
        file = caller.store._file
        signs["a group"] = file._grouped
        signs["a transaction"] = file._connection is not None and file._connection.in_transaction
    if caller.began == 0:
        records = caller.store.get([caller.id("k"), caller.id("l"), caller.id("m")])
        signs["claims"] = any(record is not None and record.state is State.IN_PROGRESS for record in records)
    return [sign for sign, is_held in signs.items() if is_held]
