"""A small payments API on FastAPI, safe to retry.

    uvicorn --factory retryproof.demo.app:create_app

Two things make it safe. The middleware runs a request with an `Idempotency-Key` once, and replays its response. The
handler works in the operation's transaction (`writing`), which the middleware commits together with the response: the
ledger and the records are in one file. So a server that dies at any point has booked the charge and stored its
response, or neither.

The ids of rows are random: the rows of a dead attempt are gone with its transaction, so no later attempt can find them.
Use a derived id, `operation.derive("charge")`, for what no transaction covers, such as the key of a call to a card
network.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated
from urllib.parse import quote
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from retryproof import Policy, current_operation
from retryproof.demo.ledger import Charge, Database, Ledger, Refund
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware


class NewCharge(BaseModel):
    """A payment that a client wants to make, in cents; `order` is the client's order number."""

    order: str
    customer: str
    amount: int = Field(gt=0)


class NewRefund(BaseModel):
    """The amount to give back, in cents; by default the whole charge."""

    amount: int | None = Field(default=None, gt=0)


async def database_of(request: Request) -> Database:
    """The app's database."""
    database: Database = request.app.state.database
    return database


async def database_in_turn(request: Request) -> AsyncIterator[Database]:
    """The app's database, for one request that writes at a time.

    SQLite has one writer. The others wait here, on the event loop. If they waited in threads, they could take the
    threads that the writer needs to finish.
    """
    async with request.app.state.turn:
        yield request.app.state.database


Books = Annotated[Database, Depends(database_of)]
BooksInTurn = Annotated[Database, Depends(database_in_turn)]
router = APIRouter(prefix="/charges")


@contextmanager
def writing(database: Database) -> Iterator[Ledger]:
    """The ledger, in a transaction that commits with the response; without a key, at the end of the block."""
    operation = current_operation(default=None)
    if operation is not None:
        yield database.ledger(operation.transaction(database.begin()))
        return
    with database.begin() as connection:
        yield database.ledger(connection)
        connection.commit()


@router.post("", status_code=201)
def create_charge(wanted: NewCharge, books: BooksInTurn) -> Charge:
    charge = Charge(id=str(uuid4()), order=wanted.order, customer=wanted.customer, amount=wanted.amount)
    with writing(books) as ledger:
        return ledger.add_charge(charge)


@router.get("")
def list_charges(books: Books) -> list[Charge]:
    with books.connect() as connection:
        return books.ledger(connection).charges()


@router.get("/{id}")
def get_charge(id: str, books: Books) -> Charge:
    with books.connect() as connection:
        return found(books.ledger(connection).charge(id))


@router.post("/{id}/refund", status_code=201)
def refund_charge(id: str, wanted: NewRefund, books: BooksInTurn) -> Refund:
    with writing(books) as ledger:
        charge = found(ledger.charge(id))
        refund = Refund(id=str(uuid4()), charge=id, amount=wanted.amount or charge.amount)
        if not ledger.add_refund(refund):
            raise HTTPException(422, "more than is left of the charge")
        return refund


def found(charge: Charge | None) -> Charge:
    """The charge; 404 without one."""
    if charge is None:
        raise HTTPException(404, "no such charge")
    return charge


def create_app(
    path: str = "payments.db",
    *,
    idempotent: bool = True,
    policy: Policy = Policy(),  # noqa: B008  # frozen
    open_database: Callable[[str], Database] = Database,
) -> FastAPI:
    """The API over a ledger in the file `path`.

    idempotent: False leaves the middleware out, and every retry is a new charge.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.database = open_database(path)
        app.state.turn = asyncio.Lock()
        yield

    app = FastAPI(title="Payments", lifespan=lifespan)
    app.include_router(router)
    if idempotent:
        # This API has no users. With authentication outside the middleware, use scope=by_user.
        app.add_middleware(IdempotencyMiddleware, store=f"sqlite:///{quote(path)}", scope=single_tenant, policy=policy)
    return app
