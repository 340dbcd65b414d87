"""What every store must do, as pytest classes for the authors of stores.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self):
            store = MyStore("server://…")
            yield store
            store.close()

Then all cases run over it. Each makes operations of its own, so tests may share a server. You may override two more
fixtures: `rival`, a second store over the same records, which half of the threads or tasks of a race use; and
`advance`, a function that moves the store's clock forward by a number of seconds. Without `advance`, the cases use
leases of a few milliseconds, and wait until they are over by the store's clock. No case needs a short lease to last.

A store's `capabilities` say what it can do. Cases that need more are skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from retryproof.stores.base import AsyncStore, Store
from retryproof.testing.bench import AsyncBench, Bench, BlockingBench, run_blocking
from retryproof.testing.cases import CASES, Case

Advance = Callable[[float], None]

_each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class _Conformance:
    @pytest.fixture
    def advance(self) -> Advance | None:
        """A function that moves the store's clock; None: the clock moves by itself."""
        return None


class StoreConformance(_Conformance):
    """The suite for a blocking store; override the fixture `store`."""

    @pytest.fixture
    def store(self) -> Store:
        """The store under test. The fixture that overrides this one closes it."""
        raise NotImplementedError("override the fixture `store`")

    @pytest.fixture
    def rival(self) -> Store | None:
        """Another store over the same records, as in another process."""
        return None

    @_each_case
    def test_conforms(self, case: Case, store: Store, rival: Store | None, advance: Advance | None) -> None:
        """Runs one case of `retryproof.testing.cases`."""
        bench = BlockingBench(store, rival, advance)
        _skip_what_is_not_offered(case, bench)
        run_blocking(case.run(bench))


class AsyncStoreConformance(_Conformance):
    """The suite for an async store; override the fixture `store`. It needs pytest-asyncio."""

    @pytest.fixture
    def store(self) -> AsyncStore:
        """The store under test. The fixture that overrides this one closes it."""
        raise NotImplementedError("override the fixture `store`")

    @pytest.fixture
    def rival(self) -> AsyncStore | None:
        """Another store over the same records, as in another process."""
        return None

    @pytest.mark.asyncio
    @_each_case
    async def test_conforms(
        self, case: Case, store: AsyncStore, rival: AsyncStore | None, advance: Advance | None
    ) -> None:
        """Runs one case of `retryproof.testing.cases`."""
        bench = AsyncBench(store, rival, advance)
        _skip_what_is_not_offered(case, bench)
        await case.run(bench)


def _skip_what_is_not_offered(case: Case, bench: Bench) -> None:
    if not case.offered(bench.capabilities):
        pytest.skip(f"{bench.capabilities.name} declares that it does not offer this")
