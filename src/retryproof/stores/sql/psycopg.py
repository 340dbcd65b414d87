"""The PostgreSQL store on psycopg 3, for callers that block."""

from __future__ import annotations

from retryproof.sql.postgres.psycopg import PsycopgPool
from retryproof.sql.postgres.url import TIMEOUT, PostgresTarget, parse
from retryproof.stores.sql.postgres import PostgresStore


def from_url(url: str, *, timeout: float = TIMEOUT) -> PsycopgStore:
    """The store of a URL."""
    return PsycopgStore(url, timeout=timeout)


class PsycopgStore(PostgresStore):
    """Records in PostgreSQL, over a few connections of its own; safe for threads. Nothing is opened before a call.

    url: `postgresql://user@host/database`, with `schema`, `statement_cache_size=0` (behind a transaction pooler) and
    `pool_size` beside libpq's own parameters; or what an engine leads to. timeout: seconds for each call, connecting
    included.
    """

    def __init__(self, url: str | PostgresTarget, *, timeout: float = TIMEOUT) -> None:
        target = parse(url) if isinstance(url, str) else url
        super().__init__(PsycopgPool(target, timeout), target.table)
