"""Phased operations of plain functions, in threads, and the completer that runs them on (T3)."""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.transaction import BlockingPhased, Completer
from tests.transaction.support import Database, insert

pytestmark = pytest.mark.timeout(60)


class Crash(BaseException):
    """Ends an attempt as its process's death would."""


@dataclass
class Shop:
    """Orders in two phases, with a step between them."""

    database: Database
    phased: BlockingPhased
    failure: BaseException | None = None
    meanwhile: Callable[[], object] = lambda: None
    keys: set[UUID] = field(default_factory=set)
    threads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        @self.phased.function("order")
        def order(number: int) -> tuple[str, ...]:
            operation = current_operation()
            with operation.phase("reserve") as phase:
                if phase.pending:
                    phase.connection.execute(insert(number))
            operation.step("charge", self.charge)
            with operation.phase("confirm") as phase:
                if phase.pending:
                    phase.connection.execute(insert(number + 100))
            return operation.principal

        self.order = order

    def charge(self, key: UUID) -> int:
        self.keys.add(key)
        self.threads.add(threading.current_thread().name)
        if self.failure is not None:
            raise self.failure
        self.meanwhile()
        return 1

    def abandon(self, key: str, number: int) -> None:
        self.failure = Crash()
        with pytest.raises(Crash):
            self.order.run(key, number, scope=("acme", "ann"))
        self.failure = None
        self.database.execute("UPDATE retryproof_operations SET lease_until = 0 WHERE state = 1")
        self.database.execute("UPDATE retryproof_phased SET due_at = 0")


def connecting(database: Database) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def connected() -> Iterator[Any]:
        if database.postgres:
            with psycopg.connect(database.store) as connection:
                yield connection
        else:
            with contextlib.closing(sqlite3.connect(str(database.path), isolation_level=None)) as found:
                yield found

    return connected


@pytest.fixture
def shop(database: Database) -> Iterator[Shop]:
    with Idempotency(database.store) as engine:
        yield Shop(database, BlockingPhased(engine, connect=connecting(database)))


async def test_t3_a_completer_runs_plain_functions_on_in_threads(shop: Shop) -> None:
    for number in (1, 2, 3):
        shop.abandon(f"k{number}", number)
    completer = Completer(shop.phased)
    found = await completer.run_once()
    assert (found.taken, found.completed) == (3, 3)
    assert shop.database.charges() == [1, 2, 3, 101, 102, 103]
    assert len(shop.keys) == 3, "one for each operation, whoever calls"
    assert {name.split("_")[0] for name in shop.threads} == {"MainThread", "retryproof-completer"}
    assert await completer.entries() == []
    outcome = shop.order.run("k1", 1, scope=("acme", "ann"))
    assert (outcome.value, outcome.replayed, outcome.attempt) == (("acme", "ann"), True, 2)


async def test_what_raises_in_a_thread_is_tried_again(shop: Shop) -> None:
    shop.abandon("k", 1)
    shop.failure = ValueError("no")
    completer = Completer(shop.phased)
    assert (await completer.run_once()).failed == 1
    (entry,) = await completer.entries()
    assert entry.reason == "builtins.ValueError"
    shop.failure = None
    assert shop.order.run("k", 1, scope=("acme", "ann")).attempt == 2
    assert shop.database.charges() == [1, 101]
    assert await completer.entries() == []


async def test_a_thread_that_hangs_past_max_run_is_left_behind_and_fenced_off(database: Database) -> None:
    """It cannot be cancelled; the look ends all the same, and what it does later is not committed."""
    with Idempotency(database.store, policy=Policy(lease=0.2, max_run=0.2)) as engine:
        shop = Shop(database, BlockingPhased(engine, connect=connecting(database)))
        shop.abandon("k", 1)
        released = threading.Event()
        shop.meanwhile = lambda: released.wait(30)
        completer = Completer(shop.phased)
        try:
            assert (await completer.run_once()).failed == 1
            (entry,) = await completer.entries()
            assert entry.reason == "retryproof.phased.completer.TooLong"
            shop.meanwhile = lambda: None
            database.execute("UPDATE retryproof_operations SET lease_until = 0 WHERE state = 1")
            database.execute("UPDATE retryproof_phased SET due_at = 0")
            assert (await completer.run_once()).completed == 1
        finally:
            released.set()
    assert database.charges() == [1, 101]


def test_each_colour_has_its_own_kind() -> None:
    phased = BlockingPhased(Idempotency("memory://"))

    async def awaited(given: int) -> None: ...

    with pytest.raises(errors.ConfigurationError, match="use Phased"):
        phased.function("one")(awaited)
    with pytest.raises(errors.ConfigurationError, match="use Phased"):
        BlockingPhased(AsyncIdempotency("memory://"))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(errors.ConfigurationError, match="1 to 255"):
        phased.function("")
