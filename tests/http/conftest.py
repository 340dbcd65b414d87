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
from tests.http.wsgi_side import CAPABILITIES, layered_by_wsgi

MakeLayer: TypeAlias = Callable[..., IdempotencyMiddleware]
INTERFACES = os.environ.get("RETRYPROOF_TEST_HTTP_INTERFACES", "asgi,wsgi").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a rule over each server interface that can do what the test needs (H16)."""
    if "interface" in metafunc.fixturenames:
        needs = {need for marker in metafunc.definition.iter_markers("needs") for need in marker.args}
        assert needs <= CAPABILITIES["asgi"], needs
        metafunc.parametrize("interface", [name for name in INTERFACES if needs <= CAPABILITIES[name]])


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
async def layer(interface: str, store_url: str, unique: str) -> AsyncIterator[MakeLayer]:
    """Puts an app behind a layer: `layer(app, **options)`."""
    made: list[IdempotencyMiddleware] = []
    layered_by: Any = layered if interface == "asgi" else layered_by_wsgi

    def make(app: App, **options: Any) -> IdempotencyMiddleware:
        made.append(layered_by(app, **{"store": store_url, "name": unique, **options}))
        return made[-1]

    yield make
    for middleware in made:
        await middleware.aclose(drain=1.0)
