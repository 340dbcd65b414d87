"""What a claim finds in Redis does not depend on its neighbours in the batch: the script takes each key for what the
one before it was, new or known, and looks again where that was wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest
from redis import Redis

from retryproof.core.commands import DONE, Acquired, Claim, Complete
from retryproof.core.record import State
from retryproof.stores.redis import RedisStore
from tests.stores.hashes import HashStore
from tests.stores.support import again, new_claim


@pytest.fixture(params=["redis", "valkey"])
def client(request: pytest.FixtureRequest) -> Iterator[Redis]:
    with Redis.from_url(cast("str", request.getfixturevalue(f"{request.param}_url"))) as client:
        yield client


@pytest.fixture
def store(client: Redis, unique: str) -> Iterator[RedisStore]:
    store = RedisStore(client, prefix=unique)
    yield store
    store.close()


class Found:
    """Operations in every state in which a claim may find them, each with the claim and the name of its reply."""

    def __init__(self, store: RedisStore, client: Redis, unique: str) -> None:
        self._store = store
        self._client = client
        self._before = HashStore(client, unique)

    def new(self) -> tuple[Claim, str]:
        return new_claim(), "Acquired"

    def finished(self) -> tuple[Claim, str]:
        return again(self._finish(new_claim())), "Finished"

    def over(self) -> tuple[Claim, str]:
        return again(self._finish(new_claim(retention=0.0))), "Acquired"

    def running(self) -> tuple[Claim, str]:
        return again(self._held(new_claim())), "Running"

    def repeated(self) -> tuple[Claim, str]:
        return self._held(new_claim()), "Acquired"

    def of_other_input(self) -> tuple[Claim, str]:
        return new_claim(id=self._held(new_claim()).id, fingerprint=b"diff"), "Mismatch"

    def of_longer_input(self) -> tuple[Claim, str]:
        return new_claim(id=self._held(new_claim()).id, fingerprint=b"same and more"), "Mismatch"

    def dead(self) -> tuple[Claim, str]:
        return again(self._held(new_claim(lease=0.0))), "Acquired"

    def hash_of_before(self) -> tuple[Claim, str]:
        claim = new_claim()
        self._before.claim(claim)
        return again(claim), "Running"

    def damaged(self) -> tuple[Claim, str]:
        return self._written(b"no record"), "Unreadable"

    def empty(self) -> tuple[Claim, str]:
        return self._written(b""), "Unreadable"

    def of_another_type(self) -> tuple[Claim, str]:
        claim = new_claim()
        self._client.rpush(self._before.key(claim.id), "x")
        return claim, "Unreadable"

    def _held(self, claim: Claim) -> Claim:
        assert isinstance(self._store.claim([claim])[0], Acquired)
        return claim

    def _finish(self, claim: Claim) -> Claim:
        (held,) = self._store.claim([claim])
        assert self._store.complete([Complete(claim.id, claim.nonce, cast("Acquired", held).token, b"r")]) == [DONE]
        return claim

    def _written(self, value: bytes) -> Claim:
        claim = new_claim()
        self._client.set(self._before.key(claim.id), value)
        return claim


@pytest.mark.parametrize("seed", range(8))
def test_c10_neighbours_in_a_batch_do_not_decide_for_each_other(
    store: RedisStore, client: Redis, unique: str, seed: int
) -> None:
    found = Found(store, client, unique)
    kinds: Sequence[Callable[[], tuple[Claim, str]]] = [
        found.new,
        found.finished,
        found.over,
        found.running,
        found.repeated,
        found.of_other_input,
        found.of_longer_input,
        found.dead,
        found.hash_of_before,
        found.damaged,
        found.empty,
        found.of_another_type,
    ]
    chosen = random.Random(seed).choices(kinds, k=40)
    claims, expected = zip(*(kind() for kind in chosen), strict=True)
    replies = store.claim(claims)
    assert [type(reply).__name__ for reply in replies] == list(expected)
    for claim, reply in zip(claims, replies, strict=True):
        if isinstance(reply, Acquired):
            (record,) = store.get([claim.id])
            assert record is not None
            assert (record.state, record.nonce, record.token) == (State.IN_PROGRESS, claim.nonce, reply.token)
