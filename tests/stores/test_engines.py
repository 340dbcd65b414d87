"""SQLAlchemy's engines and Django's aliases as stores: whose connections they use, and what they refuse (C10)."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from django.db import connections  # type: ignore[import-untyped]  # Django has no types of its own
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool, AsyncAdaptedQueuePool, NullPool, Pool, SingletonThreadPool, StaticPool

from retryproof import AsyncIdempotency, Idempotency, current_operation
from retryproof.core.commands import Acquired, Renew
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.sql.engines.django import diagnose, migrate, pending
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.postgres import asyncpg as loop_pools
from retryproof.sql.postgres import psycopg as pools
from retryproof.stores import InLoop, Store, aopen_store, open_store
from retryproof.stores.base import HasKeeper
from retryproof.stores.opened import Source
from retryproof.stores.sql import migrate as public
from retryproof.stores.sql.asyncpg import AsyncpgStore
from retryproof.stores.sql.psycopg import PsycopgStore
from tests.conftest import PrivateServer
from tests.stores.engines import alias, alias_of, async_engine_of, engine_of, migrated, sqlite_alias, sqlite_engine
from tests.stores.support import (
    check_a_hung_server_does_not_hang_the_loop,
    check_a_hung_server_is_an_error_in_time,
    new_claim,
)


@pytest.fixture
def url(postgres_url: str, unique: str) -> str:
    """A schema of the test's own."""
    return migrated(postgres_url, unique)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """An engine with one connection in its pool, and a short patience for it."""
    yield from engine_of(url, pool_size=1, max_overflow=0, pool_timeout=0.1)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def async_engine(url: str, request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    """The same on an event loop."""
    async for engine in async_engine_of(url, request.param, pool_size=1, max_overflow=0, pool_timeout=0.1):
        yield engine


@pytest.fixture
def django_alias(url: str) -> Iterator[str]:
    """A Django URL of the schema."""
    for name in alias_of(url):
        yield f"django://{name}"


def test_a_handler_that_holds_the_pools_last_connection_does_not_wait_for_itself(engine: Engine) -> None:
    ran = []

    def charge() -> None:
        with engine.begin() as connection:
            connection.execute(text("SELECT 1"))
            assert current_operation().step("reserve", lambda derived: "ok") == "ok"
            ran.append(1)

    with engine.connect() as held, Idempotency(engine) as idempotency:
        held.execute(text("SELECT 1"))
        assert not idempotency.run("held", lambda: None, scope="s").replayed
        held.close()
        assert [idempotency.run("k", charge, scope="s").replayed for _ in range(2)] == [False, True]
    assert ran == [1]


def test_the_engine_stays_its_callers(engine: Engine) -> None:
    pool = engine.pool
    with Idempotency(engine) as idempotency:
        idempotency.run("k", lambda: None, scope="s")
    assert engine.pool is pool
    assert "Connections in pool: 0" in pool.status()
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW default_transaction_isolation")) == "read committed"
        assert connection.scalar(text("SHOW enable_seqscan")) == "on"


async def test_an_async_engine_stays_its_callers(async_engine: AsyncEngine) -> None:
    async with async_engine.connect() as held:
        await held.execute(text("SELECT 1"))
        async with AsyncIdempotency(async_engine) as idempotency:
            assert not (await idempotency.run("k", lambda: None, scope="s")).replayed
            assert (await idempotency.run("k", lambda: None, scope="s")).replayed
        assert await held.scalar(text("SHOW enable_seqscan")) == "on"


def test_t1_work_on_a_session_and_its_result_commit_together(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE charges (id int)"))

    def charge() -> None:
        session = current_operation().transaction(Session(engine))
        session.execute(text("INSERT INTO charges VALUES (1)"))

    with Idempotency(engine) as idempotency:
        assert [idempotency.run("k", charge, scope="s").replayed for _ in range(2)] == [False, True]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM charges")) == 1


def test_hooks_and_creators_of_the_engine_make_the_connections(url: str, postgres_url: str, unique: str) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(postgres_url))

    @event.listens_for(engine, "connect")
    def into_schema(connection: Any, record: object) -> None:
        connection.execute(f"SET search_path = {unique}")  # which begins a transaction, and is undone with it

    store = open_store(engine)
    assert isinstance(store.claim([new_claim()])[0], Acquired)
    store.close()
    engine.dispose()


def test_a_psycopg_pool_behind_an_engine_gets_its_connection_back(postgres_url: str) -> None:
    given_back: list[object] = []

    def getconn() -> Any:
        connection: Any = psycopg.connect(postgres_url)
        connection._pool = SimpleNamespace(putconn=given_back.append)
        return connection

    store = open_store(create_engine("postgresql+psycopg://", creator=getconn, poolclass=NullPool))
    with pytest.raises(ConfigurationError, match="from a psycopg pool"):
        store.claim([new_claim()])
    (connection,) = given_back
    assert isinstance(connection, psycopg.Connection)
    connection.close()


@pytest.mark.parametrize("kind", [NullPool, StaticPool, SingletonThreadPool, AssertionPool])
async def test_an_engine_with_any_pool_serves(url: str, kind: type[Pool]) -> None:
    for engine in engine_of(url, poolclass=kind):
        store = open_store(engine)
        claim = new_claim()
        (acquired,) = store.claim([claim])
        assert isinstance(acquired, Acquired)
        async for other in async_engine_of(
            url, "asyncpg", poolclass=NullPool if kind is NullPool else AsyncAdaptedQueuePool
        ):
            same = await aopen_store(other)
            assert await same.claim([claim]) == [acquired]
            await same.aclose()
        store.close()


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "AUTOCOMMIT"])
def test_i1_one_of_many_threads_acquires_whatever_isolation_the_engine_has(url: str, level: Any) -> None:
    for engine in engine_of(url, isolation_level=level):
        store = open_store(engine)
        with ThreadPoolExecutor() as threads:
            replies = [*threads.map(store.claim, [[new_claim(id=b"i" * 32)] for _ in range(4)])]
        assert sum(isinstance(reply, Acquired) for [reply] in replies) == 1
        store.close()


async def test_c6_an_async_engine_renews_from_a_thread(async_engine: AsyncEngine) -> None:
    store = await aopen_store(async_engine)
    claim = new_claim()
    (acquired,) = await store.claim([claim])
    assert isinstance(acquired, Acquired)
    if async_engine.dialect.driver == "asyncpg":
        assert isinstance(store, HasKeeper)
        keeper = store.keeper()
        renewal = Renew(claim.id, claim.nonce, acquired.token, 30.0)
        assert not isinstance((await asyncio.to_thread(keeper.renew, [renewal]))[0], Exception)
        await asyncio.to_thread(keeper.close)
    await store.aclose()


def test_one_async_engine_serves_several_loops_and_callers_without_one(url: str) -> None:
    """Its own pool could not."""
    parts = url.partition("?")[0].replace("postgresql://", "postgresql+asyncpg://")
    schema = url.rpartition("%3D")[2]
    engine = create_async_engine(parts, connect_args={"server_settings": {"search_path": schema}})
    source = Source(engine, 2.0)

    async def run() -> bool:
        async with AsyncIdempotency(engine) as idempotency:
            return (await idempotency.run("k", lambda: None, scope="s")).replayed

    assert [asyncio.run(run()) for _ in range(2)] == [False, True]
    with Idempotency(engine) as idempotency:
        assert idempotency.run("k", lambda: None, scope="s").replayed
    store = source.opened().store
    assert isinstance(store, InLoop)
    assert store.perform(_settings) == ["off", "force_generic_plan"]  # type: ignore[attr-defined]  # as the completer
    store.unmark([b"i" * 32])  # type: ignore[attr-defined]  # as `retryproof keys settle`
    source.close()


def test_an_engine_that_a_process_was_forked_with_serves_the_child(engine: Engine) -> None:
    """What the parent opened stays the parent's."""
    idempotency = Idempotency(engine)
    idempotency.run("parent", lambda: None, scope="s")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            replayed = idempotency.run("parent", lambda: None, scope="s").replayed
            os._exit(0 if replayed else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert idempotency.run("parent", lambda: None, scope="s").replayed
    idempotency.close()


class TestDjango:
    def test_a_claim_inside_a_request_s_transaction_outlives_its_rollback(self, django_alias: str) -> None:
        """As under ATOMIC_REQUESTS."""
        from django.db import transaction

        name = django_alias.removeprefix("django://")
        with Idempotency(django_alias) as engine:
            with transaction.atomic(using=name):
                connections[name].cursor().execute("SELECT 1")
                engine.run("k", lambda: None, scope="s")
                transaction.set_rollback(True, using=name)
            assert engine.run("k", lambda: None, scope="s").replayed
        connections[name].close()

    async def test_async_callers_are_served(self, django_alias: str) -> None:
        async with AsyncIdempotency(django_alias) as engine:
            runs = [await engine.run("k", lambda: None, scope="s") for _ in range(2)]
        assert [run.replayed for run in runs] == [False, True]

    def test_a_pool_of_djangos_lends_nothing(self, url: str) -> None:
        for name in alias_of(url, pool=True):
            store = open_store(f"django://{name}")
            assert isinstance(store.claim([new_claim()])[0], Acquired)
            store.close()

    def test_tables_are_made_and_looked_at_by_the_alias(self, postgres_url: str, unique: str) -> None:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {unique}".encode())
        for name in alias_of(f"{postgres_url}?options=-csearch_path%3D{unique}"):
            url = f"django://{name}"
            with pytest.raises(ConfigurationError, match="retryproof migrate"):
                open_store(url).get([b"i" * 32])
            assert pending(url) == migrate(url) != []
            assert pending(url) == []
            assert {finding.check for finding in diagnose(url)} >= {"schema", "encryption"}
            store = open_store(url)
            assert store.get([b"i" * 32]) == [None]
            store.close()

    def test_a_sqlite_file_is_looked_at_by_the_alias(self, tmp_path: Path) -> None:
        for name in sqlite_alias(tmp_path):
            url = f"django://{name}"
            assert (migrate(url), pending(url)) == ([], [])
            assert "file" in {finding.check for finding in diagnose(url)}

    def test_options_are_those_of_the_database(self, postgres_url: str, unique: str) -> None:
        public.migrate(f"{postgres_url}?schema={unique}")
        for name in alias_of(f"{postgres_url}?options=-csearch_path%3Dpublic"):
            store = open_store(f"django://{name}?schema={unique}&pool_size=1")
            assert isinstance(store.claim([new_claim()])[0], Acquired)
            store.close()
            with pytest.raises(ConfigurationError, match="knows the options schema"):
                open_store(f"django://{name}?sslmode=require")

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("django://", "an alias of DATABASES"),
            ("django://default/keys", "an alias of DATABASES"),
            ("django://absent", "DATABASES has no 'absent'; it has default"),
            ("django://default", "in memory"),
        ],
    )
    def test_what_is_no_database_of_a_store_is_refused(self, url: str, says: str) -> None:
        for _ in alias(ENGINE="django.db.backends.sqlite3", NAME="other.db"):
            with pytest.raises(ConfigurationError, match=says):
                open_store(url)


@pytest.mark.parametrize(
    ("module", "says"),
    [(None, "settings are not configured"), ("absent_settings", "No module named 'absent_settings'")],
)
def test_the_command_line_says_that_django_has_no_settings(module: str | None, says: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    environment |= {"DJANGO_SETTINGS_MODULE": module} if module else {}
    done = _retryproof("migrate", "django://default", folder=tmp_path, environment=environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_finds_settings_in_the_present_directory(tmp_path: Path) -> None:
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": "app.db"}
    (tmp_path / "shop_settings.py").write_text(f"DATABASES = {{'default': {database!r}}}\n")
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "shop_settings"}
    done = _retryproof("keys", "list", "django://default", folder=tmp_path, environment=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "No records."), done.stderr


def _retryproof(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; sys.path = [part for part in sys.path if part]; from retryproof.cli.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class TestSqlite:
    def test_engine_and_url_lead_to_one_file(self, tmp_path: Path) -> None:
        for engine in sqlite_engine(tmp_path):
            with Idempotency(engine) as one, Idempotency(f"sqlite:///{tmp_path / 'app.db'}") as other:
                one.run("k", lambda: None, scope="s")
                assert other.run("k", lambda: None, scope="s").replayed

    async def test_an_async_engine_s_file_serves(self, tmp_path: Path) -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
        async with AsyncIdempotency(engine) as idempotency:
            runs = [await idempotency.run("k", lambda: None, scope="s") for _ in range(2)]
        assert [run.replayed for run in runs] == [False, True]
        await engine.dispose()

    def test_the_file_of_a_uri_serves(self, tmp_path: Path) -> None:
        engine = create_engine(f"sqlite:///file:{tmp_path / 'a b.db'}?mode=rwc&uri=true")
        store = open_store(engine)
        assert isinstance(store.claim([new_claim()])[0], Acquired)
        store.close()
        assert (tmp_path / "a b.db").exists()

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("sqlite://", "in memory"),
            ("sqlite:///:memory:", "in memory"),
            ("sqlite:///file::memory:?cache=shared&uri=true", "in memory"),
            ("sqlite:///file:name?mode=memory&cache=shared&uri=true", "in memory"),
            ("sqlite:///file:keys.db?immutable=1&uri=true", "immutable"),
        ],
    )
    def test_what_is_no_file_is_refused_when_the_store_is_named(self, url: str, says: str) -> None:
        with pytest.raises(ConfigurationError, match=says):
            Idempotency(create_engine(url, poolclass=StaticPool))


def test_an_engine_of_another_database_is_refused_when_it_is_given() -> None:
    with pytest.raises(ConfigurationError, match=r"mysql\+pymysql; use postgresql\+psycopg"):
        Idempotency(create_engine("mysql+pymysql://u@h/d"))


def test_migrate_takes_engines(postgres_url: str, unique: str, tmp_path: Path) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {unique}".encode())
    url = f"{postgres_url}?options=-csearch_path%3D{unique}"
    for engine in engine_of(url):
        assert public.migrate(engine)
        assert public.migrate(engine) == []
    asyncpg = create_async_engine(
        postgres_url.replace("postgresql://", "postgresql+asyncpg://"),
        connect_args={"server_settings": {"search_path": unique}},
    )
    assert public.migrate(asyncpg) == []
    for engine in sqlite_engine(tmp_path):
        assert public.migrate(engine) == []


class TestHungServers:
    """C10: every call ends, whatever the server does."""

    @pytest.mark.quiet
    @pytest.mark.crash
    @pytest.mark.parametrize("way", ["engine", "async engine", "django"])
    def test_a_hung_server_is_an_error_in_time_and_forgotten_when_it_wakes(
        self, private_postgres: PrivateServer, way: str
    ) -> None:
        server = private_postgres()
        public.migrate(server.url)
        with _two(server.url, way, timeout=0.5) as (used, new):
            check_a_hung_server_is_an_error_in_time(server, used, new)

    @pytest.mark.quiet
    @pytest.mark.crash
    async def test_a_hung_server_does_not_hang_the_loop(self, private_postgres: PrivateServer) -> None:
        server = private_postgres()
        await asyncio.to_thread(public.migrate, server.url)
        engine = create_async_engine(server.url.replace("postgresql://", "postgresql+asyncpg://"))
        used, new = await aopen_store(engine, timeout=0.5), await aopen_store(engine, timeout=0.5)
        await check_a_hung_server_does_not_hang_the_loop(server, used, new)

    @pytest.mark.crash
    @pytest.mark.parametrize("way", ["engine", "async engine", "django"])
    def test_a_restart_goes_unnoticed_and_a_dead_server_is_an_error_at_once(
        self, private_postgres: PrivateServer, way: str
    ) -> None:
        server = private_postgres()
        public.migrate(server.url)
        with _two(server.url, way, timeout=5.0) as (store, _):
            claim = new_claim()
            acquired = store.claim([claim])
            server.restart()
            assert store.claim([claim]) == acquired
            server.kill()
            with pytest.raises(StoreUnavailable):
                store.claim([claim])

    def test_an_engine_that_connects_for_ever_is_not_asked_again_and_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pools, "_making", threading.Semaphore(1))
        waiting = threading.Event()

        def creator() -> Any:
            waiting.wait()
            raise psycopg.OperationalError("at last")

        store = open_store(create_engine("postgresql+psycopg://", creator=creator), timeout=0.05)
        with pytest.raises(StoreUnavailable, match=r"within 0\.05 s"):
            store.get([b"i" * 32])
        with pytest.raises(StoreUnavailable, match="connect_timeout"):
            store.get([b"i" * 32])
        waiting.set()

    def test_what_an_engine_raises_is_told(self) -> None:
        def creator() -> Any:
            raise RuntimeError("no token today")

        with pytest.raises(StoreUnavailable, match="RuntimeError: no token today"):
            open_store(create_engine("postgresql+psycopg://", creator=creator)).get([b"i" * 32])


@contextlib.contextmanager
def _two(url: str, way: str, timeout: float) -> Iterator[tuple[Store, Store]]:
    """Two stores over one engine or alias."""
    with contextlib.ExitStack() as stack:
        given: Any = None
        match way:
            case "engine":
                given = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
                stack.callback(given.dispose)
            case "async engine":
                given = create_async_engine(url.replace("postgresql://", "postgresql+psycopg://"))
            case _:
                given = f"django://{stack.enter_context(contextlib.contextmanager(alias_of)(f'{url}?options=-csearch_path%3Dpublic'))}"
        stores = [open_store(given, timeout=timeout) for _ in range(2)]
        for store in stores:
            stack.callback(store.close)
        yield stores[0], stores[1]


class TestPoolers:
    """Settings would stay with sessions that a transaction pooler gives to others."""

    @pytest.mark.parametrize("pooled", [False, True], ids=["directly", "behind a pooler"])
    def test_a_session_gets_settings_only_where_it_is_ours(
        self, engine: Engine, pooled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if pooled:
            monkeypatch.setattr(pools, "BACKEND", "SELECT 1")  # a pooler names no backend of the server's
        store = open_store(engine)
        assert isinstance(store, PsycopgStore)
        assert store.perform(_settings) == (["on", "auto"] if pooled else ["off", "force_generic_plan"])
        store.close()

    @pytest.mark.parametrize("pooled", [False, True], ids=["directly", "behind a pooler"])
    async def test_so_on_an_event_loop(self, url: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if pooled:
            monkeypatch.setattr(loop_pools, "BACKEND", "SELECT 1")
        async for engine in async_engine_of(url, "asyncpg"):
            store = await aopen_store(engine)
            assert isinstance(store, AsyncpgStore)
            assert await store.perform(_settings) == (["on", "auto"] if pooled else ["off", "force_generic_plan"])
            await store.aclose()


def _settings() -> Plan[list[str]]:
    values: list[str] = []
    for name in ("enable_seqscan", "plan_cache_mode"):
        values += [row[0] for row in (yield Statement(f"SHOW {name}"))]
    return values
