"""Layers of this suite, on memory and on SQLite, closed at the end of each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.types import App
from tests.http.harness import layered

MakeLayer: TypeAlias = Callable[..., IdempotencyMiddleware]


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where records are kept; another place for each test."""
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'keys.db'}"


@pytest.fixture
async def layer(store_url: str) -> AsyncIterator[MakeLayer]:
    """Puts an app behind a layer: `layer(app, **options)`."""
    made: list[IdempotencyMiddleware] = []

    def make(app: App, **options: Any) -> IdempotencyMiddleware:
        made.append(layered(app, **{"store": store_url, **options}))
        return made[-1]

    yield make
    for middleware in made:
        await middleware.aclose(drain=1.0)
