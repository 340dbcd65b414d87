"""Rides: book one, charge a card at Stripe, send a receipt; each once, whatever dies on the way.

retryproof migrate postgresql://localhost/rides
uvicorn app:app
retryproof completer app:phased
"""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import stripe
from fastapi import FastAPI, Header
from fastapi.responses import JSONResponse

from retryproof import AsyncIdempotency, current_operation, errors
from retryproof.transaction import Outbox, Phased

SCHEMA = """
CREATE TABLE IF NOT EXISTS rides (id uuid PRIMARY KEY, rider text NOT NULL, destination text NOT NULL,
                                  status text NOT NULL, charge text)
"""
PRICE = 1500
"""Cents; every ride costs the same."""


@dataclass(frozen=True)
class Request:
    """What a rider asks for. customer: the rider's id at Stripe."""

    destination: str
    customer: str


@dataclass(frozen=True)
class Ride:
    """What a rider is told."""

    id: str
    destination: str
    status: str
    charge: str | None


class Rides:
    """The database and the functions over it."""

    def __init__(self, pool: asyncpg.Pool, client: stripe.StripeClient, engine: AsyncIdempotency) -> None:
        self.client = client
        self.outbox = Outbox(topics=["receipts"])
        self.phased = Phased(engine, connect=pool.acquire)
        self.request = self.phased.function("request_ride")(self.request_ride)

    async def request_ride(self, wanted: Request) -> Ride:
        """Three recovery points: the ride is booked; the card is charged; ride and receipt say so."""
        operation = current_operation()
        (_, rider) = operation.principal
        id = str(operation.derive("ride"))

        async with operation.phase("booked") as phase:
            if phase.pending:
                sql = "INSERT INTO rides VALUES ($1, $2, $3, 'booked')"
                await phase.connection.execute(sql, id, rider, wanted.destination)

        charge = await operation.astep("charge", lambda key: self.charge(wanted.customer, id, key))
        status = "declined" if charge is None else "paid"

        async with operation.phase("paid") as phase:
            if phase.pending:
                sql = "UPDATE rides SET status = $2, charge = $3 WHERE id = $1"
                await phase.connection.execute(sql, id, status, charge)
                receipt = json.dumps({"ride": id, "rider": rider, "status": status}).encode()
                await self.outbox.aadd(phase.connection, topic="receipts", payload=receipt, key=rider)
        return Ride(id, wanted.destination, status, charge)

    async def charge(self, customer: str, ride: str, key: UUID) -> str | None:
        """The charge's id, or None when the card is declined, which is an answer and no failure.

        A later attempt calls under the same key, and Stripe answers it with the same charge.
        """
        try:
            made = await self.client.v1.charges.create_async(
                {"amount": PRICE, "currency": "eur", "customer": customer, "metadata": {"ride": ride}},
                {"idempotency_key": str(key)},
            )
        except stripe.CardError:
            return None
        return made.id


@asynccontextmanager
async def stripe_at(api: str, key: str) -> AsyncIterator[stripe.StripeClient]:
    """A client of Stripe's own library, closed at the end."""
    http = stripe.HTTPXClient()
    try:
        yield stripe.StripeClient(key, base_addresses={"api": api}, http_client=http)
    finally:
        await http.close_async()  # type: ignore[no-untyped-call]  # it has no types


@asynccontextmanager
async def opened() -> AsyncIterator[Rides]:
    """What the environment says, connected."""
    url = os.environ.get("RIDES_DATABASE", "postgresql://localhost/rides")
    api, key = os.environ.get("STRIPE_API", "http://127.0.0.1:8420"), os.environ.get("STRIPE_KEY", "sk_test_rides")
    async with (
        asyncpg.create_pool(url, min_size=1) as pool,
        AsyncIdempotency(url) as engine,
        stripe_at(api, key) as client,
    ):
        await pool.execute(SCHEMA)
        yield Rides(pool, client, engine)


@asynccontextmanager
async def phased() -> AsyncIterator[Phased]:
    """For the completer."""
    async with opened() as rides:
        yield rides.phased


def create_app(opening: Callable[[], AbstractAsyncContextManager[Rides]]) -> FastAPI:
    """The API."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opening() as app.state.rides:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/rides", status_code=201)
    async def post_ride(
        wanted: Request, idempotency_key: Annotated[str, Header()], x_rider: Annotated[str, Header()]
    ) -> JSONResponse:
        # x_rider stands for whoever your authentication says it is.
        rides: Rides = app.state.rides
        outcome = await rides.request.run(idempotency_key, wanted, scope=("rides", x_rider))
        headers = {"Idempotency-Replayed": "true"} if outcome.replayed else {}
        return JSONResponse(asdict(outcome.value), 201, headers)

    @app.exception_handler(errors.IdempotencyError)
    async def explain(request: Any, error: errors.IdempotencyError) -> JSONResponse:
        status, code = next((status, code) for kind, status, code in ANSWERS if isinstance(error, kind))
        headers = {} if error.retry_after is None else {"Retry-After": str(int(error.retry_after) + 1)}
        return JSONResponse({"code": code, "detail": error.message}, status, headers, "application/problem+json")

    return app


ANSWERS: tuple[tuple[type[errors.IdempotencyError], int, str], ...] = (
    (errors.InProgress, 409, "in-progress"),
    (errors.LeaseLost, 409, "in-progress"),
    (errors.OutcomeUnknown, 409, "outcome-unknown"),
    (errors.Mismatch, 422, "key-reused"),
    (errors.InvalidKey, 400, "key-invalid"),
    (errors.IdempotencyError, 503, "store-unavailable"),
)


app = create_app(opened)
