"""The conformance suite over PostgreSQL, on both drivers, with a rival of its own connections."""

from collections.abc import AsyncIterator, Iterator

import pytest

from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.sql.asyncpg import AsyncpgStore
from retryproof.stores.sql.migrate import migrate
from retryproof.stores.sql.psycopg import PsycopgStore
from retryproof.testing import AsyncStoreConformance, StoreConformance


@pytest.fixture
def url(postgres_url: str, unique: str) -> str:
    """A schema of the test's own."""
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return url


class TestPsycopgStore(StoreConformance):
    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        store = PsycopgStore(url)
        yield store
        store.close()

    @pytest.fixture
    def rival(self, url: str) -> Iterator[Store]:
        store = PsycopgStore(url)
        yield store
        store.close()


class TestAsyncpgStore(AsyncStoreConformance):
    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[AsyncStore]:
        store = AsyncpgStore(url)
        yield store
        await store.aclose()

    @pytest.fixture
    async def rival(self, url: str) -> AsyncIterator[AsyncStore]:
        store = AsyncpgStore(url)
        yield store
        await store.aclose()
