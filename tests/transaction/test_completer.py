"""The completer runs on what was abandoned, from its last recovery point, without its client (T3)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiosqlite
import asyncpg
import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, current_operation, errors
from retryproof.core.record import Record
from retryproof.phased.completer import Round
from retryproof.reaper import reap_all
from retryproof.sql.plan import Statement
from retryproof.sql.postgres.worklist import PostgresWorklist
from retryproof.sql.sqlite.worklist import SqliteWorklist
from retryproof.stores import open_store
from retryproof.transaction import Completer, Phased
from tests.transaction.support import Database, insert

NOTHING = {True: r"'\x00'", False: "X'00'"}
pytestmark = pytest.mark.timeout(60)


class Crash(BaseException):
    """Ends an attempt as its process's death would."""


@dataclass(frozen=True)
class Order:
    number: int
    note: str = ""


@dataclass
class Shop:
    """Orders in two phases, with a foreign call between them that crashes or raises when told to."""

    database: Database
    engine: AsyncIdempotency
    phased: Phased
    calls: list[str] = field(default_factory=list)
    principals: list[tuple[str, ...]] = field(default_factory=list)
    failure: BaseException | None = None
    failures: dict[int, BaseException] = field(default_factory=dict)
    meanwhile: Callable[[], Awaitable[None]] | None = None
    running: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        @self.phased.function("order")
        async def order(given: Order) -> dict[str, Any]:
            operation = current_operation()
            self.principals.append(operation.principal)
            async with operation.phase("reserve") as phase:
                if phase.pending:
                    await phase.connection.execute(insert(given.number))
                    phase.result = operation.attempt
            await self.call(given.number, str(operation.derive("charge")))
            async with operation.phase("confirm") as confirm:
                if confirm.pending:
                    await confirm.connection.execute(insert(given.number + 100))
            return {"number": given.number, "reserved": phase.result, "finished": operation.attempt}

        self.order = order
        self.completer = Completer(self.phased)

    async def call(self, number: int, key: str) -> None:
        """The foreign call."""
        self.calls.append(key)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            failure = self.failure or self.failures.get(number)
            if failure is not None:
                raise failure
            if self.meanwhile is not None:
                await self.meanwhile()
        finally:
            self.running -= 1

    async def abandon(self, key: str = "k", number: int = 1) -> None:
        """An attempt dies between its phases, and its lease is over."""
        self.failure = Crash()
        with pytest.raises(Crash):
            await self.order.run(key, Order(number), scope=("acme", "ann"))
        self.failure = None
        self.expire()

    def expire(self) -> None:
        self.database.execute("UPDATE retryproof_operations SET lease_until = 0 WHERE state = 1")
        self.due()

    def due(self) -> None:
        self.database.execute("UPDATE retryproof_phased SET due_at = 0")


@contextlib.asynccontextmanager
async def lent(path: str) -> AsyncIterator[aiosqlite.Connection]:
    async with aiosqlite.connect(path, isolation_level=None) as connection:
        yield connection


@contextlib.asynccontextmanager
async def shop_over(database: Database, url: str = "", **options: Any) -> AsyncIterator[Shop]:
    async with contextlib.AsyncExitStack() as stack:
        if database.postgres:
            pool = await stack.enter_async_context(asyncpg.create_pool(database.store, min_size=1, max_size=4))
            connect: Any = pool.acquire
        else:
            connect = lambda: lent(str(database.path))  # noqa: E731
        engine = await stack.enter_async_context(AsyncIdempotency(url or database.store, **options))
        yield Shop(database, engine, Phased(engine, connect=connect))


@pytest.fixture
async def shop(database: Database) -> AsyncIterator[Shop]:
    async with shop_over(database) as made:
        yield made


async def test_t3_a_completer_goes_on_from_the_last_recovery_point(shop: Shop) -> None:
    """And the client's retry gets what it stored."""
    await shop.abandon()
    found = await shop.completer.run_once()
    assert (found.taken, found.completed) == (1, 1)
    assert shop.database.charges() == [1, 101]
    outcome = await shop.order.run("k", Order(1), scope=("acme", "ann"))
    assert outcome.replayed
    assert outcome.value == {"number": 1, "reserved": 1, "finished": 2}
    assert len(set(shop.calls)) == 1, "the foreign call has the same key on every attempt"
    assert set(shop.principals) == {("acme", "ann")}
    assert await shop.completer.entries() == []


async def test_the_clients_retry_goes_on_as_well_and_leaves_nothing_to_complete(shop: Shop) -> None:
    await shop.abandon()
    outcome = await shop.order.run("k", Order(1), scope=("acme", "ann"))
    assert (outcome.replayed, outcome.attempt) == (False, 2)
    assert shop.database.charges() == [1, 101]
    assert await shop.completer.entries() == []
    assert (await shop.completer.run_once()).taken == 0


async def test_what_completes_at_once_leaves_the_worklist_with_its_completion(shop: Shop) -> None:
    await shop.order.run("k", Order(1), scope="acme")
    assert await shop.completer.entries() == []


async def test_what_is_running_is_left_alone(shop: Shop) -> None:
    await shop.abandon()
    shop.database.execute("UPDATE retryproof_operations SET lease_until = lease_until + 60000000000000000")
    found = await shop.completer.run_once()
    assert (found.taken, found.running) == (1, 1)
    assert shop.database.charges() == [1]
    assert (await shop.completer.run_once()).taken == 0, "it is looked at when its lease should be over"


async def test_what_raises_is_released_and_tried_again_later(shop: Shop) -> None:
    shop.failure = ValueError("card number 4242")
    with pytest.raises(ValueError, match="card"):
        await shop.order.run("k", Order(1), scope="acme")
    shop.due()
    assert (await shop.completer.run_once()).failed == 1
    (entry,) = await shop.completer.entries()
    assert (entry.tries, entry.reason) == (1, "builtins.ValueError")
    assert entry.due_at > entry.listed_at
    shop.failure = None
    shop.due()
    assert (await shop.completer.run_once()).completed == 1
    assert shop.database.charges() == [1, 101]


async def test_t3_what_failed_goes_on_from_its_recovery_point_however_late_it_is_asked_for(shop: Shop) -> None:
    """Past its retention, and no completer ran: part of the effect is there, so that it never starts anew (I7, C12)."""
    shop.failure = ValueError()
    with pytest.raises(ValueError):
        await shop.order.run("k", Order(1), scope=("acme", "ann"))
    shop.failure = None
    shop.database.execute("UPDATE retryproof_operations SET expires_at = 0")
    outcome = await shop.order.run("k", Order(1), scope=("acme", "ann"))
    assert (outcome.replayed, outcome.attempt) == (False, 1)
    assert shop.database.charges() == [1, 101]
    assert len(set(shop.calls)) == 1, "the foreign call has the same key"
    assert await shop.completer.entries() == []


async def test_t3_a_completer_that_comes_late_goes_on_with_what_failed(shop: Shop) -> None:
    shop.failure = ValueError()
    with pytest.raises(ValueError):
        await shop.order.run("k", Order(1), scope=("acme", "ann"))
    shop.failure = None
    shop.database.execute("UPDATE retryproof_operations SET expires_at = 0")
    shop.due()
    assert (await shop.completer.run_once()).completed == 1
    assert shop.database.charges() == [1, 101]


async def test_an_unknown_function_is_recorded_and_left(shop: Shop) -> None:
    await shop.abandon()
    del shop.phased.functions["order"]
    assert (await shop.completer.run_once()).failed == 1
    (entry,) = await shop.completer.entries()
    assert entry.reason == "no function 'order' is registered"
    assert shop.database.charges() == [1]


async def test_c15_a_poisoned_operation_is_left_to_an_operator_and_goes_when_it_is_settled(database: Database) -> None:
    async with shop_over(database, policy=Policy(max_attempts=2)) as shop:
        await shop.abandon()
        shop.failure = Crash()
        with pytest.raises(Crash):
            await shop.completer.run_once()
        shop.failure = None
        shop.expire()
        assert (await shop.completer.run_once()).failed == 1
        (entry,) = await shop.completer.entries()
        assert entry.reason
        assert shop.database.charges() == [1]
        database.execute("UPDATE retryproof_operations SET state = 4")
        shop.due()
        assert (await shop.completer.run_once()).dropped == 1
        assert await shop.completer.entries() == []


async def test_what_fails_for_too_long_is_given_up_and_stays_listed(shop: Shop) -> None:
    await shop.abandon()
    shop.failure = ValueError("no")
    shop.database.execute("UPDATE retryproof_phased SET listed_at = 0")
    assert (await shop.completer.run_once()).failed == 1
    (entry,) = await shop.completer.entries()
    assert entry.due_at - entry.listed_at > 10 * 365 * 86400 * 1_000_000
    shop.failure = None
    assert (await shop.completer.run_once()).taken == 0
    assert await shop.completer.revive() == 1
    assert (await shop.completer.run_once()).completed == 1


async def test_a_row_whose_record_has_gone_is_dropped_and_never_run(shop: Shop) -> None:
    await shop.abandon()
    shop.database.execute("DELETE FROM retryproof_operations")
    assert (await shop.completer.run_once()).dropped == 1
    assert shop.database.charges() == [1]
    assert await shop.completer.entries() == []


@pytest.mark.parametrize("released", [True, False], ids=["that failed", "that died"])
async def test_c12_the_reaper_ends_and_lists_what_was_never_finished(shop: Shop, released: bool) -> None:
    """And the worklist has it no more."""
    shop.failure = ValueError() if released else Crash()
    with pytest.raises((ValueError, Crash)):
        await shop.order.run("k", Order(1), scope="acme")
    shop.expire()
    shop.database.execute("UPDATE retryproof_operations SET expires_at = 0")
    store = open_store(shop.database.store)
    ended: list[Record] = []
    totals = reap_all(store, on_ended=ended.append)
    store.close()
    assert (totals.settled, totals.unsettled, len(ended)) == (0, 1, 1)
    assert await shop.completer.entries() == []


@pytest.mark.parametrize("ending", ["reap", "evict"])
async def test_no_input_outlives_its_operation_where_no_completer_runs(shop: Shop, ending: str) -> None:
    """It was settled by hand, and its retention is over; or it was evicted."""
    await shop.abandon()
    (entry,) = await shop.completer.entries()
    store = open_store(shop.database.store)
    if ending == "evict":
        assert list(store.evict([entry.id])) == [True]
    else:
        shop.database.execute("UPDATE retryproof_operations SET state = 4, checkpoints = NULL, expires_at = 0")
        totals = reap_all(store)
        assert (totals.settled, totals.unsettled) == (1, 0)
    store.close()
    assert await shop.completer.entries() == []


async def test_a_record_of_a_later_life_is_not_taken_for_the_one_that_was_listed(shop: Shop) -> None:
    """It was evicted after the completer had seen it, and its key used again."""
    from retryproof.phased.functions import RecordGone

    await shop.abandon()
    (entry,) = await shop.completer.entries()
    shop.database.execute("DELETE FROM retryproof_operations")
    with pytest.raises(RecordGone):
        await shop.order.complete(entry)
    assert shop.database.charges() == [1]


async def test_any_number_of_completers_run_each_operation_once(shop: Shop) -> None:
    for number in range(1, 9):
        await shop.abandon(f"k{number}", number)
    rounds = await asyncio.gather(*(Completer(shop.phased, batch=4).run_once() for _ in range(4)))
    assert sum(found.completed for found in rounds) == 8
    assert sorted(shop.database.charges()) == sorted([*range(1, 9), *range(101, 109)])


async def test_one_function_that_is_cancelled_from_inside_ends_no_completer(shop: Shop) -> None:
    """The client's task of a library it uses, say; the neighbour is completed."""
    await shop.abandon("k1", 1)
    await shop.abandon("k2", 2)
    shop.failures = {1: asyncio.CancelledError()}
    found = await shop.completer.run_once()
    assert (found.taken, found.completed, found.failed) == (2, 1, 1)
    (entry,) = await shop.completer.entries()
    assert entry.reason == "asyncio.exceptions.CancelledError"


async def test_an_error_of_another_operation_inside_of_the_function_drops_nothing(shop: Shop) -> None:
    """A result that was omitted, of an operation that the function calls."""
    await shop.abandon()
    shop.failures = {1: errors.ResultOmitted("of another one", digest="0123456789abcdef")}
    assert (await shop.completer.run_once()).failed == 1
    shop.failures = {}
    shop.due()
    assert (await shop.completer.run_once()).completed == 1
    assert shop.database.charges() == [1, 101]


async def test_a_completer_that_is_cancelled_is_cancelled(shop: Shop) -> None:
    await shop.abandon()
    started = asyncio.Event()
    shop.meanwhile = lambda: asyncio.wait_for(_never(started), None)
    task = asyncio.create_task(shop.completer.run_once())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _never(started: asyncio.Event) -> None:
    started.set()
    await asyncio.Event().wait()


async def test_a_call_that_hangs_holds_the_others_up_for_max_run_at_most(database: Database) -> None:
    async with shop_over(database, policy=Policy(lease=0.2, max_run=0.2)) as shop:
        await shop.abandon()
        shop.meanwhile = lambda: _never(asyncio.Event())
        assert (await shop.completer.run_once()).failed == 1
        (entry,) = await shop.completer.entries()
        assert entry.reason == "retryproof.phased.completer.TooLong"
        shop.meanwhile = None
        shop.expire()
        assert (await shop.completer.run_once()).completed == 1


async def test_a_worklist_that_fails_meanwhile_leaves_no_operation_unattended(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was begun has ended when the look has, and what could not be postponed is due after its lease."""
    await shop.abandon("k1", 1)
    await shop.abandon("k2", 2)
    shop.failures = {1: ValueError("no")}
    going_on = asyncio.Event()

    async def slowly() -> None:
        await asyncio.wait_for(going_on.wait(), 10)

    def unreachable(*arguments: object) -> Any:
        going_on.set()
        raise errors.StoreUnavailable("down")

    shop.meanwhile = slowly
    for worklist in (PostgresWorklist, SqliteWorklist):
        monkeypatch.setattr(worklist, "postpone", unreachable)
    found = await shop.completer.run_once()
    assert (found.completed, found.failed) == (1, 1)
    assert 102 in shop.database.charges()


async def test_c15_what_a_completer_died_at_is_run_when_nothing_else_is(database: Database) -> None:
    """So that the one that kills its process is found out, and its neighbours are completed."""
    async with shop_over(database, policy=Policy(max_attempts=2)) as shop:
        for number in (1, 2, 3):
            await shop.abandon(f"k{number}", number)
        shop.failures = dict.fromkeys((1, 2, 3), Crash())  # one dies, and with it all that are beside it
        with pytest.raises(Crash):
            await shop.completer.run_once()
        shop.failures = {2: Crash()}
        for _ in range(6):
            shop.expire()
            shop.most = 0
            with contextlib.suppress(Crash):
                await shop.completer.run_once()
            assert shop.most <= 1
        assert shop.database.charges() == [1, 2, 3, 101, 103]
        (entry,) = await shop.completer.entries()
        assert "died" in (entry.reason or "")


async def test_applications_that_share_a_database_leave_each_others_operations_alone(shop: Shop) -> None:
    other = Phased(shop.engine)
    await shop.abandon()
    now = "extract(epoch FROM clock_timestamp())" if shop.database.postgres else "CAST(strftime('%s') AS INTEGER)"
    shop.database.execute(f"UPDATE retryproof_phased SET due_at = {now} * 1000000")
    assert await Completer(other).run_once() == Round()
    assert (await shop.completer.run_once()).completed == 1


async def test_an_input_that_cannot_be_stored_is_refused_before_anything_is_claimed(shop: Shop) -> None:
    @shop.phased.function("loose")
    async def loose(given: Any) -> None:
        raise AssertionError("run")

    await shop.order.run("another", Order(1), scope="acme")
    with pytest.raises(ValueError, match="set"):
        await loose.run("k", {1, 2}, scope="acme")
    with pytest.raises(errors.ConfigurationError, match="bytes"):
        await loose.run("k", "x" * 2_000_000, scope="acme")
    with pytest.raises(errors.ConfigurationError, match="is text"):
        await loose.run("k", 1, scope=("acme", b"ann"))  # type: ignore[arg-type]  # what is refused
    with shop.database.connect() as connection:
        assert connection.execute("SELECT count(*) FROM retryproof_operations").fetchone()[0] == 1


async def test_an_input_that_cannot_be_sealed_rolls_its_phase_back(shop: Shop) -> None:
    class Broken:
        def seal(self, data: bytes, id: bytes) -> bytes:
            raise RuntimeError("no key")

        open = seal

    shop.phased.sealer = Broken()
    with pytest.raises(RuntimeError, match="no key"):
        await shop.order.run("k", Order(1), scope="acme")
    assert shop.database.charges() == []
    shop.phased.sealer = None
    assert (await shop.order.run("k", Order(1), scope="acme")).attempt == 1
    assert shop.database.charges() == [1, 101]


async def test_phases_and_completers_are_refused_where_the_records_are_elsewhere() -> None:
    async with AsyncIdempotency("memory://") as engine:
        phased = Phased(engine, connect=lambda: lent(":memory:"))

        @phased.function("one")
        async def one(given: int) -> None:
            async with current_operation().phase("one"):
                raise AssertionError("entered")

        with pytest.raises(errors.ConfigurationError, match="store is memory"):
            await one.run("k", 1, scope="s")
        with pytest.raises(errors.ConfigurationError, match="PostgreSQL and SQLite"):
            await Completer(phased).run_once()


async def test_a_database_without_a_worklist_says_what_to_run(postgres: Database) -> None:
    async with shop_over(postgres) as shop:
        postgres.execute("ALTER TABLE retryproof_phased RENAME TO elsewhere")
        try:
            with pytest.raises(errors.ConfigurationError, match="retryproof migrate"):
                await shop.order.run("k", Order(1), scope="acme")
            assert postgres.charges() == []
            with pytest.raises((errors.ConfigurationError, errors.StoreUnavailable), match="retryproof migrate"):
                await shop.completer.run_once()
        finally:
            postgres.execute("ALTER TABLE elsewhere RENAME TO retryproof_phased")


async def test_i1_a_client_that_takes_over_from_a_suspended_completer_wins(shop: Shop) -> None:
    """The completer wakes up between its phases: it commits nothing, and its row is gone."""
    await shop.abandon()
    values: list[Any] = []

    async def suspended() -> None:
        shop.meanwhile = None
        shop.database.execute("UPDATE retryproof_operations SET lease_until = 0 WHERE state = 1")
        async with shop_over(shop.database) as other:  # another process
            values.append(await other.order.run("k", Order(1), scope=("acme", "ann")))

    shop.meanwhile = suspended
    found = await shop.completer.run_once()
    assert (found.completed, found.dropped) == (0, 1)
    assert (values[0].replayed, values[0].attempt) == (False, 3)
    assert shop.database.charges() == [1, 101]
    assert await shop.completer.entries() == []


async def test_c19_a_reaper_leaves_what_a_completer_runs(shop: Shop) -> None:
    await shop.abandon()
    reaped = []

    async def reap() -> None:
        shop.database.execute("UPDATE retryproof_operations SET expires_at = 0")
        store = open_store(shop.database.store)
        reaped.append(await asyncio.to_thread(reap_all, store))
        store.close()

    shop.meanwhile = reap
    assert (await shop.completer.run_once()).completed == 1
    assert (reaped[0].settled, reaped[0].unsettled) == (0, 0)
    assert shop.database.charges() == [1, 101]


async def test_a_row_whose_record_was_reaped_after_it_was_taken_runs_nothing(shop: Shop) -> None:
    """Between a completer's look and its claim."""
    await shop.abandon()

    def and_reaped(take: Any) -> Any:
        def taken_and_reaped(*arguments: Any) -> Any:
            rows = yield from take(*arguments)
            yield Statement("DELETE FROM retryproof_operations")
            return rows

        return taken_and_reaped

    with pytest.MonkeyPatch.context() as patch:
        for worklist in (PostgresWorklist, SqliteWorklist):
            patch.setattr(worklist, "take", and_reaped(worklist.take))
        assert (await shop.completer.run_once()).dropped == 1
    assert shop.database.charges() == [1]
    assert await shop.completer.entries() == []


async def test_i1_completers_and_retries_at_the_same_time_run_each_operation_once(shop: Shop) -> None:
    for number in range(1, 7):
        await shop.abandon(f"k{number}", number)

    async def retry(number: int) -> Any:
        while True:
            try:
                outcome = await shop.order.run(f"k{number}", Order(number), scope=("acme", "ann"))
            except errors.InProgress:
                await asyncio.sleep(0.01)  # the client's back-off
            else:
                return outcome.value

    looks = [Completer(shop.phased, batch=4).run_once() for _ in range(2)]
    *values, _, _ = await asyncio.gather(*(retry(number) for number in range(1, 7)), *looks)
    assert [value["number"] for value in values] == list(range(1, 7))
    assert shop.database.charges() == [*range(1, 7), *range(101, 107)]
    shop.due()
    await shop.completer.run_once()
    assert await shop.completer.entries() == []


async def test_a_completer_runs_until_it_is_stopped(shop: Shop) -> None:
    await shop.abandon()
    completer = Completer(shop.phased, poll=0.01)
    done = asyncio.Event()
    task = asyncio.create_task(completer.run(lambda found: done.set() if found.completed else None))
    await done.wait()
    completer.stop()
    await task
    assert shop.database.charges() == [1, 101]


async def test_inputs_are_sealed_where_that_is_wished(shop: Shop) -> None:
    class Rot:
        def seal(self, data: bytes, id: bytes) -> bytes:
            return bytes(byte ^ id[0] ^ 255 for byte in data)

        open = seal

    shop.phased.sealer = Rot()
    shop.failure = Crash()
    with pytest.raises(Crash):
        await shop.order.run("k", Order(1, "a secret"), scope=("acme", "ann"))
    (entry,) = await shop.completer.entries()
    assert b"secret" not in entry.input
    assert b"ann" not in entry.input
    shop.failure = None
    shop.expire()
    assert (await shop.completer.run_once()).completed == 1


async def test_an_input_that_cannot_be_opened_is_recorded(shop: Shop) -> None:
    await shop.abandon()
    shop.database.execute(f"UPDATE retryproof_phased SET input = {NOTHING[shop.database.postgres]}")
    assert (await shop.completer.run_once()).failed == 1
    (entry,) = await shop.completer.entries()
    assert "cannot be read" in (entry.reason or "")


async def test_another_input_under_the_same_key_is_a_mismatch(shop: Shop) -> None:
    await shop.abandon()
    with pytest.raises(errors.Mismatch):
        await shop.order.run("k", Order(2), scope=("acme", "ann"))


async def test_a_last_part_in_transactional_mode_removes_it_as_well(postgres: Database) -> None:
    async with shop_over(postgres) as shop:

        @shop.phased.function("short")
        async def short(given: int) -> int:
            operation = current_operation()
            async with operation.phase("one") as phase:
                if phase.pending:
                    await phase.connection.execute(insert(given))
            connection: Any = await operation.atransaction(shop.phased.connect())  # type: ignore[misc]  # it is set
            await connection.execute(insert(given + 1))
            return given

        assert (await short.run("k", 1, scope="acme")).value == 1
        assert postgres.charges() == [1, 2]
        assert await shop.completer.entries() == []


async def test_the_completer_works_over_psycopg_too(postgres: Database) -> None:
    async with shop_over(postgres, postgres.store.replace("postgresql://", "postgresql+psycopg://")) as shop:
        await shop.abandon()
        assert (await shop.completer.run_once()).completed == 1


def test_functions_are_refused_that_could_not_be_run_later() -> None:
    phased = Phased(AsyncIdempotency("memory://"))

    @phased.function("one")
    async def one(given: int) -> None: ...

    with pytest.raises(errors.ConfigurationError, match="registered already"):
        phased.function("one")
    with pytest.raises(errors.ConfigurationError, match="no coroutine function"):
        phased.function("two")(print)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(errors.ConfigurationError, match="characters"):
        phased.function("")
    with pytest.raises(errors.ConfigurationError, match="AsyncIdempotency"):
        Phased(Idempotency("memory://"))  # type: ignore[arg-type]  # what is refused


async def test_outside_of_phased_functions_there_is_no_principal() -> None:
    async with AsyncIdempotency("memory://") as engine:
        with pytest.raises(errors.NoOperation, match="principal"):
            await engine.run("k", lambda: current_operation().principal, scope="s")


async def test_c5_the_completer_repeats_nothing_whose_outcome_is_unknown_in_a_group(database: Database) -> None:
    """Under `refuse` an operator decides, however often it is due."""
    async with shop_over(database, policy=Policy(on_abandoned="refuse")) as shop:
        shop.failure = ExceptionGroup("tasks", [ValueError("a"), errors.OutcomeUnknown("the bank hung up")])
        with pytest.raises(ExceptionGroup):
            await shop.order.run("k", Order(1), scope=("acme", "ann"))
        shop.failure = None
        for _ in range(3):
            shop.expire()
            assert (await shop.completer.run_once()).failed == 1
    assert len(shop.calls) == 1
