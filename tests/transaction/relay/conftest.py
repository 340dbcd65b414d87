"""The outbox that a relay's tests work on."""

from pathlib import Path

import pytest

from retryproof.stores.sql.migrate import migrate
from tests.transaction.outboxes import Database, sqlite_url


@pytest.fixture
def postgres_outbox(postgres_url: str, unique: str) -> Database:
    """On PostgreSQL, in a schema of its own."""
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return Database(url)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """On each engine in turn."""
    if request.param == "sqlite":
        return Database(sqlite_url(tmp_path))
    found: Database = request.getfixturevalue("postgres_outbox")
    return found
