"""A process that works with one outbox or workflow library, ours or a peer's, in the environment that it is in.

    python peer_work.py SUBJECT URL

Reads a line of JSON for each sample: `{"task": "enqueue" | "relay" | "workflow", "seconds": 0.5, "keys": 500}`, and
answers with a line: operations, seconds, cpu_seconds. Ends with its input.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

import asyncpg
import uvloop

WRITERS = 16
BATCH = 100
FILL = 3_000
"""Messages that a sample relays, put in outside of its time."""
PAYLOAD = b'{"order": 1, "amount": 100, "currency": "EUR"}' * 4
_BUSINESS = "CREATE TABLE IF NOT EXISTS bench_orders (id bigint PRIMARY KEY, amount bigint NOT NULL)"
_ORDER = "INSERT INTO bench_orders (id, amount) VALUES ({}, 100)"
# Another process may have made rows, so numbers begin where nobody else's do.
_numbers = itertools.count(time.time_ns())


class Subject:
    """What a sample needs; a task that a subject does not do is not asked of it."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def open(self) -> None:
        self.pool = await asyncpg.create_pool(self.url, min_size=WRITERS, max_size=WRITERS)

    async def writing(self) -> AbstractAsyncContextManager[Any]:
        """A connection, for a task to keep."""
        return self.pool.acquire()

    async def write(self, connection: Any, number: int) -> None:
        """A transaction with a business row and a message."""
        async with connection.transaction():
            await connection.execute(_ORDER.format("$1"), number)
            await self.add(connection, f"k{number % 500}")

    async def add(self, connection: Any, key: str) -> None:
        """A message in the transaction that is open."""
        raise NotImplementedError

    async def fill(self, keys: int) -> None:
        """FILL messages, in few transactions."""
        async with self.pool.acquire() as connection, connection.transaction():
            for number in range(FILL):
                await self.add(connection, f"k{number % keys}")

    async def relay(self) -> int:
        """Publish all that is there with a publisher that does nothing; how many."""
        raise NotImplementedError

    async def workflow(self) -> None:
        """Two steps under an id of their own."""
        raise NotImplementedError

    async def close(self) -> None:
        """Give back what others would wait for."""


class Ours(Subject):
    async def open(self) -> None:
        await super().open()
        transaction = importlib.import_module("retryproof.transaction")
        package = importlib.import_module("retryproof")
        delivered = importlib.import_module("retryproof.publishers").DELIVERED

        class NoOp:
            max_payload: int | None = None

            async def publish(self, batch: Any) -> Sequence[Any]:
                return [delivered] * len(batch.messages)

            def close(self) -> None:
                pass

        self._outbox = transaction.Outbox()
        self._relay = transaction.Relay(self.url, NoOp(), policy=transaction.RelayPolicy(batch=BATCH))
        self._engine = package.AsyncIdempotency(self.url)
        self._current = package.current_operation

    async def add(self, connection: Any, key: str) -> None:
        await self._outbox.aadd(connection, topic="orders", payload=PAYLOAD, key=key)

    async def relay(self) -> int:
        count = 0
        while totals := await self._relay.run_once():
            count += int(totals.delivered)
        return count

    async def close(self) -> None:
        await self._relay.aclose()  # another process is to have the partitions at once

    async def workflow(self) -> None:
        async def work() -> int:
            operation = self._current()
            first: int = await operation.astep("first", _step)
            second: int = await operation.astep("second", _step)
            return first + second

        await self._engine.run(str(uuid4()), work, scope="bench")


async def _step(_: object) -> int:
    return 1


class OursOnSqlAlchemy(Ours):
    """The same outbox in a session's transaction."""

    async def open(self) -> None:
        await super().open()
        self._sessions, self._text = _sessions(self.url)[1:]

    async def writing(self) -> AbstractAsyncContextManager[Any]:
        return self._sessions()  # type: ignore[no-any-return]  # imported by name

    async def write(self, connection: Any, number: int) -> None:
        async with connection.begin():
            await connection.execute(self._text(_ORDER.format(":id")), {"id": number})
            await self.add(connection, f"k{number % 500}")


def _sessions(url: str) -> tuple[Any, Any, Any]:
    """An engine, its sessions and `text`."""
    sqlalchemy = importlib.import_module("sqlalchemy")
    on_loop = importlib.import_module("sqlalchemy.ext.asyncio")
    place = url.replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = on_loop.create_async_engine(place, pool_size=WRITERS, max_overflow=WRITERS)
    return engine, on_loop.async_sessionmaker(engine, expire_on_commit=False), sqlalchemy.text


class TxOutbox(Subject):
    async def open(self) -> None:
        await super().open()
        package = importlib.import_module("txoutbox")
        self._storage = importlib.import_module("txoutbox.adapters.postgres").PostgresStorage(self.pool)
        await self._storage.create_schema()
        self._relay = package.Relay(
            self._storage, _nothing, config=package.RelayConfig(batch_size=BATCH, concurrency=BATCH)
        )

    async def add(self, connection: Any, key: str) -> None:
        await self._storage.insert(connection, "orders", PAYLOAD, key=key)

    async def relay(self) -> int:
        count = 0
        while published := (await self._relay.run_once()).published:
            count += published
        return count


async def _nothing(_: Any) -> None:
    pass


class PgQueuer(Subject):
    async def open(self) -> None:
        await super().open()
        self._package = importlib.import_module("pgqueuer")
        self._driver = importlib.import_module("pgqueuer.db").AsyncpgDriver
        self._queries = importlib.import_module("pgqueuer.queries").Queries
        self._mode = importlib.import_module("pgqueuer.domain.types").QueueExecutionMode.drain
        async with self.pool.acquire() as connection:
            queries = self._queries(self._driver(connection))
            if not await queries.schema_is_installed():
                await queries.install()

    async def add(self, connection: Any, key: str) -> None:
        await self._queries(self._driver(connection)).enqueue("orders", PAYLOAD)

    async def fill(self, keys: int) -> None:
        async with self.pool.acquire() as connection:
            queries = self._queries(self._driver(connection))
            await queries.enqueue(["orders"] * FILL, [PAYLOAD] * FILL, [0] * FILL)

    async def relay(self) -> int:
        count = 0
        connection = await asyncpg.connect(self.url)
        try:
            queuer = self._package.PgQueuer(self._driver(connection))

            @queuer.entrypoint("orders")  # type: ignore[untyped-decorator]  # imported by name
            async def count_it(_: Any) -> None:
                nonlocal count
                count += 1

            await queuer.qm.run(mode=self._mode, batch_size=BATCH)
        finally:
            await connection.close()
        return count


class FastStreamOutbox(Subject):
    async def open(self) -> None:
        await super().open()
        package = importlib.import_module("faststream_outbox")
        sqlalchemy = importlib.import_module("sqlalchemy")
        self._engine, self._sessions, self._text = _sessions(self.url)
        metadata = sqlalchemy.MetaData()
        table = package.make_outbox_table(metadata, table_name="bench_faststream")
        async with self._engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        self._broker = package.OutboxBroker(self._engine, outbox_table=table, logger=None)
        self._count, self._enough = 0, asyncio.Event()

        @self._broker.subscriber(  # type: ignore[untyped-decorator]  # imported by name
            "orders",
            max_workers=WRITERS,
            fetch_batch_size=BATCH,
            terminal_flush_batch_size=BATCH,
            min_fetch_interval=0.01,
        )
        async def count_it(body: bytes) -> None:
            self._count += 1
            if self._count == FILL:
                self._enough.set()

    async def writing(self) -> AbstractAsyncContextManager[Any]:
        return self._sessions()  # type: ignore[no-any-return]  # imported by name

    async def write(self, connection: Any, number: int) -> None:
        async with connection.begin():
            await connection.execute(self._text(_ORDER.format(":id")), {"id": number})
            await self._broker.publish(PAYLOAD, queue="orders", session=connection)

    async def fill(self, keys: int) -> None:
        async with self._sessions() as session, session.begin():
            await session.execute(self._text("TRUNCATE bench_faststream"))
            for _ in range(0, FILL, BATCH):
                await self._broker.publish_batch(*[PAYLOAD] * BATCH, queue="orders", session=session)
        self._count = 0
        self._enough.clear()

    async def relay(self) -> int:
        await self._broker.start()
        try:
            async with asyncio.timeout(30):
                await self._enough.wait()
        finally:
            await self._broker.stop()
        return self._count


class Dbos(Subject):
    async def open(self) -> None:
        package = importlib.import_module("dbos")
        dbos = self._dbos = package.DBOS
        self._named = package.SetWorkflowID
        dbos(config={"name": "bench", "system_database_url": self.url, "log_level": "ERROR", "sys_db_pool_size": 32})

        @dbos.step()  # type: ignore[untyped-decorator]  # imported by name
        async def step() -> int:
            return 1

        @dbos.workflow()  # type: ignore[untyped-decorator]  # imported by name
        async def flow() -> Any:
            return await step() + await step()

        self._flow = flow
        dbos.launch()

    async def workflow(self) -> None:
        with self._named(str(uuid4())):
            await self._flow()


SUBJECTS: dict[str, Callable[[str], Subject]] = {
    "ours": Ours,
    "ours, SQLAlchemy": OursOnSqlAlchemy,
    "txoutbox": TxOutbox,
    "pgqueuer": PgQueuer,
    "faststream-outbox": FastStreamOutbox,
    "dbos": Dbos,
}
WORKERS = 32
"""Workflows side by side."""


async def sample(subject: Subject, task: str, seconds: float, keys: int) -> dict[str, float]:
    if task == "relay":
        await subject.fill(keys)
    cpu, started = time.process_time(), time.perf_counter()
    if task == "relay":
        operations = await subject.relay()
    else:
        work = _enqueuing(subject) if task == "enqueue" else _flowing(subject)
        operations = await work(started + seconds)
    return {
        "operations": operations,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


def _enqueuing(subject: Subject) -> Callable[[float], Awaitable[int]]:
    async def worker(until: float) -> int:
        done = 0
        async with await subject.writing() as connection:
            while time.perf_counter() < until:
                await subject.write(connection, next(_numbers))
                done += 1
        return done

    async def work(until: float) -> int:
        return sum(await asyncio.gather(*(worker(until) for _ in range(WRITERS))))

    return work


def _flowing(subject: Subject) -> Callable[[float], Awaitable[int]]:
    async def worker(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            await subject.workflow()
            done += 1
        return done

    async def work(until: float) -> int:
        return sum(await asyncio.gather(*(worker(until) for _ in range(WORKERS))))

    return work


async def main(name: str, url: str) -> None:
    subject = SUBJECTS[name](url)
    await subject.open()
    if not isinstance(subject, Dbos):
        async with subject.pool.acquire() as connection:
            await connection.execute(_BUSINESS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    loop = asyncio.get_running_loop()
    print("{}", file=answers, flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await sample(subject, **json.loads(line))), file=answers, flush=True)
    await subject.close()
    os._exit(0)  # some libraries' threads would go on


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    uvloop.run(main(*sys.argv[1:]))
