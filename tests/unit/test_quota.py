"""How much of each partition a relay's claims take (T6), against an outbox in which nothing but numbers is kept."""

from __future__ import annotations

from retryproof.outbox.quota import RARELY, SPREAD, Quota

BATCH = 100
OWNED = 64


def batches(quota: Quota, pending: dict[int, int], count: int) -> list[dict[int, int]]:
    """What so many claims find, from the first partitions to the last."""
    taken = []
    for _ in range(count):
        found: dict[int, int] = {}
        for partition, messages in pending.items():
            most = min(quota.size, messages, BATCH - sum(found.values()))
            if most:
                found[partition] = most
                pending[partition] -= most
        quota.learn(found, OWNED)
        taken.append(found)
    return taken


def test_t6_a_full_batch_comes_from_many_partitions() -> None:
    found = batches(Quota(BATCH), dict.fromkeys(range(OWNED), 1_000), 50)
    assert all(sum(batch.values()) == BATCH and len(batch) >= SPREAD for batch in found)


def test_t6_one_hot_partition_gives_full_batches() -> None:
    found = batches(Quota(BATCH), {0: 1_000_000}, 1_000)
    short = [batch for batch in found if sum(batch.values()) < BATCH]
    assert len(short) < 1_000 / RARELY + 10


def test_t6_a_relay_that_was_at_one_hot_partition_spreads_again() -> None:
    quota = Quota(BATCH)
    batches(quota, {0: 1_000_000}, 1_000)
    found = batches(quota, dict.fromkeys(range(OWNED), 1_000_000), RARELY + 5)
    assert len(found[-1]) >= SPREAD


def test_t6_a_batch_of_one_has_a_share_of_one() -> None:
    quota = Quota(1)
    quota.learn({0: 1}, OWNED)
    assert quota.size == 1
