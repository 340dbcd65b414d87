"""However a transactional request ends, its work and its response are kept together or not at all (T1, I8)."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import asyncpg
import httpx
import psycopg
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import ASGIApp, Message, Scope

from retryproof import Policy, current_operation, errors
from retryproof.core.record import State
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.fastapi import blocking_transaction, transaction
from retryproof.sql.callers.asyncpg import Asyncpg
from retryproof.sql.callers.psycopg import AsyncPsycopg
from retryproof.testing.link import FaultLink
from tests.transaction.support import Database, insert

pytestmark = pytest.mark.timeout(60)
KEY = {"Idempotency-Key": "a2f6c1d4-5b1f-4c7e-9d0e-1f2a3b4c5d6e"}


@contextlib.asynccontextmanager
async def covered(database: Database, app: Any, **options: Any) -> AsyncIterator[IdempotencyMiddleware]:
    middleware = IdempotencyMiddleware(app, store=database.store, scope=single_tenant, **options)
    yield middleware
    await middleware.aclose()


@contextlib.asynccontextmanager
async def client_of(middleware: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(middleware, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=KEY) as client:
        yield client


@contextlib.asynccontextmanager
async def connected(database: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(database.store) as connection:
        yield connection


def code(answer: httpx.Response) -> Any:
    return answer.json().get("code")


@contextlib.asynccontextmanager
async def sessions(database: Database) -> AsyncIterator[Any]:
    engine = create_async_engine(database.address("asyncpg"))
    yield async_sessionmaker(engine)
    await engine.dispose()


# Handlers that raise


@pytest.mark.parametrize("framework", [True, False], ids=["a framework answers", "the layer answers"])
async def test_t1_what_raises_is_rolled_back_where_failures_are_kept(postgres: Database, framework: bool) -> None:
    """The failure is stored, and replayed; the work that came before it is not."""

    async def fail() -> None:
        connection = await current_operation().atransaction(connected(postgres))
        await connection.execute(insert())
        raise ValueError("half-way")

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await fail()

    app = FastAPI()
    app.post("/charges")(fail)
    async with (
        covered(postgres, app if framework else bare, store_when="stripe") as middleware,
        client_of(middleware) as client,
    ):
        first, second = await client.post("/charges"), await client.post("/charges")
    assert (first.status_code, second.status_code) == (500, 500)
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.text == "Internal Server Error" if framework else code(second) == "handler-failed"
    assert postgres.charges() == []


@pytest.mark.parametrize("kind", ["awaited", "blocking"])
async def test_t1_an_http_exception_rolls_back_and_its_answer_is_kept(postgres: Database, kind: str) -> None:
    """The framework makes a response of it, which looks like any other from outside; the dependency sees it."""
    app, engine = FastAPI(), postgres.engine("psycopg")
    async with sessions(postgres) as make:
        if kind == "awaited":

            @app.post("/charges")
            async def charge(session: Annotated[AsyncSession, Depends(transaction(make))]) -> None:
                await session.execute(text(insert()))
                raise HTTPException(402, "the card was declined")

        else:

            @app.post("/charges")
            def charge_blocking(
                session: Annotated[Session, Depends(blocking_transaction(sessionmaker(engine)))],
            ) -> None:
                session.execute(text(insert()))
                raise HTTPException(402, "the card was declined")

        async with covered(postgres, app) as middleware, client_of(middleware) as client:
            first, second = await client.post("/charges"), await client.post("/charges")
    engine.dispose()
    assert (first.status_code, second.status_code) == (402, 402)
    assert second.headers["Idempotency-Replayed"] == "true"
    assert postgres.charges() == []


async def test_t1_a_dependency_that_raises_after_the_session_was_opened_rolls_back(postgres: Database) -> None:
    app = FastAPI()
    async with sessions(postgres) as make:

        async def recorded(session: Annotated[AsyncSession, Depends(transaction(make))]) -> AsyncSession:
            await session.execute(text(insert()))
            return session

        async def checked(session: Annotated[AsyncSession, Depends(recorded)]) -> None:
            raise HTTPException(403, "not yours")

        @app.post("/charges", dependencies=[Depends(checked)])
        async def charge() -> None:
            raise AssertionError("never")

        async with covered(postgres, app) as middleware, client_of(middleware) as client:
            assert (await client.post("/charges")).status_code == 403
    assert postgres.charges() == []


# Streams


async def test_t1_a_stream_that_breaks_rolls_back(postgres: Database) -> None:
    app = FastAPI()

    @app.post("/charges")
    async def charge() -> StreamingResponse:
        connection = await current_operation().atransaction(connected(postgres))

        async def parts() -> AsyncIterator[bytes]:
            await connection.execute(insert())
            yield b"part"
            raise ValueError("half-way")

        return StreamingResponse(parts())

    for options in ({}, {"store_when": "stripe"}):
        async with covered(postgres, app, **options) as middleware, client_of(middleware) as client:
            with contextlib.suppress(httpx.HTTPError):
                await client.post("/charges")
        assert postgres.charges() == []
        postgres.execute("DELETE FROM retryproof_operations")


async def test_t1_a_stream_commits_before_its_end_is_sent(postgres: Database) -> None:
    app, seen = FastAPI(), []

    @app.post("/charges")
    async def charge() -> StreamingResponse:
        connection = await current_operation().atransaction(connected(postgres))

        async def parts() -> AsyncIterator[bytes]:
            await connection.execute(insert())
            yield b"part"
            yield b"last"

        return StreamingResponse(parts())

    async with covered(postgres, app) as middleware:

        async def watching(scope: Scope, receive: Any, send: Any) -> None:
            async def sending(message: Message) -> None:
                if message["type"] == "http.response.body":
                    seen.append((message.get("body"), message.get("more_body", False), postgres.charges()))
                await send(message)

            await middleware(scope, receive, sending)

        async with client_of(watching) as client:
            assert (await client.post("/charges")).content == b"partlast"
            assert (await client.post("/charges")).headers["Idempotency-Replayed"] == "true"
    assert seen[:3] == [(b"part", True, []), (b"last", True, []), (b"", False, [1])]


async def test_t1_a_client_that_leaves_a_stream_too_long_to_keep_parts_no_work(postgres: Database) -> None:
    """It goes on to its end and commits whole."""
    app, left = FastAPI(), asyncio.Event()

    @app.post("/charges")
    async def charge() -> StreamingResponse:
        connection = await current_operation().atransaction(connected(postgres))

        async def parts() -> AsyncIterator[bytes]:
            await connection.execute(insert(1))
            yield b"x" * 200
            await left.wait()
            await asyncio.sleep(0.05)  # the time in which a framework would be told, and stop
            await connection.execute(insert(2))
            yield b"y"

        return StreamingResponse(parts())

    async with covered(postgres, app, policy=Policy(max_result=100)) as middleware:
        await leave_after_the_first_part(middleware, left)
        assert postgres.charges() == [1, 2]
        async with client_of(middleware) as client:
            replay = await client.post("/charges")
    assert replay.headers["Idempotency-Replay"] == "omitted"
    assert postgres.charges() == [1, 2]


def states(database: Database) -> list[int]:
    with database.connect() as connection:
        return [state for (state,) in connection.execute("SELECT state FROM retryproof_operations")]


@pytest.mark.parametrize("body", [[b"short"], [b"too ", b"long"], [b"sh", b"ort"], None], ids=str)
async def test_h10_joined_work_whose_response_is_not_whole_is_rolled_back(
    postgres: Database, body: list[bytes] | None
) -> None:
    """Its length is not the one that was announced, or it has no end: released, so that a retry may do it."""

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        connection = await current_operation().atransaction(connected(postgres))
        await connection.execute(insert())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        for part in body or []:
            await send({"type": "http.response.body", "body": part, "more_body": part is not (body or [])[-1]})

    async with covered(postgres, app) as middleware, client_of(middleware) as client:
        for _ in range(2):
            answer = await client.post("/charges")
            assert "Idempotency-Replayed" not in answer.headers
            assert postgres.charges() == []
    assert states(postgres) == [State.RELEASED]


async def test_h11_joined_work_that_is_stopped_without_its_client_is_rolled_back(postgres: Database) -> None:
    app, left = FastAPI(), asyncio.Event()

    @app.post("/charges")
    async def charge() -> StreamingResponse:
        connection = await current_operation().atransaction(connected(postgres))

        async def parts() -> AsyncIterator[bytes]:
            await connection.execute(insert())
            while True:
                yield b"x"
                await asyncio.sleep(0.01)

        return StreamingResponse(parts())

    async with covered(postgres, app, on_departure="stop") as middleware:
        with contextlib.suppress(OSError):
            await leave_after_the_first_part(middleware, left)
    assert postgres.charges() == []
    assert states(postgres) == [State.RELEASED]


async def leave_after_the_first_part(app: Any, left: asyncio.Event) -> None:
    """A client that goes away in the middle of a stream, as a server tells the app."""
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            left.set()

    headers = [(name.lower().encode(), value.encode()) for name, value in KEY.items()]
    await app(
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/charges",
            "raw_path": b"/charges",
            "query_string": b"",
            "headers": headers,
            "server": ("test", 80),
            "client": ("client", 1),
        },
        receive,
        send,
    )


# Responses that are too large, and clients that leave


async def test_c17_a_response_too_large_to_keep_commits_as_done(postgres: Database) -> None:
    app = FastAPI()

    @app.post("/charges")
    async def charge() -> str:
        connection = await current_operation().atransaction(connected(postgres))
        await connection.execute(insert())
        return "x" * 1000

    async with covered(postgres, app, policy=Policy(max_result=100)) as middleware, client_of(middleware) as client:
        first, second = await client.post("/charges"), await client.post("/charges")
    assert first.json() == "x" * 1000
    assert (second.status_code, second.content, second.headers["Idempotency-Replay"]) == (200, b"", "omitted")
    assert postgres.charges() == [1]


def meeting_a_lock(database: Database, blocker: Any) -> FastAPI:
    """A charge whose completion waits until the blocker, a connection, commits."""
    app = FastAPI()

    @app.post("/charges")
    async def charge() -> str:
        connection = await current_operation().atransaction(connected(database))
        await connection.execute(insert())
        await blocker.execute("BEGIN")
        await blocker.execute("SELECT 1 FROM retryproof_operations FOR UPDATE")
        return "charged"

    return app


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_h11_a_client_that_leaves_during_the_commit_leaves_a_whole_operation(
    postgres: Database, cancellations: int
) -> None:
    """The server cancels while the completion waits for the record's row, once or twice."""
    blocker = await asyncpg.connect(postgres.store)
    app = meeting_a_lock(postgres, blocker)
    async with covered(postgres, app) as middleware, client_of(middleware) as client:
        asked = asyncio.create_task(client.post("/charges"))
        await until_waiting(postgres)
        for _ in range(cancellations):
            asked.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await blocker.execute("COMMIT")
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until_charged(postgres)
        replay = await client.post("/charges")
        assert (replay.json(), replay.headers["Idempotency-Replayed"]) == ("charged", "true")
        await until(lambda: idle(middleware))
    assert postgres.charges() == [1]
    await blocker.close()


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_t1_what_cancels_the_app_during_the_commit_parts_nothing(postgres: Database, cancellations: int) -> None:
    """A time-out inside of the app, say: the operation is whole, and the layer lets go of it."""
    blocker = await asyncpg.connect(postgres.store)
    app = meeting_a_lock(postgres, blocker)

    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.current_task())
        await app(scope, receive, send)

    tasks: list[Any] = []
    async with covered(postgres, impatient) as middleware, client_of(middleware) as client:
        asked = asyncio.create_task(client.post("/charges"))
        await until_waiting(postgres)
        for _ in range(cancellations):
            tasks[0].cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await blocker.execute("COMMIT")
        await asyncio.wait({asked})
        await until_charged(postgres)
        replay = await client.post("/charges")
        assert (replay.json(), replay.headers["Idempotency-Replayed"]) == ("charged", "true")
        await until(lambda: idle(middleware))
    assert postgres.charges() == [1]
    await blocker.close()


WAITS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def until_waiting(postgres: Database) -> None:
    """The completion waits for the record's row."""
    watcher = await asyncpg.connect(postgres.store)
    await until(lambda: watcher.fetchval(WAITS))
    await watcher.close()


async def until_charged(postgres: Database) -> None:
    watcher = await asyncpg.connect(postgres.store)
    await until(lambda: watcher.fetchval("SELECT count(*) FROM charges"))
    await watcher.close()


async def idle(middleware: IdempotencyMiddleware) -> bool:
    """Whether the layer holds nothing any more."""
    return middleware._engine._source.aopened().background.idle


async def until(true: Callable[[], Any]) -> None:
    """Wait for another process, or task."""
    async with asyncio.timeout(20):
        while not await true():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def connected_by_asyncpg(database: Database) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database.store)
    yield connection
    await connection.close()


@pytest.mark.parametrize("connect", [connected, connected_by_asyncpg], ids=["psycopg", "asyncpg"])
async def test_c8_a_handler_that_is_overtaken_within_a_query_rolls_back_at_once(
    postgres: Database, connect: Callable[[Database], Any]
) -> None:
    app = FastAPI()

    @app.post("/charges")
    async def charge() -> str:
        connection = await current_operation().atransaction(connect(postgres))
        await connection.execute(insert())
        postgres.execute("UPDATE retryproof_operations SET token = token + 1, lease_until = lease_until + 60000000")
        await connection.execute("SELECT pg_sleep(30)")
        return "the loser's"

    async with covered(postgres, app, policy=Policy(lease=0.3)) as middleware, client_of(middleware) as client:
        async with asyncio.timeout(10):
            answer = await client.post("/charges")
        assert (answer.status_code, code(answer)) == (409, "in-progress")
        await until(lambda: idle(middleware))
    assert postgres.charges() == []


# Transactions asked for at the wrong time


async def test_t1_two_transactions_asked_for_at_once_are_refused(postgres: Database) -> None:
    app, refusals = FastAPI(), []

    @app.post("/charges")
    async def charge() -> str:
        operation = current_operation()
        asked = await asyncio.gather(
            *(operation.atransaction(connected(postgres)) for _ in range(2)), return_exceptions=True
        )
        for one in asked:
            if isinstance(one, errors.ConfigurationError):
                refusals.append(one.message)
            else:
                await one.execute(insert())  # type: ignore[union-attr]  # gather says it may be an exception
        return "charged"

    async with covered(postgres, app) as middleware, client_of(middleware) as client:
        assert (await client.post("/charges")).json() == "charged"
    assert (len(refusals), postgres.charges()) == (1, [1])
    assert "has a transaction already" in refusals[0]


@pytest.mark.parametrize("joined", [True, False])
async def test_t1_a_background_task_that_asks_for_the_transaction_is_refused(postgres: Database, joined: bool) -> None:
    app = FastAPI()
    refusals: list[str] = []

    async def later() -> None:
        operation = current_operation()
        for block in [connected(postgres), *([given] if joined else [])]:
            try:
                connection = await operation.atransaction(block)
                await connection.execute(insert(2))
            except errors.ConfigurationError as error:
                refusals.append(error.message)

    given = connected(postgres)

    @app.post("/charges")
    async def charge(tasks: BackgroundTasks) -> str:
        if joined:
            connection = await current_operation().atransaction(given)
            await connection.execute(insert())
        tasks.add_task(later)
        return "charged"

    async with covered(postgres, app) as middleware, client_of(middleware) as client:
        assert (await client.post("/charges")).json() == "charged"
    assert postgres.charges() == ([1] if joined else [])
    assert ["has ended" in refusal for refusal in refusals] == [True] * (1 + joined)


# Connections that fail at the end


async def test_t1_a_connection_that_cannot_be_closed_after_the_commit_is_no_failure(
    postgres: Database, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()

    @contextlib.asynccontextmanager
    async def closing_badly() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        async with connected(postgres) as connection:
            yield connection
        raise OSError("the pool is gone")

    @app.post("/charges")
    async def charge() -> str:
        connection = await current_operation().atransaction(closing_badly())
        await connection.execute(insert())
        return "charged"

    with caplog.at_level(logging.WARNING, "retryproof"):
        async with covered(postgres, app) as middleware, client_of(middleware) as client:
            first, second = await client.post("/charges"), await client.post("/charges")
            await until(lambda: idle(middleware))
    assert (first.status_code, first.json()) == (200, "charged")
    assert second.headers["Idempotency-Replayed"] == "true"
    assert postgres.charges() == [1]
    assert "could not be closed" in caplog.text


@pytest.mark.parametrize("library", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("arrives", [True, False], ids=["reply lost", "commit lost"])
async def test_c3_a_commit_that_is_cut_off_is_settled_by_the_record(
    postgres: Database, library: str, arrives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network ends the connection as the commit goes out, or as its answer comes back."""
    app = FastAPI()
    host, _, port = postgres.store.partition("@")[2].partition("/")[0].partition(":")
    with FaultLink(host, int(port)) as link:
        through = postgres.store.replace(f"{host}:{port}", f"{link.host}:{link.port}")

        @contextlib.asynccontextmanager
        async def over_the_link() -> AsyncIterator[Any]:
            if library == "psycopg":
                async with await psycopg.AsyncConnection.connect(through) as connection:
                    yield connection
            else:
                opened = await asyncpg.connect(through, ssl=False)
                yield opened
                await opened.close(timeout=1)

        @app.post("/charges")
        async def charge() -> str:
            connection = await current_operation().atransaction(over_the_link())
            await connection.execute(insert())
            cut_the_next_commit(link, monkeypatch, arrives=arrives)
            return "charged"

        async with covered(postgres, app) as middleware, client_of(middleware) as client:
            first = await client.post("/charges")
            if arrives:
                assert (first.status_code, first.json()) == (200, "charged")
                assert postgres.charges() == [1]
            else:
                assert (first.status_code, code(first)) == (500, "transaction-failed")
                assert "Nothing was done" in first.json()["detail"]
                assert postgres.charges() == []
            monkeypatch.undo()
            second = await client.post("/charges")
    assert second.headers.get("Idempotency-Replayed") == ("true" if arrives else None)


def cut_the_next_commit(link: FaultLink, monkeypatch: pytest.MonkeyPatch, *, arrives: bool) -> None:
    """The link loses what the server answers to it, or loses it."""
    for adapter in (AsyncPsycopg, Asyncpg):

        async def cutting(self: Any, commit: Any = adapter.commit) -> None:
            if arrives:
                link.lose_reply(times=1)
            else:
                link.reset(times=1)
            await commit(self)

        monkeypatch.setattr(adapter, "commit", cutting)


# Many at once


async def test_more_blocking_handlers_than_connections_and_threads_all_get_their_turn(postgres: Database) -> None:
    """Who waits for a connection must not take the threads that the others need to give theirs back."""
    engine = postgres.engine("psycopg", pool_size=2, max_overflow=0, pool_timeout=15)
    app = FastAPI()

    @app.post("/charges")
    def charge(session: Annotated[Session, Depends(blocking_transaction(sessionmaker(engine)))]) -> int:
        session.execute(text(insert()))
        return 1

    async with covered(postgres, app) as middleware, client_of(middleware) as client:
        answers = await asyncio.gather(
            *(client.post("/charges", headers={"Idempotency-Key": f"{number}"}) for number in range(60))
        )
    engine.dispose()
    assert [answer.status_code for answer in answers] == [200] * 60
    assert postgres.charges() == [1] * 60
