"""Transactional mode over HTTP: the response is stored in the handler's commit, and sent only after it (T1)."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from retryproof import Idempotency, current_operation
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.fastapi import blocking_transaction, transaction
from tests.transaction.support import Database, insert

pytestmark = pytest.mark.timeout(60)
KEY = {"Idempotency-Key": "a2f6c1d4-5b1f-4c7e-9d0e-1f2a3b4c5d6e"}


@contextlib.asynccontextmanager
async def serving(database: Database, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An app with one route for each way a handler may end."""
    engine = create_async_engine(database.address("asyncpg"))
    blocking = database.engine("psycopg")
    app = FastAPI()
    own = Annotated[AsyncSession, Depends(transaction(async_sessionmaker(engine)))]
    threaded = Annotated[Session, Depends(blocking_transaction(sessionmaker(blocking)))]

    @app.post("/charges", status_code=201)
    async def charge(session: own) -> dict[str, int]:
        await session.execute(text(insert()))
        assert database.charges() == []
        return {"charged": 1}

    @app.post("/blocking", status_code=201)
    def charge_in_a_thread(session: threaded) -> dict[str, int]:
        session.execute(text(insert()))
        return {"charged": 1}

    @app.post("/overtaken")
    async def overtaken(session: own) -> str:
        await session.execute(text(insert()))
        database.execute("UPDATE retryproof_operations SET state = 1, token = token + 1, lease_until = 0")
        return "the loser's"

    @app.post("/status/{status}")
    async def ends_with(session: own, status: int) -> JSONResponse:
        await session.execute(text(insert()))
        return JSONResponse({"status": status}, status)

    @app.post("/raises")
    async def raises(session: own) -> None:
        await session.execute(text(insert()))
        raise ValueError("refused")

    @app.post("/deferred")
    async def deferred(session: own) -> str:
        for _ in range(2):
            await session.execute(text("INSERT INTO once VALUES (1)"))
        return "done"

    @app.post("/commits")
    async def commits(session: own, raw: bool = False) -> str:
        await session.execute(text(insert()))
        await (session.execute(text("COMMIT")) if raw else session.commit())
        return "done"

    middleware = IdempotencyMiddleware(app, store=database.store, scope=single_tenant, **options)
    transport = httpx.ASGITransport(middleware, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=KEY) as client:
        yield client
    await middleware.aclose()
    await engine.dispose()
    blocking.dispose()


@pytest.mark.parametrize("path", ["/charges", "/blocking"])
async def test_t1_the_response_is_stored_in_the_handlers_commit(postgres: Database, path: str) -> None:
    async with serving(postgres) as client:
        first, second = await client.post(path), await client.post(path)
    assert (first.status_code, first.json(), second.json()) == (201, {"charged": 1}, {"charged": 1})
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert postgres.charges() == [1]


async def test_t1_an_overtaken_handler_commits_nothing_and_answers_for_the_winner(postgres: Database) -> None:
    async with serving(postgres) as client:
        answer = await client.post("/overtaken")
    assert (answer.status_code, answer.json()["code"]) == (409, "in-progress")
    assert postgres.charges() == []


@pytest.mark.parametrize(("status", "kept"), [(404, True), (409, False), (503, False)])
async def test_t1_a_response_that_is_not_kept_is_rolled_back(postgres: Database, status: int, kept: bool) -> None:
    async with serving(postgres) as client:
        answers = [await client.post(f"/status/{status}") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    assert "Idempotency-Replayed" in answers[1].headers if kept else "Idempotency-Replayed" not in answers[1].headers
    assert postgres.charges() == ([1] if kept else [])


async def test_t1_a_success_that_is_not_kept_becomes_a_definite_error(postgres: Database) -> None:
    async with serving(postgres, store_when=lambda status, headers: False) as client:
        answer = await client.post("/status/200")
    assert (answer.status_code, answer.json()["code"]) == (500, "transaction-failed")
    assert postgres.charges() == []


async def test_t1_what_raises_rolls_back(postgres: Database) -> None:
    async with serving(postgres) as client:
        assert (await client.post("/raises")).status_code == 500
    assert postgres.charges() == []


async def test_a_commit_that_fails_is_no_success(postgres: Database) -> None:
    postgres.execute("CREATE TABLE once (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    async with serving(postgres) as client:
        answers = [await client.post("/deferred") for _ in range(2)]  # released, so it may run again
    assert [answer.json()["code"] for answer in answers] == ["transaction-failed", "transaction-failed"]


async def test_t1_a_sessions_commit_is_refused_before_it_happens(postgres: Database) -> None:
    async with serving(postgres) as client:
        assert (await client.post("/commits")).status_code == 500
    assert postgres.charges() == []


async def test_t1_a_handler_that_commits_in_plain_sql_has_an_unknown_outcome(postgres: Database) -> None:
    async with serving(postgres) as client:
        answers = [await client.post("/commits?raw=true")]
        postgres.execute("UPDATE retryproof_operations SET lease_until = 0")
        answers.append(await client.post("/commits?raw=true"))
    assert postgres.charges() == [1]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(409, "outcome-unknown")] * 2
    assert "retry-after" not in answers[1].headers


async def test_c10_fail_open_and_transactions_exclude_each_other(postgres: Database) -> None:
    async with serving(postgres, fail_open=True) as client:
        assert (await client.post("/charges")).status_code == 500
    assert postgres.charges() == []


async def test_a_request_without_an_operation_is_refused(postgres: Database) -> None:
    async with serving(postgres) as client:
        del client.headers["Idempotency-Key"]
        assert (await client.post("/charges")).status_code == 500
    assert postgres.charges() == []


def test_outside_of_an_operation_there_is_none(postgres: Database) -> None:
    with Idempotency(postgres.store):
        assert current_operation(default=None) is None
