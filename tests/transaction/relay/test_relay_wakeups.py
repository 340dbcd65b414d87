"""LISTEN/NOTIFY as a wake-up that nothing depends on (T7), on PostgreSQL; behind a real PgBouncer too."""

import logging
import os
import shutil
import socket
import subprocess
from asyncio import create_task, sleep, wait_for
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import psycopg
import pytest

from retryproof.outbox.policy import RelayTotals
from retryproof.transaction import Relay, RelayPolicy
from servers.table import account
from tests.transaction.outboxes import QUICK, Database, Noting, sqlite_url

SLEEPY = RelayPolicy(poll=0.05, max_poll=600.0, lease=8.0)
"""An idle relay would look again in ten minutes."""


@pytest.fixture
def database(postgres_outbox: Database) -> Database:
    return postgres_outbox


def announce(database: Database, *keys: str) -> None:
    """Add messages and notify, in one transaction."""
    messages = [database.outbox.message("t", key.encode(), key=key) for key in keys]
    with database.transaction() as connection:
        database.outbox.add_many(connection, messages)
        database.outbox.notify(connection)


def listeners(database: Database) -> list[int]:
    """The server's processes that listen."""
    rows = database.rows(
        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%' "
        "AND datname = current_database() AND state = 'idle'"
    )
    return [row[0] for row in rows]


class Counting(Relay):
    """A relay that counts how often it looked."""

    looks = 0

    async def run_once(self) -> RelayTotals | None:
        self.looks += 1
        return await super().run_once()

    @property
    def sleeping(self) -> bool:
        """Whether it looked and found nothing, and waits for long."""
        return self.looks > 0 and monotonic() - self._looked_at > 0.5


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[None]:
    task = create_task(relay.run())
    try:
        yield
    finally:
        relay.stop()
        await wait_for(task, 20.0)


async def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Look until something is so."""
    over = monotonic() + seconds
    while not true():
        assert monotonic() < over
        await sleep(0.01)


async def asleep(relay: Counting) -> None:
    """Wait until the relay's pauses are long."""
    await until(lambda: relay.looks > 5 and relay.sleeping)


@pytest.mark.quiet
async def test_t7_an_idle_relay_is_woken_by_a_notification(database: Database) -> None:
    relay = Counting(database.url, Noting(), policy=SLEEPY)
    async with running(relay):
        await until(lambda: listeners(database))
        await asleep(relay)
        began = monotonic()
        announce(database, "a", "b")
        await until(lambda: database.pending == 0)
        assert monotonic() - began < 5.0
    assert listeners(database) == []


async def test_t7_a_listener_whose_connection_is_lost_comes_back(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "retryproof.relay")
    relay = Counting(database.url, Noting(), policy=SLEEPY)
    async with running(relay):
        await until(lambda: "listening for notifications" in caplog.text)
        for round in range(2):
            await asleep(relay)
            (pid,) = listeners(database)
            database.rows(f"SELECT pg_terminate_backend({pid})")
            announce(database, f"meanwhile{round}")  # heard or not: who listens again looks at once
            await until(lambda: database.pending == 0)
            await until(lambda gone=pid: listeners(database) not in ([], [gone]))  # type: ignore[misc] # bound at once
            await asleep(relay)
            announce(database, f"after{round}")
            await until(lambda: database.pending == 0)
    assert caplog.text.count("lost the connection that listens") == 2


@pytest.mark.quiet
async def test_t7_a_storm_of_notifications_is_no_storm_of_looks(database: Database) -> None:
    relay = Counting(database.url, Noting(), policy=SLEEPY)
    async with running(relay):
        await until(lambda: listeners(database))
        await asleep(relay)
        before, began = relay.looks, monotonic()
        connection = psycopg.connect(database.url.partition("?")[0], autocommit=True)
        with connection:
            while monotonic() - began < 1.0:
                connection.execute("NOTIFY retryproof_outbox")
                await sleep(0)
        looked = relay.looks - before
        assert 1 <= looked <= (monotonic() - began) / SLEEPY.poll + 2


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_t7_without_notifications_looking_from_time_to_time_is_enough(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    database = Database(sqlite_url(tmp_path)) if kind == "sqlite" else request.getfixturevalue("database")
    relay = Counting(database.url, Noting(), policy=replace(QUICK, listen=False))
    database.send("before")
    async with running(relay):
        await until(lambda: database.pending == 0)
        database.send("after")
        await until(lambda: database.pending == 0)
        if kind == "postgres":
            assert listeners(database) == []


async def test_t7_an_idle_relay_keeps_its_lease_and_takes_a_dead_one_s_partitions_over(database: Database) -> None:
    dying = Relay(database.url, Noting(), policy=replace(SLEEPY, lease=1.0))
    member = await dying._joined()
    await member.balance()
    relay = Counting(database.url, Noting(), policy=replace(SLEEPY, lease=1.0))
    async with running(relay):
        await until(lambda: relay._member is not None and len(relay._member._floors.at) == 64)
        await until(lambda: relay.sleeping)
        id = database.rows("SELECT id FROM retryproof_outbox_relays")
        began = monotonic()
        await until(lambda: monotonic() - began > 2.0)
        assert database.rows("SELECT id FROM retryproof_outbox_relays") == id
    await dying._opened().aclose()


@pytest.fixture
def pooled(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The database's URL through a PgBouncer in transaction mode, with two connections to the server."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("install pgbouncer (Debian: pgbouncer) to see what a transaction pooler does to LISTEN")
    url, _, schema = database.url.partition("?schema=")
    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("pgbouncer")
    user, group = account() or (os.getuid(), os.getgid())
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host=127.0.0.1 port={parts.port} user={parts.username}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
        f"listen_port={port}\nunix_socket_dir=\nauth_type=any\npool_mode=transaction\ndefault_pool_size=4\n"
    )
    command = [program, "-q", "/dev/stdin"]
    with settings.open() as stream:
        process = subprocess.Popen(command, stdin=stream, user=user, group=group, stderr=subprocess.DEVNULL)
    try:
        _answers(port)
        yield f"{parts.scheme}://{parts.username}@127.0.0.1:{port}{parts.path}?schema={schema}&statement_cache_size=0"
    finally:
        process.terminate()
        process.wait(10)


def _answers(port: int) -> None:
    """Wait until somebody listens on a port."""
    over = monotonic() + 10.0
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert monotonic() < over


async def test_t7_behind_a_transaction_pooler_it_says_once_that_it_hears_nothing_and_works(
    database: Database, pooled: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retryproof.outbox.wakeups.HEARING", 0.5)
    monkeypatch.setattr("retryproof.outbox.wakeups.LONGEST_PAUSE", 0.1)
    relay = Counting(pooled, Noting(), policy=replace(SLEEPY, max_poll=0.2))
    async with running(relay):
        await until(lambda: "notifications do not arrive" in caplog.text)
        announce(database, "a", "b")
        await until(lambda: database.pending == 0)
        began = monotonic()
        await until(lambda: monotonic() - began > 2.0)
    assert caplog.text.count("notifications do not arrive") == 1
