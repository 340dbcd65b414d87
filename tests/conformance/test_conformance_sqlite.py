"""The conformance suite over SQLite, with a rival connection as another process would have."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from retryproof.stores.base import Store
from retryproof.stores.sql.sqlite import SqliteStore
from retryproof.testing import StoreConformance


class TestSqliteStore(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqliteStore(str(tmp_path / "keys.db"))
        yield store
        store.close()

    @pytest.fixture
    def rival(self, tmp_path: Path) -> Iterator[Store]:
        store = SqliteStore(str(tmp_path / "keys.db"))
        yield store
        store.close()
