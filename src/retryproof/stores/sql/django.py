"""The stores of Django's aliases: those of the databases that the aliases lead to."""

from __future__ import annotations

from retryproof.core.errors import ConfigurationError
from retryproof.sql.engines.django import resolve
from retryproof.sql.sqlite.url import TIMEOUT
from retryproof.stores.base import Store
from retryproof.stores.sql import sqlite


def from_url(url: str, *, timeout: float = TIMEOUT) -> Store:
    """The store of a URL, `django://alias`."""
    found = resolve(url)
    if isinstance(found, str):
        return sqlite.from_url(found, timeout=timeout)
    try:
        from retryproof.stores.sql.psycopg import PsycopgStore
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "The store needs psycopg 3, which Django prefers to psycopg2 where it is installed: "
            "pip install 'retryproof[postgres]'."
        ) from error
    return PsycopgStore(found, timeout=timeout)
