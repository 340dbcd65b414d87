"""An app for servers of several processes: it is made once in each, over a store that they share."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from fastapi import FastAPI, Request

from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware


def append(file: Path, line: str) -> None:
    """One short line is appended as a whole, whoever else writes."""
    with file.open("a") as lines:
        lines.write(line)


def create_app() -> IdempotencyMiddleware:
    """The store and the file that effects go to are told by the environment."""
    effects, app = Path(os.environ["PREFORK_EFFECTS"]), FastAPI()

    @app.get("/pid")
    async def pid() -> int:
        return os.getpid()

    @app.post("/charges", status_code=201)
    async def create_charge(request: Request) -> dict[str, int]:
        key = request.headers["idempotency-key"]
        append(effects, f"{key} {os.getpid()}\n")
        await asyncio.sleep(0.05)  # the work, so that twins come meanwhile
        return {"pid": os.getpid()}

    return IdempotencyMiddleware(app, store=os.environ["PREFORK_STORE"], scope=single_tenant)
