"""localstripe, and what it lacks of Stripe: the same Idempotency-Key is answered with the same response.

    python local_stripe.py 8420         # then STRIPE_API=http://127.0.0.1:8420

localstripe (GPL-3.0, by Adrien Vergé) is a stand-in for Stripe's API, made for tests. It ignores idempotency keys, so
each repeated charge is another one there. `honour_keys` does what Stripe documents, for a server of one process.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web
from localstripe import server  # type: ignore[import-untyped]  # it has no types

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
answers: dict[str, asyncio.Future[tuple[int, bytes]]] = {}


@web.middleware
async def honour_keys(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The first answer under a key is everybody's."""
    key = request.headers.get("Idempotency-Key")
    if request.method != "POST" or key is None:
        return await handler(request)
    if key not in answers:
        answers[key] = asyncio.get_running_loop().create_future()
        response = await handler(request)
        assert isinstance(response, web.Response)
        answers[key].set_result((response.status, bytes(response.body or b"")))  # type: ignore[arg-type]  # bytes here
    status, body = await asyncio.shield(answers[key])
    return web.Response(status=status, body=body, content_type="application/json")


def main(port: int, *, keys: bool = True) -> None:
    """Serve on this machine only; port 0 is a free one, and is said on standard output."""
    if keys:
        server.app.middlewares.insert(0, honour_keys)
    web.run_app(server.app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main(int(sys.argv[1]), keys="--ignore-keys" not in sys.argv)
