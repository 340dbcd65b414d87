"""The app under every layer: one POST that validates a small JSON body and counts its effects."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel


class Charge(BaseModel):
    order: str
    amount: int


def unwrapped(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    return endpoint


def make_app(
    route_class: type[APIRoute] = APIRoute,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = unwrapped,
    **options: Any,
) -> FastAPI:
    """An app whose GET /effects says how often the handler ran."""
    app = FastAPI(**options)
    app.router.route_class = route_class
    numbers = count(1)
    effects = 0

    @app.post("/charges", status_code=201)
    @wrap
    async def charge(charge: Charge, response: Response) -> dict[str, Any]:
        nonlocal effects
        effects += 1
        number = next(numbers)
        response.headers["location"] = f"/charges/{number}"
        return {"id": number, "order": charge.order, "amount": charge.amount}

    async def count_effects() -> dict[str, int]:
        return {"effects": effects}

    app.router.add_api_route("/effects", count_effects, methods=["GET"], route_class_override=APIRoute)
    return app
