"""The engines, by name."""

from __future__ import annotations

from retryproof.core.errors import ConfigurationError
from retryproof.sql.dialect import Dialect
from retryproof.sql.postgres.dialect import POSTGRES
from retryproof.sql.sqlite.dialect import SQLITE

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (POSTGRES, SQLITE)}


def dialect_of(name: str, *, subject: str, found: str) -> Dialect:
    """The engine of that name.

    Raises ConfigurationError for another: "`subject` PostgreSQL and SQLite; `found` is `name`."
    """
    dialect = DIALECTS.get(name)
    if dialect is None:
        raise ConfigurationError(f"{subject} PostgreSQL and SQLite; {found} is {name}.")
    return dialect
