"""What users write, and the types that checkers find in it: mypy and pyright read this file, nothing runs it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import assert_type
from uuid import UUID
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from retryproof import AsyncIdempotency, Idempotency, Outcome, Policy, current_operation, errors, operation_key
from retryproof.http import by_header, by_host, by_user, single_tenant, wsgi
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.operation import Operation
from retryproof.stores import AsyncStore, MemoryStore, Store, aopen_store, open_store
from retryproof.stores.sql.migrate import migrate
from retryproof.testing import StoreConformance
from retryproof.transaction import Inbox, Inserted, Outbox, Received, ainsert_once, insert_once


class Receipt:
    """A value of the user's own."""


def charge() -> Receipt:
    return Receipt()


async def acharge() -> Receipt:
    return Receipt()


def functions(engine: Idempotency) -> None:
    outcome = engine.run("key", charge, scope=("tenant", "charge"), policy=Policy(lease=5.0))
    assert_type(outcome, Outcome[Receipt])
    assert_type(outcome.value, Receipt)
    assert_type(outcome.replayed, bool)
    assert_type(outcome.first_seen, datetime)
    assert_type(engine.run("key", lambda: [1], scope="s").value, list[int])


async def awaited(engine: AsyncIdempotency) -> None:
    assert_type((await engine.run("key", acharge, scope="s")).value, Receipt)
    assert_type((await engine.run("key", charge, scope="s")).value, Receipt)


def handler(connection: sqlite3.Connection) -> None:
    operation = current_operation()
    assert_type(operation, Operation)
    assert_type(current_operation(None), Operation | None)
    assert_type(operation.derive("charge"), UUID)
    assert_type(operation.token, int)
    assert_type(operation.step("charge", lambda key: key.hex), str)
    assert_type(operation.transaction(connection), sqlite3.Connection)


async def awaited_handler(block: AbstractAsyncContextManager[Receipt]) -> None:
    operation = current_operation()

    async def pay(key: UUID) -> int:
        return key.version or 0

    assert_type(await operation.astep("pay", pay), int)
    assert_type(await operation.atransaction(block), Receipt)


def stores() -> None:
    store = open_store("sqlite:///keys.db")
    assert_type(store, Store)
    assert_type(Idempotency(store), Idempotency)
    assert_type(Idempotency(MemoryStore()), Idempotency)


def engines(engine: Engine, on_loop: AsyncEngine) -> None:
    assert_type(open_store(engine), Store)
    assert_type(Idempotency(engine), Idempotency)
    assert_type(AsyncIdempotency(on_loop), AsyncIdempotency)
    assert_type(IdempotencyMiddleware(app, store=on_loop, scope=single_tenant), IdempotencyMiddleware)
    assert_type(migrate(engine), list[str])


async def async_stores() -> None:
    assert_type(await aopen_store("redis://localhost"), AsyncStore)


async def app(scope: object, receive: object, send: object) -> None: ...


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b""]


def wsgi_layer() -> WSGIApplication:
    return wsgi.IdempotencyMiddleware(wsgi_app, store="memory://", scope=by_user, on_departure="stop")


def layers() -> Sequence[IdempotencyMiddleware]:
    return [
        IdempotencyMiddleware(app, store="memory://", scope=scope)
        for scope in (by_user, by_header("x-api-key"), by_host(by_user), single_tenant)
    ]


def transactions(connection: sqlite3.Connection) -> None:
    received = Inbox("billing").receive(connection, source="orders", message_id="1", payload=b"{}")
    assert_type(received, Received)
    assert_type(Outbox().add(connection, topic="paid", payload=b"{}", key="order-1"), UUID)
    assert_type(insert_once(connection, "orders", {"id": "1"}, key=["id"]), Inserted)


async def awaited_transactions(connection: object) -> None:
    assert_type(await ainsert_once(connection, "orders", {"id": "1"}, key=["id"]), Inserted)


def failures(error: errors.IdempotencyError) -> str | None:
    if isinstance(error, errors.StoreUnavailable):
        assert_type(error.retry_after, float | None)
    return error.digest


def client() -> None:
    with operation_key("order-1") as key:
        assert_type(key, str)


class TestStore(StoreConformance):
    """A store of the user's own under the conformance suite."""
