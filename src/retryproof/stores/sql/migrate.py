"""`migrate`, by the name that applications import it by."""

from __future__ import annotations

from collections.abc import Callable

from retryproof.core.errors import ConfigurationError
from retryproof.stores.base import DatabaseEngine
from retryproof.stores.url import entry_of, load


def migrate(url: str | DatabaseEngine, *, progress: Callable[[str], None] = lambda step: None) -> list[str]:
    """Apply the migrations that the database has not seen; the names of what was applied.

    url: the store's, or the SQLAlchemy engine that stands for it. progress: told each step in words.
    Raises StoreUnavailable, and ConfigurationError for a store without migrations.
    """
    entry = entry_of(url)
    if entry.migrations is None:
        raise ConfigurationError("This store has no migrations; those of postgresql:// and sqlite:// have.")
    applied: list[str] = load(entry, entry.migrations).migrate(url, progress=progress)
    return applied
