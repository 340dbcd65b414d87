"""The engine in process: tasks that each run one operation after another, against hand-written code."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from benchmarks.ceilings.postgres import PlainPostgres
from benchmarks.ceilings.redis import BareCoalesced, PlainRedis
from benchmarks.ceilings.sqlite import PlainSqlite, PlainSqliteFromThread
from benchmarks.measure import Figure, OutOfTime, Pace, Run, Sample, interleave
from benchmarks.services import Services

REPEATED_KEYS = 512
# The fastest of 10, 16, 32 and 64 within the noise, at 64 and at 256 tasks.
PLAIN_POSTGRES_CONNECTIONS = 32
_prefixes = itertools.count()

Effect = Callable[[], Awaitable[object]]


class EngineSubject(Protocol):
    """One way to run operations; `operation` is true when it was a replay."""

    name: str

    async def open(self) -> None: ...

    async def operation(self, key: str, effect: Effect) -> bool: ...

    async def close(self) -> None: ...


class Ours:
    """AsyncIdempotency on a store's URL."""

    name = "ours"

    def __init__(self, store: str) -> None:
        self._store = store

    async def open(self) -> None:
        self._engine: Any = importlib.import_module("retryproof").AsyncIdempotency(self._store)

    async def operation(self, key: str, effect: Effect) -> bool:
        outcome = await self._engine.run(key, effect, scope=("bench",))
        replayed: bool = outcome.replayed
        return replayed

    async def close(self) -> None:
        await self._engine.aclose()


class HandWrittenMemory:
    """A dictionary: what an operation costs when nothing is kept and nothing can crash."""

    name = "dictionary"

    async def open(self) -> None:
        self._results: dict[str, object] = {}

    async def operation(self, key: str, effect: Effect) -> bool:
        if key in self._results:
            return True
        self._results[key] = await effect()
        return False

    async def close(self) -> None:
        self._results.clear()


async def charge() -> dict[str, int]:
    """The effect: nothing, so that only the layer is measured."""
    return {"charged": 100}


def new_operations(subject: EngineSubject, tasks: int) -> Run:
    async def run(seconds: float) -> Sample:
        prefix = f"new-{os.getpid()}-{next(_prefixes)}"
        numbers = itertools.count()
        return await together(subject, tasks, seconds, lambda: f"{prefix}-{next(numbers)}", replayed=False)

    return run


async def replays(subject: EngineSubject, tasks: int) -> Run:
    keys = [f"replay-{os.getpid()}-{next(_prefixes)}-{number}" for number in range(REPEATED_KEYS)]
    for key in keys:
        await subject.operation(key, charge)

    async def run(seconds: float) -> Sample:
        cycle = itertools.cycle(keys)
        return await together(subject, tasks, seconds, lambda: next(cycle), replayed=True)

    return run


async def together(
    subject: EngineSubject, tasks: int, seconds: float, next_key: Callable[[], str], *, replayed: bool
) -> Sample:
    """Run tasks side by side until the time is over; a wrong kind of outcome and an exception are errors."""
    operations = errors = 0
    failure = ""
    cpu, started = time.process_time(), time.perf_counter()
    deadline = started + seconds

    async def work() -> None:
        nonlocal operations, errors, failure
        while time.perf_counter() < deadline:
            try:
                right = await subject.operation(next_key(), charge) is replayed
            except Exception as error:  # noqa: BLE001 - counted, and shown in the table
                right, failure = False, repr(error)[:300]
            if right:
                operations += 1
            else:
                errors += 1

    await asyncio.gather(*(work() for _ in range(tasks)))
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Sample(operations, elapsed, cpu, errors, {"failure": failure} if failure else {})


async def compare(
    store: str, subjects: list[EngineSubject], tasks: int, pace: Pace, method: str, *, with_replays: bool = True
) -> list[Figure]:
    for subject in subjects:
        await subject.open()
    taken = []
    try:
        runs: Mapping[str, Run] = {subject.name: new_operations(subject, tasks) for subject in subjects}
        taken.append(await interleave(f"engine {store} new {tasks}", method, runs, pace))
        if with_replays:
            runs = {subject.name: await replays(subject, tasks) for subject in subjects}
            taken.append(await interleave(f"engine {store} replay {tasks}", method, runs, pace))
    except OutOfTime:
        pass
    finally:
        for subject in subjects:
            await subject.close()
    for figure in taken:
        print(f"  {figure.name}: done", file=sys.stderr)
    return taken


_METHOD = "one process, uvloop, each task one operation after another, effect empty, no layer above; "


async def redis_figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    url = services.url("redis")
    method = _METHOD + "redis-py asyncio with hiredis; ceiling 2 connections, plain calls one connection a task"
    taken: list[Figure] = []
    for tasks in (1, 32, 256):
        subjects: list[EngineSubject] = [BareCoalesced(url), PlainRedis(url, connections=tasks)]
        if ours:
            subjects.append(Ours(url))
        taken += await compare("redis", subjects, tasks, pace, method)
    return taken


async def postgres_figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    url = services.url("postgres")
    taken: list[Figure] = []
    for tasks in (1, 32, 64, 256):
        connections = min(tasks, PLAIN_POSTGRES_CONNECTIONS)
        method = _METHOD + f"asyncpg, fsync and synchronous_commit on; plain pool of {connections} connections"
        subjects: list[EngineSubject] = [PlainPostgres(url, connections)]
        if ours:
            subjects.append(Ours(url))
        taken += await compare("postgres", subjects, tasks, pace, method)
    return taken


async def sqlite_figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    method = _METHOD + "WAL, synchronous=FULL, one thread that owns the connection, on the disk of the temporary folder"
    taken: list[Figure] = []
    for tasks in (1, 32, 256):
        subjects: list[EngineSubject] = [PlainSqliteFromThread(services.sqlite_path(f"plain-{tasks}.db"))]
        if ours:
            subjects.append(Ours(f"sqlite:///{services.sqlite_path(f'ours-{tasks}.db')}"))
        taken += await compare("sqlite", subjects, tasks, pace, method)
    return taken


async def memory_figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    taken: list[Figure] = []
    for tasks in (1, 32, 256):
        subjects: list[EngineSubject] = [HandWrittenMemory()]
        if ours:
            subjects.append(Ours("memory://"))
        taken += await compare("memory", subjects, tasks, pace, _METHOD + "no server")
    return taken


STORES = {
    "memory": memory_figures,
    "sqlite": sqlite_figures,
    "redis": redis_figures,
    "postgres": postgres_figures,
}


async def thread_figures(services: Services, pace: Pace, *, ours: bool) -> list[Figure]:
    """The sync engine from threads, against plain calls with a connection a thread."""
    taken: list[Figure] = []
    for threads in (1, 32):
        runs: dict[str, Run] = {
            "one commit a claim": plain_threads(services.sqlite_path(f"threads-{threads}.db"), threads)
        }
        if ours:
            runs["ours"] = our_threads(f"sqlite:///{services.sqlite_path(f'our-threads-{threads}.db')}", threads)
        method = "threads instead of tasks, sync engine; WAL, synchronous=FULL; plain: one connection behind a lock"
        try:
            taken.append(await interleave(f"threads sqlite new {threads}", method, runs, pace))
        except OutOfTime:
            break
    return taken


def plain_threads(path: str, threads: int) -> Run:
    plain, lock = PlainSqlite(path), threading.Lock()
    plain.open()

    def operation(key: str) -> bool:
        with lock:
            return plain.operation(key, lambda: None)

    return threaded(operation, threads)


def our_threads(url: str, threads: int) -> Run:
    engine: Any = importlib.import_module("retryproof").Idempotency(url)

    def operation(key: str) -> bool:
        replayed: bool = engine.run(key, lambda: {"charged": 100}, scope=("bench",)).replayed
        return replayed

    return threaded(operation, threads)


def threaded(operation: Callable[[str], bool], threads: int) -> Run:
    async def run(seconds: float) -> Sample:
        return await asyncio.to_thread(measure_threads, operation, threads, seconds)

    return run


def measure_threads(operation: Callable[[str], bool], threads: int, seconds: float) -> Sample:
    prefix, counts, errors = f"new-{os.getpid()}-{next(_prefixes)}", [0] * threads, [0] * threads
    cpu, started = time.process_time(), time.perf_counter()

    def work(index: int) -> None:
        number = 0
        while time.perf_counter() - started < seconds:
            number += 1
            try:
                replayed = operation(f"{prefix}-{index}-{number}")
            except Exception:  # noqa: BLE001 - counted as an error
                replayed = True
            (errors if replayed else counts)[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    return Sample(sum(counts), elapsed, time.process_time() - cpu, sum(errors))


async def prepare(url: str) -> None:
    """Make the schema, as `retryproof migrate` does."""
    await asyncio.to_thread(importlib.import_module("retryproof.stores.sql.migrate").migrate, url)
