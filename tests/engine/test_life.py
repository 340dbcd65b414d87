"""A store's life: opened when used, once per process and event loop; closed for who passed a URL; apart over a fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, errors
from retryproof.core.commands import Acquired, Claim, Running
from retryproof.sql.plan import Plan, Statement
from retryproof.stores import open_store, opened
from retryproof.stores.base import Store
from retryproof.stores.memory import MemoryStore
from retryproof.stores.redis.asynchronous import AsyncRedisStore
from retryproof.stores.sql.migrate import migrate
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.stores.threaded import InThread
from retryproof.stores.url import aopen_store
from tests.engine.support import SECONDS, OnLoop, in_child, in_thread


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that lives outside of this process."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'keys.db'}"
    given: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "postgres":
        migrate(given)
    return given


# Nothing happens before the first call


@pytest.mark.parametrize("given", ["redis://127.0.0.1:1/0", "postgresql://127.0.0.1:1/none", "sqlite:////nowhere/x.db"])
def test_making_an_engine_does_no_io_and_starts_no_thread(given: str) -> None:
    before = set(threading.enumerate())  # of other tests, and may end meanwhile
    sync, task = Idempotency(given), AsyncIdempotency(given)
    store = open_store(given)
    assert set(threading.enumerate()) <= before
    store.close()
    sync.close()
    asyncio.run(task.aclose())


def test_a_url_is_opened_once_however_many_threads_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two memories opened for two threads, both would run."""
    opening = threading.Barrier(2)

    def open_slowly(url: str, *, timeout: float) -> Store:
        with contextlib.suppress(threading.BrokenBarrierError):
            opening.wait(0.2)  # meets another thread that opens it as well, if one gets so far
        return open_store(url, timeout=timeout)

    monkeypatch.setattr(opened, "open_store", open_slowly)
    engine = Idempotency("memory://")
    effects: list[int] = []
    threads = [in_thread(lambda: engine.run("k", lambda: effects.append(1), scope="s")) for _ in range(2)]
    for thread in threads:
        with contextlib.suppress(errors.InProgress):
            thread.result(SECONDS)
    assert effects == [1]


def test_c20_engines_on_one_url_share_nothing_but_records(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    with Idempotency(url) as one, Idempotency(url) as other:
        assert one.run("k", lambda: 1, scope="a").value == 1
        assert other.run("k", lambda: 2, scope="b").value == 2
        assert other.run("k", lambda: 3, scope="a").value == 1


# Closing


def test_c6_closing_an_engine_on_named_memory_leaves_the_others_their_renewal() -> None:
    name = f"memory://{uuid.uuid4().hex}"
    policy = Policy(lease=0.15)
    first, second = Idempotency(name, policy=policy), Idempotency(name, policy=policy)
    first.run("one", lambda: None, scope="s")
    first.close()
    inside, leave = threading.Event(), threading.Event()

    def slow() -> str:
        inside.set()
        leave.wait(SECONDS)
        return "slow"

    running = in_thread(lambda: second.run("k", slow, scope="s").value)
    assert inside.wait(SECONDS)
    deadline = time.monotonic() + 0.6
    while time.monotonic() < deadline:
        with pytest.raises(errors.InProgress):
            second.run("k", lambda: "twice", scope="s")
        time.sleep(0.02)
    leave.set()
    assert running.result(SECONDS) == "slow"


def test_an_engine_that_was_closed_opens_its_url_again(url: str, unique: str) -> None:
    engine = Idempotency(url)
    assert engine.run("k", lambda: 1, scope=unique).value == 1
    engine.close()
    assert engine.run("k", lambda: 2, scope=unique).replayed
    engine.close()


def test_a_store_object_stays_open(tmp_path: Path, unique: str) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'keys.db'}")
    with Idempotency(store) as engine:
        engine.run("k", lambda: 1, scope=unique)
    assert Idempotency(store).run("k", lambda: 2, scope=unique).replayed
    store.close()


# Loops


def test_one_engine_serves_several_loops_one_after_the_other(url: str, unique: str) -> None:
    engine = AsyncIdempotency(url)

    async def once(value: int) -> tuple[int, bool]:
        outcome = await engine.run("k", lambda: value, scope=unique)
        await engine.aclose()
        return outcome.value, outcome.replayed

    assert [asyncio.run(once(value)) for value in (1, 2, 3)] == [(1, False), (1, True), (1, True)]


def test_c20_one_engine_serves_several_loops_at_once(url: str, unique: str) -> None:
    engine = AsyncIdempotency(url, policy=Policy(wait=5.0, poll=0.02))
    effects: list[int] = []

    async def twins() -> list[int]:
        async def fn() -> int:
            effects.append(1)
            await asyncio.sleep(0.01)
            return 7

        try:
            outcomes = await asyncio.gather(*(engine.run("k", fn, scope=unique) for _ in range(3)))
            return [outcome.value for outcome in outcomes]
        finally:
            await engine.aclose()

    threads = [in_thread(lambda: asyncio.run(twins())) for _ in range(4)]
    assert [thread.result(SECONDS) for thread in threads] == [[7, 7, 7]] * 4
    assert effects == [1]


def test_an_engine_forgets_loops_that_are_closed(url: str, unique: str) -> None:
    """As in a program that calls `asyncio.run` again and again."""
    engine = AsyncIdempotency(url)

    async def once(number: int) -> None:
        await engine.run(f"k{number}", lambda: number, scope=unique)
        if not url.startswith("sqlite"):
            await engine.opened().store.aclose()  # type: ignore[union-attr]  # its connections, not what the engine keeps

    for number in range(5):
        asyncio.run(once(number))
    gc.collect()
    assert len(engine._source._loops) <= 1
    engine._source.close()


async def test_a_store_object_in_another_loop_says_so(redis_url: str, unique: str) -> None:
    store = await aopen_store(redis_url)
    assert isinstance(store, AsyncRedisStore)
    engine = AsyncIdempotency(store)
    await engine.run("k", lambda: 1, scope=unique)

    def elsewhere() -> None:
        async def use() -> None:
            await engine.run("k", lambda: 2, scope=unique)

        asyncio.run(use())

    with pytest.raises(errors.ConfigurationError, match="another event loop"):
        await asyncio.to_thread(elsewhere)
    assert (await engine.run("k", lambda: 2, scope=unique)).replayed
    await store.aclose()


class Keeperless(OnLoop):
    """As a third party's store that was written for tasks alone."""

    keeper = None  # type: ignore[assignment]  # it has none


async def test_c6_a_store_without_a_keeper_is_renewed_through_its_loop(unique: str) -> None:
    store = Keeperless()
    engine = AsyncIdempotency(store, policy=Policy(lease=0.5))
    running = asyncio.ensure_future(engine.run("k", lambda: asyncio.sleep(1.2), scope=unique))
    while not running.done():
        await asyncio.sleep(0.05)
        assert await is_in_progress(engine, unique) or running.done()
    assert ("renew", 1) in store.sent


async def is_in_progress(engine: AsyncIdempotency, scope: str) -> bool:
    try:
        await engine.run("k", lambda: 0, scope=scope)
    except errors.InProgress:
        return True
    return False


def test_a_store_without_a_keeper_whose_loop_is_closed_leaves_nothing_unawaited(unique: str) -> None:
    """What lingers there can be stored no more; that is an error to the keeper, and no warning from the collector."""
    store = Keeperless()

    async def main() -> None:
        engine = AsyncIdempotency(store, policy=Policy(complete_timeout=0.0, store_timeout=0.1))

        async def fail(name: str, commands: object) -> None:
            if name == "complete":
                raise OSError("gone")

        store.before = fail
        await engine.run("k", lambda: 0, scope=unique)

    asyncio.run(main())

    threading.Event().wait(0.8)  # the keeper's first try at what lingers comes after half a second
    gc.collect()


# Forks


def test_a_forked_child_has_connections_of_its_own(url: str, unique: str) -> None:
    engine = Idempotency(url)
    assert engine.run("parent", lambda: 1, scope=unique).value == 1

    def child() -> bool:
        replay = engine.run("parent", lambda: 2, scope=unique)
        fresh = engine.run("child", lambda: 3, scope=unique)
        engine.close()
        return replay.replayed and not fresh.replayed

    in_child(child)
    in_child(lambda: engine.run("parent", lambda: 2, scope=unique).replayed)
    assert engine.run("parent", lambda: 4, scope=unique).value == 1
    assert engine.run("after", lambda: 5, scope=unique).value == 5
    engine.close()


def test_a_forked_child_closes_only_what_it_opened(url: str, unique: str) -> None:
    engine = Idempotency(url)
    engine.run("parent", lambda: 1, scope=unique)

    def child() -> bool:
        engine.close()  # nothing of its own yet: must not speak on the parent's connection
        fresh = engine.run("child", lambda: 2, scope=unique)
        engine.close()
        gc.collect()
        return not fresh.replayed

    in_child(child)
    assert engine.run("parent", lambda: 4, scope=unique).value == 1
    assert engine.run("child", lambda: 5, scope=unique).value == 2
    engine.close()


def test_a_forked_child_renews_its_own_leases(url: str, unique: str) -> None:
    """C6: threads do not survive a fork; the child starts its own."""
    engine = Idempotency(url, policy=Policy(lease=0.3))
    engine.run("parent", lambda: time.sleep(0.15), scope=unique)

    def child() -> bool:
        def slow() -> int:
            deadline = time.monotonic() + 0.8
            while time.monotonic() < deadline:
                try:
                    engine.run("child", lambda: 0, scope=unique)
                except errors.InProgress:
                    time.sleep(0.05)
                else:
                    return 0
            return 1

        return engine.run("child", slow, scope=unique).value == 1

    in_child(child)
    engine.close()


def test_an_async_engine_works_on_both_sides_of_a_fork(url: str, unique: str) -> None:
    engine = AsyncIdempotency(url)

    async def once(key: str, value: int) -> int:
        outcome = await engine.run(key, lambda: value, scope=unique)
        await engine.aclose()
        return outcome.value

    async def around_a_fork() -> None:
        assert (await engine.run("parent", lambda: 1, scope=unique)).value == 1
        in_child(lambda: in_thread(lambda: asyncio.run(once("parent", 2))).result(SECONDS) == 1)
        assert (await engine.run("parent", lambda: 3, scope=unique)).value == 1
        await engine.aclose()

    asyncio.run(around_a_fork())


def test_a_store_object_from_before_the_fork_says_so(tmp_path: Path, unique: str) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'keys.db'}")
    engine = Idempotency(store)
    engine.run("k", lambda: 1, scope=unique)

    def child() -> bool:
        try:
            engine.run("k", lambda: 2, scope=unique)
        except errors.ConfigurationError as error:
            return "before the process forked" in str(error)
        return False

    in_child(child)
    assert engine.run("k", lambda: 3, scope=unique).replayed
    store.close()


def claimed(reply: object) -> bool:
    """Whether a store's only reply was that."""
    return isinstance(reply, Acquired)


def test_c1_a_sqlite_store_is_closed_over_a_fork_and_works_on_both_sides(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "keys.db"))
    mine, theirs = (Claim(bytes(31) + bytes([n]), b"", bytes(16), 10.0, 60.0, 60.0) for n in range(2))
    assert claimed(store.claim([mine])[0])

    def child() -> bool:
        twin = replace(mine, nonce=bytes(15) + b"2")
        return isinstance(store.claim([twin])[0], Running) and claimed(store.claim([theirs])[0])

    in_child(child)
    assert claimed(store.claim([mine])[0])
    assert isinstance(store.claim([replace(theirs, nonce=bytes(15) + b"2")])[0], Running)
    store.close()


def test_c1_a_fork_from_within_a_call_leaves_it_whole_and_the_child_is_refused(tmp_path: Path) -> None:
    """The thread that forks is the one that it would have to wait for."""
    store = SqliteStore(str(tmp_path / "keys.db"))

    def is_refused(used: SqliteStore) -> bool:
        try:
            used.get([bytes(32)])
        except errors.ConfigurationError as error:
            return "was open when this process was forked" in str(error)
        return False

    def plan() -> Plan[bool]:
        yield Statement("CREATE TABLE kept (x)")
        in_child(lambda: is_refused(store) and is_refused(SqliteStore(store.path)))
        rows = yield Statement("SELECT count(*) FROM kept")
        return rows == [(0,)]

    assert store.perform(plan)
    store.close()


def test_a_store_in_a_thread_has_another_thread_in_a_forked_child(tmp_path: Path) -> None:
    """Of the parent's threads only the one that forks goes on in the child."""
    store = InThread(SqliteStore(str(tmp_path / "keys.db")))
    assert asyncio.run(store.get([bytes(32)])) == [None]
    in_child(lambda: asyncio.run(store.get([bytes(32)])) == [None])
    asyncio.run(store.aclose())


def test_sqlite_in_memory_stays_with_the_parent() -> None:
    engine = Idempotency("sqlite:///:memory:")
    engine.run("k", lambda: 1, scope="s")
    in_child(lambda: not engine.run("k", lambda: 2, scope="s").replayed)
    assert engine.run("k", lambda: 3, scope="s").replayed
    engine.close()


def test_named_memory_is_new_in_a_forked_child() -> None:
    name = f"memory://{uuid.uuid4().hex}"
    engine = Idempotency(name)
    engine.run("k", lambda: 1, scope="s")
    in_child(lambda: not engine.run("k", lambda: 2, scope="s").replayed)
    assert engine.run("k", lambda: 3, scope="s").replayed


def test_a_memory_store_belongs_to_its_process() -> None:
    engine = Idempotency(MemoryStore())
    engine.run("k", lambda: 1, scope="s")

    def child() -> bool:
        try:
            engine.run("k", lambda: 2, scope="s")
        except errors.ConfigurationError:
            return True
        return False

    in_child(child)


def test_c6_close_waits_for_what_runs_and_renews_it_meanwhile(tmp_path: Path) -> None:
    """What can end while an engine closes is stored, under its own lease."""
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    engine = Idempotency(url, policy=Policy(lease=0.3, on_abandoned="refuse"))
    inside, leave = threading.Event(), threading.Event()

    def slow() -> str:
        inside.set()
        leave.wait(SECONDS)
        return "done"

    running = in_thread(lambda: engine.run("k", slow, scope="s"))
    assert inside.wait(SECONDS)
    threading.Timer(1.0, leave.set).start()
    engine.close(drain=SECONDS)
    assert running.result(SECONDS).value == "done"
    with Idempotency(url) as later:
        assert later.run("k", lambda: "twice", scope="s").replayed


def test_what_is_left_when_an_engine_closes_is_said_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Idempotency(f"sqlite:///{tmp_path / 'keys.db'}")
    inside, leave = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        leave.wait(SECONDS)

    running = in_thread(lambda: engine.run("k", slow, scope="s"))
    assert inside.wait(SECONDS)
    engine.close(drain=0.1)
    assert "1 operations are not settled at the shutdown" in caplog.text
    assert engine.id_of("s", "k").hex()[:16] in caplog.text
    leave.set()
    running.exception(SECONDS)


def test_an_async_engines_run_is_seen_to_be_a_coroutine_function() -> None:
    """A scheduler that takes it for a plain function calls it in a thread, and awaits nothing."""
    assert inspect.iscoroutinefunction(AsyncIdempotency("memory://").run)
