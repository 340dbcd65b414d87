"""The alarm that cuts a connection of asyncpg at the deadline of the call which uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from retryproof.sql.postgres.asyncpg import _Line


class Loop:
    """An event loop's clock and timers, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, call))
        return self.timers[-1]

    def move(self, now: float) -> None:
        self.now = now
        due = [timer for timer in self.timers if timer.when <= now and not timer.cancelled]
        self.timers = [timer for timer in self.timers if timer.when > now]
        for timer in due:
            timer.call()


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when, self.call, self.cancelled = when, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Connection:
    cut = False

    def terminate(self) -> None:
        self.cut = True


@pytest.fixture
def loop() -> Loop:
    return Loop()


def line_on(loop: Loop) -> tuple[_Line, Connection]:
    connection: Any = Connection()
    on: Any = loop
    return _Line(connection, on), connection


def test_a_call_is_cut_at_its_deadline(loop: Loop) -> None:
    line, connection = line_on(loop)
    line.begin(2.0)
    loop.move(1.9)
    assert not connection.cut
    loop.move(2.0)
    assert connection.cut


def test_a_call_after_others_is_cut_at_its_own_deadline(loop: Loop) -> None:
    """Though the alarm was set for the first of them."""
    line, connection = line_on(loop)
    line.begin(2.0)
    line.end()
    loop.move(1.5)
    line.begin(3.5)
    loop.move(2.0)
    assert not connection.cut
    loop.move(3.5)
    assert connection.cut


def test_an_idle_connection_is_kept_and_the_next_call_has_a_deadline_again(loop: Loop) -> None:
    line, connection = line_on(loop)
    line.begin(2.0)
    line.end()
    loop.move(10.0)
    assert not connection.cut
    line.begin(12.0)
    loop.move(12.0)
    assert connection.cut


def test_many_calls_set_one_alarm(loop: Loop) -> None:
    line, _ = line_on(loop)
    for number in range(100):
        loop.move(number / 1_000)
        line.begin(loop.now + 2.0)
        line.end()
    assert len(loop.timers) == 1


def test_what_was_given_back_to_its_pool_is_left_alone(loop: Loop) -> None:
    line, connection = line_on(loop)
    line.begin(2.0)
    line.release()
    loop.move(5.0)
    assert not connection.cut
