"""What is remembered of callers' identities and paths, so that ids are quick to make, has an end (C11)."""

import tracemalloc
from collections.abc import Callable

import pytest

from retryproof.core.keys import record_id, tenant_digest

MIB = 1024 * 1024


@pytest.mark.parametrize(
    "remember",
    [lambda part: tenant_digest(part), lambda part: record_id(("caller", part), "key")],
    ids=["tenants", "scopes"],
)
def test_long_identities_do_not_fill_the_memory(remember: Callable[[bytes], bytes]) -> None:
    """A header may have tens of kilobytes, and whoever sends it need not be known."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(1_100):
        remember(b"%d" % number + b"x" * 32_768)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept < 4 * MIB


@pytest.mark.parametrize("length", [10, 10_000])
def test_c11_a_digest_depends_on_part_type_and_pepper_whatever_was_asked_before(length: int) -> None:
    part = "a" * length
    raw = part.encode()
    asked: list[tuple[str | bytes, bytes]] = [(part, b""), (part, b"p"), (part, b"q"), (raw, b""), (raw, b"p")]
    first = [tenant_digest(part, pepper=pepper) for part, pepper in asked]
    assert len(set(first)) == len(asked)
    assert [tenant_digest(part, pepper=pepper) for part, pepper in asked] == first
    ids = [record_id(("caller", part), "key", pepper=pepper) for part, pepper in asked]
    assert len(set(ids)) == len(asked)
