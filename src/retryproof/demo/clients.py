"""The customers: each wants one charge, and retries until it has a response."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

import httpx

from retryproof.client import RetryPolicy
from retryproof.client.httpx import AsyncRetryTransport

CONCURRENT = 64
CUSTOMERS = ("ada", "alan", "barbara", "donald", "edsger", "frances", "grace", "leslie", "margaret", "tony")

# Only the time is limited, since here one outage follows the other.
PATIENT = RetryPolicy(max_attempts=1000, backoff=0.05, max_backoff=1.0, retry_burst=math.inf)


@dataclass(frozen=True, slots=True)
class Order:
    """One charge that a customer wants, once."""

    number: str
    customer: str
    amount: int


@dataclass(slots=True)
class Traffic:
    """What the clients saw: requests sent, replays, and for each order the charge on its receipt."""

    sent: int = 0
    replayed: int = 0
    receipts: dict[str, str] = field(default_factory=dict)


def orders(random: Random, count: int) -> list[Order]:
    """A number of orders."""
    return [
        Order(f"order-{number}", random.choice(CUSTOMERS), random.randint(100, 20_000))
        for number in range(1, count + 1)
    ]


class Counting(httpx.AsyncBaseTransport):
    """Counts each attempt, below the transport that retries."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=CONCURRENT))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._traffic.sent += 1
        response = await self._transport.handle_async_request(request)
        self._traffic.replayed += response.headers.get("Idempotency-Replayed") == "true"
        return response

    async def aclose(self) -> None:
        await self._transport.aclose()


async def buy(url: str, wanted: Iterable[Order], *, seconds: float, advance: Callable[[], None]) -> Traffic:
    """Send every order to the API, retry for up to `seconds` in total, and return what the clients saw.

    `advance` is called when a client is done, with or without a receipt.
    """
    traffic = Traffic()
    turn = asyncio.Semaphore(CONCURRENT)
    ends_at = time.monotonic() + seconds
    transport = AsyncRetryTransport(Counting(traffic), policy=PATIENT)
    async with httpx.AsyncClient(transport=transport, base_url=url, timeout=5.0) as client:

        async def pay(order: Order) -> None:
            async with turn:
                receipt = await charge(client, order, seconds=ends_at - time.monotonic())
            if receipt is not None:
                traffic.receipts[order.number] = receipt
            advance()

        await asyncio.gather(*map(pay, wanted))
    return traffic


async def charge(client: httpx.AsyncClient, order: Order, *, seconds: float) -> str | None:
    """The id of the order's charge, or None if the client gave up. The transport makes the key."""
    if seconds <= 0:
        return None
    body = {"order": order.number, "customer": order.customer, "amount": order.amount}
    try:
        response = await client.post(
            "/charges", json=body, extensions={"retry_policy": replace(PATIENT, deadline=seconds)}
        )
    except httpx.TransportError:
        return None
    return str(response.json()["id"]) if response.status_code == 201 else None
