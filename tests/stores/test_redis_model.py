"""The scripts against the table: random batches to Redis, Valkey and the memory store, compared reply by reply.

The stores have clocks of their own, so leases and retentions are far away or over at once, and tokens are compared by
what has to hold of them: they rise, and each store knows its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest
from redis import Redis

from retryproof.core.batch import ItemError
from retryproof.core.commands import (
    Abandoned,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    Finished,
    Release,
    Renew,
    Running,
)
from retryproof.core.record import Record
from retryproof.stores.base import Store
from retryproof.stores.memory import MemoryStore
from retryproof.stores.redis import RedisStore
from tests.stores.hashes import HashStore

STEPS = 400
OPERATIONS = 6
FAR = 100_000.0


@pytest.fixture(params=["redis", "valkey"])
def url(request: pytest.FixtureRequest) -> str:
    return cast("str", request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(url: str, unique: str) -> Iterator[RedisStore]:
    store = RedisStore(url, prefix=unique)
    yield store
    store.close()


class Twins:
    """The store under test beside the memory store: the same commands to both, with each one's own tokens."""

    def __init__(self, store: Store, random: Random, before: HashStore | None = None) -> None:
        self.store = store
        self.before = before
        """Where given, each record is made a hash before each batch, as the release before left it."""
        self.model = MemoryStore()
        self.random = random
        self.ids = [random.randbytes(32) for _ in range(OPERATIONS)]
        self.claims: dict[bytes, list[tuple[Claim, int, int]]] = {id: [] for id in self.ids}
        """For each operation the claims that acquired it, with the tokens of the model and of the store."""
        self.seen: set[str] = set()

    def step(self) -> None:
        """One random batch of one kind."""
        ids = self.random.sample(self.ids, self.random.randint(1, OPERATIONS))
        act = self.random.choice(
            [self.claim, self.claim, self.claim, self.settle, self.settle, self.renew, self.checkpoint, self.evict]
        )
        self.forget_expired()
        if self.before is not None:
            for record in self.store.get(self.ids):
                if record is not None:
                    self.before.write(record)
        act(ids)
        assert [view(record) for record in self.model.get(self.ids)] == [
            view(record) for record in self.store.get(self.ids)
        ]

    def forget_expired(self) -> None:
        """From both: what is past its retention vanishes from each in its own time."""
        for id, record in zip(self.ids, self.model.get(self.ids), strict=True):
            if record is None:
                assert self.model.evict([id]) == self.store.evict([id]) == [True]

    def evict(self, ids: Sequence[bytes]) -> None:
        assert self.store.evict(ids) == self.model.evict(ids)

    def claim(self, ids: Sequence[bytes]) -> None:
        claims = [self.a_claim(id) for id in ids]
        replies = zip(self.model.claim(claims), self.store.claim(claims), strict=True)
        for claim, (expected, actual) in zip(claims, replies, strict=True):
            assert meaning(actual) == meaning(expected)
            self.seen.add(expected.reason if isinstance(expected, Abandoned) else type(expected).__name__)
            if isinstance(expected, Acquired) and isinstance(actual, Acquired):
                self.note(claim, expected, actual)

    def note(self, claim: Claim, expected: Acquired, actual: Acquired) -> None:
        known = self.claims[claim.id]
        if known and known[-1][1] == expected.token:
            assert actual.token == known[-1][2]
        else:
            assert all(actual.token > token for _, _, token in known)
            known.append((claim, expected.token, actual.token))

    def a_claim(self, id: bytes) -> Claim:
        """A new claim, or an old one repeated."""
        random = self.random
        if self.claims[id] and random.random() < 0.2:
            return random.choice(self.claims[id])[0]
        return Claim(
            id=id,
            fingerprint=random.choice([b"one", b"one", b"one", b"other"]),
            nonce=random.randbytes(16),
            lease=random.choice([0.0, 0.0, FAR]),
            retention=random.choice([0.0, FAR, FAR, FAR]),
            unsettled_retention=FAR,
            on_abandoned="refuse" if random.random() < 0.3 else "rerun",
            max_attempts=random.choice([1, 2, 5, 5]),
            tenant=random.choice([b"", b"t" * 16]),
            trace=random.choice(["", "00-ab-cd-01"]),
            alone=random.choice([0, 1, 2, 2]),
        )

    def settle(self, ids: Sequence[bytes]) -> None:
        if self.random.random() < 0.5:
            results = {id: self.random.choice([None, b"", b"result", b"x" * 5_000]) for id in ids}
            self.fenced("complete", ids, lambda claim, token: Complete(claim.id, claim.nonce, token, results[claim.id]))
        else:
            self.fenced("release", ids, lambda claim, token: Release(claim.id, claim.nonce, token))

    def renew(self, ids: Sequence[bytes]) -> None:
        lease, alone = self.random.choice([0.0, FAR]), self.random.random() < 0.5
        self.fenced("renew", ids, lambda claim, token: Renew(claim.id, claim.nonce, token, lease, alone))

    def checkpoint(self, ids: Sequence[bytes]) -> None:
        name, value = self.random.choice(["charge", "schritt ü"]), self.random.randbytes(self.random.choice([0, 3, 99]))
        self.fenced("checkpoint", ids, lambda claim, token: Checkpoint(claim.id, claim.nonce, token, name, value))

    def fenced(self, method: str, ids: Sequence[bytes], command: Any) -> None:
        """A command by the latest claim of each operation mostly, at times by another, or a wrong fence."""
        chosen = [self.holder(id) for id in ids if self.claims[id]]
        expected = getattr(self.model, method)([command(claim, model) for claim, model, _ in chosen])
        assert getattr(self.store, method)([command(claim, token) for claim, _, token in chosen]) == expected

    def holder(self, id: bytes) -> tuple[Claim, int, int]:
        claim, model, token = self.random.choice([*self.claims[id], *[self.claims[id][-1]] * 8])
        wrong = self.random.random()
        if wrong < 0.05:
            return claim, model + 1, token + 1
        if wrong < 0.1:
            return replace(claim, nonce=bytes(16)), model, token
        return claim, model, token


def meaning(reply: ClaimReply | ItemError) -> object:
    """A reply without what depends on a store's own clock."""
    match reply:
        case Acquired():
            return ("acquired", reply.attempt, reply.birth, dict(reply.checkpoints), reply.trace)
        case Finished():
            return ("finished", reply.result, reply.attempt, reply.trace)
        case Running(left):
            return ("running", round(left / FAR, 2))
        case _:
            return reply


def view(record: Record | None) -> object:
    """A record without what depends on a store's own clock."""
    if record is None:
        return None
    return (
        (record.state, record.fingerprint, record.birth, record.nonce, record.attempt, record.deaths, record.counts),
        (record.retention, record.result, record.tenant, record.trace, dict(record.checkpoints)),
        (record.live(record.read_at), round((record.lease_until - record.read_at) / 1e6 / FAR, 2)),
        round((record.expires_at - record.read_at) / 1e6 / FAR, 2),
    )


@pytest.mark.parametrize("seed", range(3))
def test_they_decide_so_over_hashes_too(store: RedisStore, url: str, unique: str, seed: int) -> None:
    with Redis.from_url(url) as client:
        twins = Twins(store, Random(seed), HashStore(client, unique))
        for _ in range(STEPS):
            twins.step()
    assert twins.seen == {"Acquired", "Running", "Finished", "Mismatch", "refused", "poisoned"}


@pytest.mark.parametrize("seed", range(6))
def test_the_scripts_decide_as_the_table_does(store: RedisStore, seed: int) -> None:
    twins = Twins(store, Random(seed))
    for _ in range(STEPS):
        twins.step()
    assert twins.seen == {"Acquired", "Running", "Finished", "Mismatch", "refused", "poisoned"}
