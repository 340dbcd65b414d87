"""SQLAlchemy 2: an Engine or AsyncEngine over PostgreSQL or SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy.util import greenlet_spawn

from retryproof.sql.postgres import migrate as postgres_migrate
from retryproof.sql.postgres.url import PostgresTarget
from retryproof.sql.sqlite import migrate as sqlite_migrate
from retryproof.sql.sqlite.url import file_named

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


def check(engine: Engine | AsyncEngine) -> None:
    """Raise ConfigurationError for a SQLite database that is no file."""
    if engine.dialect.name == "sqlite":
        file_of(engine)


def file_of(engine: Engine | AsyncEngine) -> str:
    """The SQLite file."""
    ((name,), _) = engine.dialect.create_connect_args(engine.url)
    return file_named(name)


def target_of(engine: Engine | AsyncEngine) -> PostgresTarget:
    """The PostgreSQL database, by connections that the engine makes; its pool has no part in them."""

    def connect() -> Any:
        """The driver's connection, made as the pool makes its own; what hooks began on it is committed."""
        made = engine.pool.recreate().connect()
        driver = made.driver_connection
        made.commit()
        made.detach()
        return driver

    def make() -> Any:
        return asyncio.run(greenlet_spawn(connect)) if engine.dialect.is_async else connect()

    async def make_on_loop() -> Any:
        return await greenlet_spawn(connect)

    if engine.dialect.driver == "asyncpg":
        return PostgresTarget((), maker=make_on_loop, driver="asyncpg")
    return PostgresTarget((), maker=make, driver="psycopg")


def migrate(engine: Engine | AsyncEngine, *, progress: Callable[[str], None] = lambda step: None) -> list[str]:
    """Apply what is missing; see the databases' own."""
    if engine.dialect.name == "sqlite":
        return sqlite_migrate.migrate(f"sqlite:///{quote(file_of(engine))}", progress=progress)
    return postgres_migrate.migrate(target_of(engine), progress=progress)
