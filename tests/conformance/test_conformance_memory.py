"""The conformance suite over the memory store, by the host's clock and by one that tests move."""

import pytest

from retryproof.stores.base import Store
from retryproof.stores.memory import MemoryStore
from retryproof.testing import ManualClock, StoreConformance
from retryproof.testing.conformance import Advance


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestMemoryStoreWithAManualClock(StoreConformance):
    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def store(self, clock: ManualClock) -> Store:
        return MemoryStore(clock)

    @pytest.fixture
    def advance(self, clock: ManualClock) -> Advance:
        return clock.advance
