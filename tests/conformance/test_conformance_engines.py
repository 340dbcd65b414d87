"""The conformance suite over SQLAlchemy's engines and Django's aliases, whose rivals are engines of another process."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from retryproof.stores import AsyncStore, Store, aopen_store, open_store
from retryproof.testing import AsyncStoreConformance, StoreConformance
from tests.stores.engines import alias_of, async_engine_of, engine_of, migrated, sqlite_alias, sqlite_engine


@pytest.fixture
def url(postgres_url: str, unique: str) -> str:
    """A schema of the test's own."""
    return migrated(postgres_url, unique)


class _OverEngine(StoreConformance):
    @pytest.fixture
    def store(self, engine: Engine) -> Iterator[Store]:
        store = open_store(engine)
        yield store
        store.close()

    @pytest.fixture
    def rival(self, engine: Engine) -> Iterator[Store]:
        store = open_store(engine)
        yield store
        store.close()


class TestEngineOnPsycopg(_OverEngine):
    @pytest.fixture
    def engine(self, url: str) -> Iterator[Engine]:
        yield from engine_of(url)


class TestEngineOnSqlite(_OverEngine):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        yield from sqlite_engine(tmp_path)


class TestAsyncEngineOnAsyncpg(AsyncStoreConformance):
    @pytest.fixture
    async def engine(self, url: str) -> AsyncIterator[AsyncEngine]:
        async for engine in async_engine_of(url, "asyncpg"):
            yield engine

    @pytest.fixture
    async def store(self, engine: AsyncEngine) -> AsyncIterator[AsyncStore]:
        store = await aopen_store(engine)
        yield store
        await store.aclose()

    @pytest.fixture
    async def rival(self, engine: AsyncEngine) -> AsyncIterator[AsyncStore]:
        store = await aopen_store(engine)
        yield store
        await store.aclose()


class TestAsyncEngineOnPsycopg(TestAsyncEngineOnAsyncpg):
    @pytest.fixture
    async def engine(self, url: str) -> AsyncIterator[AsyncEngine]:
        async for engine in async_engine_of(url, "psycopg"):
            yield engine


class TestAsyncEngineOnAiosqlite(TestAsyncEngineOnAsyncpg):
    @pytest.fixture
    async def engine(self, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}")
        yield engine
        await engine.dispose()


class _OverAlias(StoreConformance):
    @pytest.fixture
    def store(self, alias: str) -> Iterator[Store]:
        store = open_store(f"django://{alias}")
        yield store
        store.close()

    @pytest.fixture
    def rival(self, alias: str) -> Iterator[Store]:
        store = open_store(f"django://{alias}")
        yield store
        store.close()


class TestDjangoOnPostgres(_OverAlias):
    @pytest.fixture
    def alias(self, url: str) -> Iterator[str]:
        yield from alias_of(url)


class TestDjangoOnSqlite(_OverAlias):
    @pytest.fixture
    def alias(self, tmp_path: Path) -> Iterator[str]:
        yield from sqlite_alias(tmp_path)
