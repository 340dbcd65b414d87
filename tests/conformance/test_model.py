"""Every store against the memory store, in random sequences of batches (see `model`)."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.memory import MemoryStore
from retryproof.stores.redis import AsyncRedisStore, RedisStore
from retryproof.stores.sql.asyncpg import AsyncpgStore
from retryproof.stores.sql.migrate import migrate
from retryproof.stores.sql.psycopg import PsycopgStore
from retryproof.stores.sql.sqlite import SqliteStore
from tests.conformance.model import Call, check


def _blocking(store: Store) -> Call:
    return lambda method, *arguments, **options: getattr(store, method)(*arguments, **options)


def _awaited(runner: asyncio.Runner, make: Callable[[], AsyncStore], stack: ExitStack) -> Call:
    async def opened() -> AsyncStore:
        return make()

    store = runner.run(opened())
    stack.callback(lambda: runner.run(store.aclose()))
    return lambda method, *arguments, **options: runner.run(getattr(store, method)(*arguments, **options))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def runner(stack: ExitStack) -> asyncio.Runner:
    return stack.enter_context(asyncio.Runner())


@pytest.fixture
def postgres_schema(postgres_url: str, unique: str) -> str:
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return url


def test_memory_on_the_hosts_clock_agrees_with_the_model() -> None:
    check(_blocking(MemoryStore()))


def test_sqlite_agrees_with_the_model(tmp_path: Path, stack: ExitStack) -> None:
    store = SqliteStore(str(tmp_path / "keys.db"), synchronous="NORMAL")
    stack.callback(store.close)
    check(_blocking(store))


@pytest.mark.parametrize("server", ["redis", "valkey"])
def test_redis_agrees_with_the_model(
    server: str, request: pytest.FixtureRequest, unique: str, stack: ExitStack
) -> None:
    store = RedisStore(request.getfixturevalue(f"{server}_url"), prefix=unique)
    stack.callback(store.close)
    check(_blocking(store))


def test_async_redis_agrees_with_the_model(
    redis_url: str, unique: str, runner: asyncio.Runner, stack: ExitStack
) -> None:
    check(_awaited(runner, lambda: AsyncRedisStore(redis_url, prefix=unique), stack), examples=40)


def test_postgres_agrees_with_the_model_on_psycopg(postgres_schema: str, stack: ExitStack) -> None:
    store = PsycopgStore(postgres_schema)
    stack.callback(store.close)
    check(_blocking(store))


def test_postgres_agrees_with_the_model_on_asyncpg(
    postgres_schema: str, runner: asyncio.Runner, stack: ExitStack
) -> None:
    check(_awaited(runner, lambda: AsyncpgStore(postgres_schema), stack), examples=40)
