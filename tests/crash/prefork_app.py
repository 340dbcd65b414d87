"""An app for servers of several processes, over a store that they share. Each makes it for itself, or

    python -m tests.crash.prefork_app 3

makes it once, uses it, and then forks the servers of a listening descriptor, as gunicorn does with `--preload`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.stores.base import DatabaseEngine


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

    return IdempotencyMiddleware(app, store=_store(os.environ["PREFORK_STORE"]), scope=single_tenant)


def _store(url: str) -> str | DatabaseEngine:
    """The URL, or for one of SQLAlchemy's an engine."""
    if "+" not in url:
        return url
    make: Callable[[str], DatabaseEngine] = create_async_engine if "+asyncpg" in url else create_engine
    return make(url)


async def use(app: IdempotencyMiddleware) -> None:
    """Open the store, as a check at the start does, and leave it open."""
    key = f'"{os.environ["PREFORK_EFFECTS"]}"'
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/charges", headers={"idempotency-key": key})
        assert response.status_code == 201, response.text


def serve_preloaded(descriptor: int) -> None:
    """Two servers that end with this process."""
    app = create_app()
    asyncio.run(use(app))
    children: list[int] = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            uvicorn.run(app, fd=descriptor, log_level="warning")
            return
        children.append(pid)

    def end(*_: object) -> None:
        for pid in children:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve_preloaded(int(sys.argv[1]))
