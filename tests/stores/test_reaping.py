"""The end of what was never settled is told before it is removed, whatever fails in between (C12, I7, C19)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from retryproof.core.commands import Claim
from retryproof.core.errors import StoreUnavailable
from retryproof.core.record import Record
from retryproof.reaper import Totals, areap_all, reap_all
from retryproof.stores import Store, aopen_store, open_store
from retryproof.stores.sql.migrate import migrate
from retryproof.testing.link import FaultLink

MANY = 700
"""More than one statement of PostgreSQL's and one batch of Redis's take."""


@pytest.fixture(params=["memory", "sqlite", "redis", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> str:
    match request.param:
        case "memory":
            return f"memory://{unique}"
        case "sqlite":
            return f"sqlite:///{tmp_path}/keys.db"
        case "redis":
            return f"{request.getfixturevalue('redis_url')}?prefix={unique}"
        case _:
            found: str = request.getfixturevalue("postgres_url")
            migrate(found)
            return found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    found = open_store(url)
    reap_all(found, events=[])  # what others left in a database that is shared
    yield found
    found.close()


def leave(store: Store, count: int) -> set[bytes]:
    """Operations whose attempts died, and whose time is over."""
    claims = [
        Claim(os.urandom(32), b"\1\1f", os.urandom(16), lease=0.0, retention=0.0, unsettled_retention=0.0)
        for _ in range(count)
    ]
    size = store.capabilities.max_batch
    for start in range(0, count, size):
        store.claim(claims[start : start + size])
    return {claim.id for claim in claims}


def left(store: Store, ids: set[bytes]) -> int:
    size = store.capabilities.max_batch
    each = sorted(ids)
    return sum(record is not None for start in range(0, len(each), size) for record in store.get(each[start:][:size]))


def test_i7_a_listener_that_raises_leaves_the_others_to_be_told(store: Store) -> None:
    ids = leave(store, 50)
    told: list[bytes] = []

    def third_fails(record: Record) -> None:
        if len(told) == 2:
            raise ZeroDivisionError
        told.append(record.id)

    with pytest.raises(ZeroDivisionError):
        reap_all(store, events=[], on_ended=third_fails)
    assert left(store, ids) == 48
    totals = reap_all(store, events=[], on_ended=lambda record: told.append(record.id))
    assert (totals.unsettled, totals.more) == (48, False)
    assert sorted(told) == sorted(ids)
    assert left(store, ids) == 0


async def test_i7_the_same_for_a_store_of_an_event_loop(url: str, store: Store) -> None:
    opened = await aopen_store(url)
    ids = leave(store, 50)
    told: list[bytes] = []

    def third_fails(record: Record) -> None:
        if len(told) == 2:
            raise ZeroDivisionError
        told.append(record.id)

    with pytest.raises(ZeroDivisionError):
        await areap_all(opened, events=[], on_ended=third_fails)
    assert await asyncio.to_thread(left, store, ids) == 48
    await areap_all(opened, events=[], on_ended=lambda record: told.append(record.id))
    assert sorted(told) == sorted(ids)
    await opened.aclose()


def test_c12_each_end_is_told_before_the_record_is_gone(store: Store) -> None:
    ids = leave(store, 20)
    gone_when_told: list[bytes] = []

    def look(record: Record) -> None:
        if store.get([record.id]) == [None]:
            gone_when_told.append(record.id)

    reap_all(store, limit=6, events=[], on_ended=look)
    assert gone_when_told == []
    assert left(store, ids) == 0


def test_c19_a_full_pass_of_what_is_unsettled_does_not_hold_up_the_next(store: Store) -> None:
    ids = leave(store, 25)
    passes: list[Totals] = []
    totals = reap_all(store, limit=10, events=[], on_pass=passes.append)
    assert (totals.unsettled, totals.more) == (25, False)
    assert all(later.unsettled - earlier.unsettled <= 10 for earlier, later in pairwise(passes))
    assert left(store, ids) == 0


@pytest.fixture
def link(url: str) -> Iterator[FaultLink]:
    parts = urlsplit(url)
    assert parts.port is not None
    with FaultLink("127.0.0.1", parts.port) as found:
        yield found


Fault = Callable[[FaultLink], object]


FAULTS: dict[str, Fault] = {
    "reply lost": lambda link: link.lose_reply(times=1),
    "cut": lambda link: link.cut_after(10, times=1),
    "no answer": lambda link: link.black_hole(times=1),
}


@pytest.mark.parametrize("nth", [1, 3, 6])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("url", ["redis", "postgres"], indirect=True)
def test_i7_every_end_is_told_whatever_the_link_loses(
    url: str, store: Store, link: FaultLink, fault: str, nth: int
) -> None:
    ids = leave(store, MANY)
    parts = urlsplit(url)
    far = urlsplit(link.url)
    user = f"{parts.username}@" if parts.username else ""
    through = open_store(urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{far.port}")))
    told: set[bytes] = set()

    def note(record: Record) -> None:
        fresh = record.id not in told
        told.add(record.id)
        if fresh and len(told) == nth * 100:
            FAULTS[fault](link)  # what comes next on the way to the server is lost

    try:
        for number in range(10):
            with suppress(StoreUnavailable):
                if nth == 1 and number == 0:
                    FAULTS[fault](link)
                if not reap_all(through, limit=300, events=[], on_ended=note).more:
                    break
    finally:
        through.close()
    reap_all(store, events=[], on_ended=note)
    assert left(store, ids) == 0
    assert ids <= told
