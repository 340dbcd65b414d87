"""A route that fails open runs nothing beside itself (C10)."""

from __future__ import annotations

import asyncio

import pytest

from retryproof import Policy
from retryproof.core.commands import Claim, Complete, Release, Renew
from retryproof.core.errors import StoreUnavailable
from retryproof.stores.base import Batch
from retryproof.stores.memory import MemoryStore
from tests.http.conftest import MakeLayer
from tests.http.harness import Counting, call, new_key, start

LEASE = 0.2


class Leaving(MemoryStore):
    """A store that is out of reach from when a test says so."""

    gone = False

    def _check(self) -> None:
        if self.gone:
            raise StoreUnavailable("out of reach")

    def claim(self, claims: list[Claim]) -> Batch[object]:  # type: ignore[override]  # told apart by nothing here
        self._check()
        return super().claim(claims)

    def renew(self, commands: list[Renew]) -> Batch[object]:  # type: ignore[override]  # as above
        self._check()
        return super().renew(commands)

    def complete(self, commands: list[Complete]) -> Batch[object]:  # type: ignore[override]  # as above
        self._check()
        return super().complete(commands)

    def release(self, commands: list[Release]) -> Batch[object]:  # type: ignore[override]  # as above
        self._check()
        return super().release(commands)


@pytest.mark.parametrize("after", [0.0, 2 * LEASE], ids=["lease live", "lease over"])
async def test_c10_a_twin_of_what_this_process_runs_does_not_run_unprotected(layer: MakeLayer, after: float) -> None:
    store, gate = Leaving(), asyncio.Event()
    app = Counting(gate=gate)
    covered = layer(app, store=store, fail_open=True, policy=Policy(lease=LEASE, complete_timeout=0.1))
    key = new_key()
    first = start(covered, key=key)
    first.give(b"{}")
    await app.began.wait()
    store.gone = True
    await asyncio.sleep(after)  # past the lease
    twin = await call(covered, key=key)
    assert (twin.status, twin.code, app.effects) == (409, "in-progress", 1)
    gate.set()
    assert (await first.end()).status == 201
    assert (await call(covered, key=key)).replayed
    assert app.effects == 1
    store.gone = False
