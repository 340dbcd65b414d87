"""Django: an alias of DATABASES, over PostgreSQL or SQLite, as `django://alias`.

The connections are the store's own. Those of a request may be in its transaction (ATOMIC_REQUESTS), and a claim that is
rolled back with it has claimed nothing; and Django closes them between requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

import django  # type: ignore[import-untyped]  # Django has no types of its own
from django.apps import apps  # type: ignore[import-untyped]  # as above
from django.core.exceptions import ImproperlyConfigured  # type: ignore[import-untyped]  # as above
from django.db import connections  # type: ignore[import-untyped]  # as above
from django.utils.connection import ConnectionDoesNotExist  # type: ignore[import-untyped]  # as above

from retryproof.core.errors import ConfigurationError
from retryproof.core.findings import Finding
from retryproof.sql.postgres import doctor as postgres_doctor
from retryproof.sql.postgres import migrate as postgres_migrate
from retryproof.sql.postgres.url import PostgresTarget
from retryproof.sql.postgres.url import parse as parse_postgres
from retryproof.sql.sqlite import doctor as sqlite_doctor
from retryproof.sql.sqlite import migrate as sqlite_migrate
from retryproof.sql.sqlite.url import file_named


def resolve(url: str) -> PostgresTarget | str:
    """Where the alias leads: a target with connections that Django makes, or the URL of a SQLite file.

    The options behind a `?` are those of the engine's own URLs.
    """
    parts = urlsplit(url)
    alias = parts.netloc
    if not alias or parts.path.strip("/"):
        raise ConfigurationError("A Django URL is django:// and an alias of DATABASES: django://default.")
    wrapper = _wrapper(alias)
    if wrapper.vendor == "sqlite":
        query = f"?{parts.query}" if parts.query else ""
        return f"sqlite:///{quote(file_named(str(wrapper.settings_dict['NAME'])))}{query}"
    if wrapper.vendor != "postgresql":
        raise ConfigurationError(f"A store is in PostgreSQL or SQLite; Django's {alias!r} is {wrapper.vendor}.")
    target = parse_postgres(f"postgresql:///?{parts.query}")
    if "?" in target.dsns[0]:
        raise ConfigurationError("A Django URL knows the options schema, pool_size and statement_cache_size.")
    return replace(target, dsns=(), maker=_maker(alias), driver="psycopg")


def _wrapper(alias: str) -> Any:
    """A connection of the alias that is no thread's, not yet made."""
    try:
        return connections[alias].copy()
    except ConnectionDoesNotExist as error:
        raise ConfigurationError(f"DATABASES has no {alias!r}; it has {', '.join(connections)}.") from error
    except (ImproperlyConfigured, ImportError) as error:
        raise ConfigurationError(f"Django cannot be used: {error}. Is DJANGO_SETTINGS_MODULE right?") from error


def _maker(alias: str) -> Callable[[], Any]:
    def make() -> Any:
        if not (apps.ready or apps.loading):  # a program without Django's own start, such as ours
            django.setup()  # for the hooks of its apps
        wrapper = _wrapper(alias)
        wrapper.settings_dict["OPTIONS"].pop("pool", None)  # of connections that go back to it
        try:
            wrapper.connect()
        except BaseException:
            if wrapper.connection is not None:  # a hook failed
                wrapper.connection.close()
            raise
        made, wrapper.connection = wrapper.connection, None
        if not hasattr(made, "pgconn"):
            made.close()
            raise ConfigurationError(
                "Django uses psycopg2 here, and the store psycopg 3, which Django prefers where it is installed: "
                "pip install 'psycopg[binary]'."
            )
        return made

    return make


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """What of the alias's database silently breaks safety."""
    found = resolve(url)
    if isinstance(found, str):
        return sqlite_doctor.diagnose(found, timeout=timeout)
    mode = _wrapper(urlsplit(url).netloc).settings_dict["OPTIONS"].get("sslmode", "prefer")
    return postgres_doctor.judge(found, f"postgresql:///?sslmode={mode}")


def migrate(url: str, *, progress: Callable[[str], None] = lambda step: None) -> list[str]:
    """Apply what is missing; see the engines' own."""
    found = resolve(url)
    if isinstance(found, str):
        return sqlite_migrate.migrate(found, progress=progress)
    return postgres_migrate.migrate(found, progress=progress)


def pending(url: str) -> list[str]:
    """What is missing; see the engines' own."""
    found = resolve(url)
    return sqlite_migrate.pending(found) if isinstance(found, str) else postgres_migrate.pending(found)
