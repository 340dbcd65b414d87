"""Engines of SQLAlchemy and aliases of Django for the tests of the stores over them."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from retryproof.stores.sql.migrate import migrate


def migrated(postgres_url: str, schema: str) -> str:
    """The URL of a new schema that has the tables, which sessions find by their search path."""
    migrate(f"{postgres_url}?schema={schema}")
    return f"{postgres_url}?options=-csearch_path%3D{schema}"


def _bare(url: str, driver: str) -> str:
    parts = urlsplit(url)
    return parts._replace(scheme=f"postgresql+{driver}", query="").geturl()


def _schema(url: str) -> str:
    return unquote(urlsplit(url).query).rpartition("=")[2]


def engine_of(url: str, **options: Any) -> Iterator[Engine]:
    """An engine on psycopg, in the schema of `migrated`."""
    arguments = {"options": f"-csearch_path={_schema(url)}"}
    engine = create_engine(_bare(url, "psycopg"), connect_args=arguments, **options)
    yield engine
    engine.dispose()


async def async_engine_of(url: str, driver: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine on asyncpg or psycopg, in the schema of `migrated`."""
    schema = _schema(url)
    arguments: dict[str, Any] = {"server_settings": {"search_path": schema}}
    if driver == "psycopg":
        arguments = {"options": f"-csearch_path={schema}"}
    engine = create_async_engine(_bare(url, driver), connect_args=arguments, **options)
    yield engine
    await engine.dispose()


def sqlite_engine(folder: Path) -> Iterator[Engine]:
    """An engine on a SQLite file."""
    engine = create_engine(f"sqlite:///{folder / 'app.db'}")
    yield engine
    engine.dispose()


def settings() -> None:
    """Give Django settings, unless another test of this process has."""
    import django  # type: ignore[import-untyped]  # Django has no types of its own
    from django.conf import settings  # type: ignore[import-untyped]  # as above

    os.environ.pop("DJANGO_SETTINGS_MODULE", None)
    if not settings.configured:
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup()


def alias(**database: Any) -> Iterator[str]:
    """An alias of a database, added to Django's."""
    settings()
    from django.db import connections  # type: ignore[import-untyped]  # as above

    name = f"t{uuid.uuid4().hex[:8]}"
    connections.databases[name] = database
    connections.configure_settings(connections.databases)
    yield name
    connections[name].close()
    del connections[name]
    del connections.databases[name]


def alias_of(url: str, **options: Any) -> Iterator[str]:
    """An alias of the schema of `migrated`."""
    parts = urlsplit(url)
    yield from alias(
        ENGINE="django.db.backends.postgresql",
        NAME=parts.path.removeprefix("/"),
        HOST=parts.hostname,
        PORT=parts.port,
        USER=unquote(parts.username or ""),
        PASSWORD=unquote(parts.password or ""),
        OPTIONS={"options": f"-csearch_path={_schema(url)}", **options},
    )


def sqlite_alias(folder: Path) -> Iterator[str]:
    """An alias of a SQLite file."""
    yield from alias(ENGINE="django.db.backends.sqlite3", NAME=folder / "app.db")
