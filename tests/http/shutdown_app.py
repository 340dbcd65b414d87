"""An app for servers of another process: its handler takes SHUTDOWN_SECONDS, and touches SHUTDOWN_BEGUN first."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from retryproof import Policy
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import AsgiScope, Receive, Send

logging.basicConfig(level=logging.WARNING)


async def serve(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """Charge slowly."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    if scope["method"] == "POST":
        _say_that_it_began()
        await asyncio.sleep(float(os.environ["SHUTDOWN_SECONDS"]))
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})


def _say_that_it_began() -> None:
    Path(os.environ["SHUTDOWN_BEGUN"]).touch()


app = IdempotencyMiddleware(
    serve, store=os.environ["SHUTDOWN_STORE"], scope=single_tenant, policy=Policy(on_abandoned="refuse")
)

with suppress(ImportError):
    from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped, import-not-found, unused-ignore]  # optional

    class Worker(UvicornWorker):  # type: ignore[misc, unused-ignore]  # it has no types
        """Gunicorn does not tell its workers of its own patience, and kills them at its end."""

        CONFIG_KWARGS: ClassVar[dict[str, Any]] = {**UvicornWorker.CONFIG_KWARGS, "timeout_graceful_shutdown": 4}
