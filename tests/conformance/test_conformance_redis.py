"""The conformance suite over Redis and Valkey, both colours, with a rival of its own connections."""

from collections.abc import AsyncIterator, Iterator

import pytest

from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.redis import AsyncRedisStore, RedisStore
from retryproof.testing import AsyncStoreConformance, StoreConformance


@pytest.fixture(params=["redis", "valkey"])
def url(request: pytest.FixtureRequest) -> str:
    server: str = request.getfixturevalue(f"{request.param}_url")
    return server


class TestRedisStore(StoreConformance):
    @pytest.fixture
    def store(self, url: str, unique: str) -> Iterator[Store]:
        store = RedisStore(url, prefix=unique)
        yield store
        store.close()

    @pytest.fixture
    def rival(self, url: str, unique: str) -> Iterator[Store]:
        store = RedisStore(url, prefix=unique)
        yield store
        store.close()


class TestAsyncRedisStore(AsyncStoreConformance):
    @pytest.fixture
    async def store(self, url: str, unique: str) -> AsyncIterator[AsyncStore]:
        store = AsyncRedisStore(url, prefix=unique)
        yield store
        await store.aclose()

    @pytest.fixture
    async def rival(self, url: str, unique: str) -> AsyncIterator[AsyncStore]:
        store = AsyncRedisStore(url, prefix=unique)
        yield store
        await store.aclose()
