"""Outboxes under test, on PostgreSQL and SQLite: writing to them, and relays that note what they publish."""

import asyncio
import sqlite3
from asyncio import create_task, sleep, timeout, wait_for
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from retryproof.core.message import Message
from retryproof.publishers import DELIVERED, Batch, Failed, Outcome
from retryproof.publishers.base import one_by_one
from retryproof.transaction import Outbox, Relay, RelayPolicy

QUICK = RelayPolicy(backoff=0.001, max_backoff=0.002, poll=0.005, max_poll=0.02, lease=5.0)


class Database:
    """A database with an outbox and a table of the caller's own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outbox = Outbox()

    def connect(self) -> Any:
        """A connection as a caller has it, no transaction open."""
        if self.url.startswith("sqlite"):
            return sqlite3.connect(self.url.removeprefix("sqlite:///"), timeout=20.0)
        url, _, schema = self.url.partition("?schema=")
        return psycopg.connect(url, options=f"-c search_path={schema}")

    @contextmanager
    def transaction(self) -> Any:
        """A connection with an open transaction, committed at the end."""
        connection = self.connect()
        try:
            connection.execute("BEGIN IMMEDIATE" if self.url.startswith("sqlite") else "SELECT 1")
            yield connection
            connection.commit()
        finally:
            connection.close()

    def send(self, *keys: str | None, topic: str = "t") -> list[Message]:
        """Add a message for each key in one transaction; the payloads number them."""
        messages = [self.outbox.message(topic, f"{key}:{number}".encode(), key=key) for number, key in enumerate(keys)]
        with self.transaction() as connection:
            self.outbox.add_many(connection, messages)
        return messages

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What a query says."""
        connection = self.connect()
        try:
            return list(connection.execute(sql).fetchall())
        finally:
            connection.close()

    def execute(self, sql: str) -> None:
        """Change something behind the relays' back."""
        with self.transaction() as connection:
            connection.execute(sql)

    @property
    def pending(self) -> int:
        return int(self.rows("SELECT count(*) FROM retryproof_outbox")[0][0])


class Noting:
    """A publisher that notes what it published; `fails` says why one fails, or None."""

    max_payload: int | None = None

    def __init__(self, fails: Callable[[Message], str | Failed | None] = lambda message: None) -> None:
        self.fails = fails
        self.published: list[Message] = []
        self.tried: list[Message] = []
        self.batches: list[Sequence[Message]] = []

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        self.batches.append(batch.messages)
        return await one_by_one(batch, self._send)

    async def _send(self, message: Message) -> Outcome:
        self.tried.append(message)
        why = self.fails(message)
        if why is not None:
            return why if isinstance(why, Failed) else Failed(why)
        self.published.append(message)
        return DELIVERED

    def close(self) -> None:
        pass

    @property
    def payloads(self) -> list[str]:
        return [message.payload.decode() for message in self.published]


async def until_empty(relay: Relay, passes: int = 2_000) -> None:
    """Run passes until nothing is left; what is tried again, or was a dead relay's, is due soon with QUICK."""
    for _ in range(passes):
        if await relay.run_once() is None:
            if (await relay.stats()).pending == 0:
                return
            await asyncio.sleep(0.005)
    raise AssertionError(f"still pending after {passes} passes")


async def until_published(publisher: Noting, sent: set[UUID]) -> None:
    """The test's time-out ends it where something is left."""
    while not sent <= {message.id for message in publisher.published}:  # noqa: ASYNC110  # a publisher tells nobody
        await asyncio.sleep(0.01)


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder}/outbox.db"


PATIENT = replace(QUICK, patience=0.1, timeout=60.0)


@asynccontextmanager
async def running(*relays: Relay) -> Any:
    """The running relays, which are stopped at the end."""
    tasks = [create_task(relay.run()) for relay in relays]
    try:
        yield
    finally:
        for relay in relays:
            relay.stop()
        for task in tasks:
            await wait_for(task, 20.0)


async def until(true: Callable[[], object] | Callable[[], Awaitable[object]]) -> None:
    """Look until something is so."""
    async with timeout(20.0):
        while True:
            found = true()
            if await found if isinstance(found, Awaitable) else found:
                return
            await sleep(0.01)
