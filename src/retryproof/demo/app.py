"""A small payments API on FastAPI, safe to retry.

    uvicorn --factory retryproof.demo.app:create_app

Two lines make it so. The middleware runs a request with an `Idempotency-Key` once and replays its answer. `new_id`
covers the one case that no layer outside the handler can: a server that dies after the charge is booked and before the
answer is stored. The next attempt runs the handler again, derives the same id, and the ledger has that row already.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from retryproof import Policy, current_operation
from retryproof.demo.ledger import Charge, Ledger, Refund
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware


class NewCharge(BaseModel):
    """What a client wants to pay, in cents; `order` is its own order number."""

    order: str
    customer: str
    amount: int = Field(gt=0)


class NewRefund(BaseModel):
    """How much to give back, in cents; the whole charge by default."""

    amount: int | None = Field(default=None, gt=0)


async def ledger_of(request: Request) -> Ledger:
    """The app's ledger."""
    ledger: Ledger = request.app.state.ledger
    return ledger


def new_id(name: str) -> str:
    """An id for a new row: the same on every attempt at an operation, random where there is none."""
    operation = current_operation(default=None)
    return str(operation.derive(name) if operation else uuid4())


Books = Annotated[Ledger, Depends(ledger_of)]
router = APIRouter(prefix="/charges")


@router.post("", status_code=201)
def create_charge(wanted: NewCharge, ledger: Books) -> Charge:
    return ledger.add_charge(
        Charge(id=new_id("charge"), order=wanted.order, customer=wanted.customer, amount=wanted.amount)
    )


@router.get("")
def list_charges(ledger: Books) -> list[Charge]:
    return ledger.charges()


@router.get("/{id}")
def get_charge(id: str, ledger: Books) -> Charge:
    charge = ledger.charge(id)
    if charge is None:
        raise HTTPException(404, "no such charge")
    return charge


@router.post("/{id}/refund", status_code=201)
def refund_charge(id: str, wanted: NewRefund, ledger: Books) -> Refund:
    charge = get_charge(id, ledger)
    refund = Refund(id=new_id("refund"), charge=id, amount=wanted.amount or charge.amount)
    booked = ledger.add_refund(refund)
    if booked is None:
        raise HTTPException(422, "more than is left of the charge")
    return booked


def create_app(
    database: str = "payments.db",
    *,
    keys: str | None = "sqlite:///payments-keys.db",
    policy: Policy = Policy(),  # noqa: B008  # frozen
    open_ledger: Callable[[str], Ledger] = Ledger,
) -> FastAPI:
    """The API over a ledger in the file `database`.

    keys: the store of idempotency keys, by URL; None leaves the layer out, and every retry is a new charge.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.ledger = open_ledger(database)
        yield
        app.state.ledger.close()

    app = FastAPI(title="Payments", lifespan=lifespan)
    app.include_router(router)
    if keys is not None:
        # This API knows no users; with authentication before the layer it is scope=by_user.
        app.add_middleware(IdempotencyMiddleware, store=keys, scope=single_tenant, policy=policy)
    return app
