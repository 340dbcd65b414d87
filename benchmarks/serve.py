"""The server process: the app under one layer, on uvicorn (uvloop, httptools), port printed as its first line.

Runs in the virtual environment of its subject, so a layer is imported only where it is asked for.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from benchmarks.app import make_app

BACKLOG = 2048


def no_layer(_: str) -> FastAPI:
    return make_app()


def hand_written(url: str, middleware: str = "HandWrittenMiddleware") -> FastAPI:
    http_redis = importlib.import_module("benchmarks.ceilings.http_redis")
    app = make_app()
    app.add_middleware(getattr(http_redis, middleware), url=url)
    return app


def hand_written_in_last_send(url: str) -> FastAPI:
    return hand_written(url, "HandWrittenInLastSend")


def retryproof(url: str) -> FastAPI:
    http = importlib.import_module("retryproof.http")
    asgi = importlib.import_module("retryproof.http.asgi")
    app = make_app()
    app.add_middleware(asgi.IdempotencyMiddleware, store=url, scope=http.by_header("x-user"))
    return app


def idemkit(url: str) -> FastAPI:
    """As its README says for production."""
    package = importlib.import_module("idemkit")
    app = make_app()
    app.add_middleware(
        package.IdempotencyMiddleware,
        backend=package.RedisBackend.from_url(url),
        config=package.HttpConfig(scope=lambda request: request.headers.get("x-user", "anonymous")),
    )
    return app


def idemgate(url: str) -> FastAPI:
    """As its README says, with the same caller's header as namespace."""
    package = importlib.import_module("idemgate")
    redis_store = importlib.import_module("idemgate.redis_store")
    redis_asyncio = importlib.import_module("redis.asyncio")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client = redis_asyncio.Redis.from_url(url, decode_responses=False)
        app.state.idempotency_store = redis_store.RedisAcquirer(client)
        yield
        await client.aclose()

    wrap = package.idempotent(ttl=86_400, namespace=lambda request: request.headers["x-user"])
    return make_app(package.IdempotencyRoute, wrap, lifespan=lifespan)


SUBJECTS: dict[str, Callable[[str], FastAPI]] = {
    "none": no_layer,
    "ceiling": hand_written,
    "ceiling-in-last-send": hand_written_in_last_send,
    "ours": retryproof,
    "idemkit": idemkit,
    "idemgate": idemgate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--store", default="", help="the store's URL")
    parser.add_argument("--tuned-collector", action="store_true")
    options = parser.parse_args()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(BACKLOG)
    print(listener.getsockname()[1], flush=True)
    app = SUBJECTS[options.subject](options.store)
    if options.tuned_collector:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_level="warning",
        backlog=BACKLOG,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
