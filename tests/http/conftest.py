"""Layers of this suite, closed at the end of each test.

It runs on memory and SQLite; RETRYPROOF_TEST_HTTP_STORES="memory,sqlite,redis,postgres" chooses others.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import App
from retryproof.stores.sql.migrate import migrate
from tests.http.harness import layered

MakeLayer: TypeAlias = Callable[..., IdempotencyMiddleware]


STORES = os.environ.get("RETRYPROOF_TEST_HTTP_STORES", "memory,sqlite").split(",")


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where records are kept; a name or scope of its own keeps a test apart from others on the same server."""
    match request.param:
        case "memory":
            return "memory://"
        case "sqlite":
            return f"sqlite:///{tmp_path / 'keys.db'}"
        case server:
            url: str = request.getfixturevalue(f"{server}_url")
            if server == "postgres":
                migrate(url)
            return url


@pytest.fixture
async def layer(store_url: str, unique: str) -> AsyncIterator[MakeLayer]:
    """Puts an app behind a layer: `layer(app, **options)`."""
    made: list[IdempotencyMiddleware] = []

    def make(app: App, **options: Any) -> IdempotencyMiddleware:
        made.append(layered(app, **{"store": store_url, "name": unique, **options}))
        return made[-1]

    yield make
    for middleware in made:
        await middleware.aclose(drain=1.0)
