"""Work whose lease is over in the step that was to call it does not begin (C6, I1)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, drive, errors
from retryproof.core.commands import Acquired, Claim, ClaimReply, FenceReply, Renew
from retryproof.core.record import State
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.stores import keeper
from retryproof.stores.base import Capabilities
from retryproof.stores.memory import MemoryStore
from retryproof.stores.sql.migrate import migrate
from retryproof.testing.link import FaultLink
from tests.engine.conftest import MakeCaller
from tests.engine.support import SECONDS

BRIEF: dict[str, Any] = {"lease": 0.2, "max_run": 60.0}


@pytest.mark.parametrize("store_url", ["sqlite", "redis", "postgres"], indirect=True)
async def test_c6_a_handler_that_blocks_the_loop_past_a_neighbours_lease_does_not_double_it(
    store_url: str, unique: str
) -> None:
    """Both claims come back in one batch; while the first handler blocks, another process takes the second over."""
    effects: list[str] = []
    policy = Policy(lease=0.3, max_run=60.0)
    rival = Idempotency(store_url, policy=replace(policy, wait=SECONDS, poll=0.02))

    def first() -> str:
        second = rival.id_of(unique, "second")
        while rival.opened().store.get([second]) == [None]:
            time.sleep(0.01)
        taken_over = rival.run("second", lambda: effects.append("rival"), scope=unique)
        return f"attempt {taken_over.attempt}"

    async with AsyncIdempotency(store_url, policy=policy) as engine:
        await engine.run("warm", lambda: 0, scope=unique)
        blocked, second = await asyncio.gather(
            engine.run("first", first, scope=unique),
            engine.run("second", lambda: effects.append("late"), scope=unique),
        )
    rival.close()
    assert (blocked.value, second.replayed, effects) == ("attempt 2", True, ["rival"])


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_c6_a_late_reply_to_a_claim_over_a_slow_link_begins_nothing_that_was_taken_over(
    request: pytest.FixtureRequest, kind: str, make_caller: MakeCaller
) -> None:
    """The reply comes 1.6 s after the claim, whose lease was 1 s; meanwhile another process takes over, and charges."""
    url: str = request.getfixturevalue(f"{kind}_url")
    if kind == "postgres":
        migrate(url)
    parts, effects = urlsplit(url), list[str]()
    with FaultLink(parts.hostname or "", parts.port or 0) as link:
        slow = make_caller(
            urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{link.port}"))),
            lease=1.0,
            max_run=60.0,
        )
        slow.run("warm", lambda: 0)
        link.delay(1.6, direction="reply", times=1)
        late = slow.start("k", lambda: effects.append("late"))
        rival = make_caller(url, lease=1.0, max_run=60.0, wait=SECONDS, poll=0.02)
        link.wait_for("delay")
        rival.run("k", lambda: effects.append("rival"))
        assert late.result(SECONDS).replayed
    assert effects == ["rival"]


class LateReplies(MemoryStore):
    """A memory store, treated as one that blocks, whose answers to claims come after `late` was called with them."""

    capabilities: Capabilities = replace(MemoryStore.capabilities, blocking=True, concurrent=False)

    def __init__(self, late: Callable[[MemoryStore, Sequence[Claim]], None]) -> None:
        super().__init__()
        self.late = late
        self.broken = False
        self.renewals = 0

    def claim(self, claims: Sequence[Claim]) -> Sequence[ClaimReply]:
        replies = super().claim(claims)
        if not self.broken:
            self.late(self, claims)
        return replies

    def renew(self, commands: Sequence[Renew]) -> Sequence[FenceReply]:
        self.renewals += 1
        if self.broken:
            raise ConnectionError("no answer")
        return super().renew(commands)


def _past_the_lease(store: MemoryStore, claims: Sequence[Claim]) -> None:
    time.sleep(claims[0].lease + 0.05)


def _cut_off(store: MemoryStore, claims: Sequence[Claim]) -> None:
    _past_the_lease(store, claims)
    assert isinstance(store, LateReplies)
    store.broken = True


def _taken_over(store: MemoryStore, claims: Sequence[Claim]) -> None:
    rival = replace(claims[0], nonce=b"r" * 16)
    while not isinstance(MemoryStore.claim(store, [rival])[0], Acquired):
        time.sleep(0.01)


def test_c6_a_late_answer_to_a_claim_that_was_taken_over_begins_nothing(make_caller: MakeCaller) -> None:
    effects: list[str] = []
    caller = make_caller(LateReplies(_taken_over), **BRIEF)
    with pytest.raises(errors.LeaseLost):
        caller.run("k", lambda: effects.append("late"))
    assert effects == []


def test_c6_a_late_answer_to_a_claim_that_still_stands_costs_one_renewal(make_caller: MakeCaller) -> None:
    store = LateReplies(_past_the_lease)
    outcome = make_caller(store, **BRIEF).run("k", lambda: 7)
    assert (outcome.value, outcome.replayed, outcome.attempt) == (7, False, 1)
    assert store.renewals >= 1


def test_c6_what_came_too_late_and_cannot_be_renewed_is_not_begun_and_given_back(make_caller: MakeCaller) -> None:
    effects: list[str] = []
    store = LateReplies(_cut_off)
    caller = make_caller(store, **BRIEF)
    with pytest.raises(errors.StoreUnavailable):
        caller.run("k", lambda: effects.append("late"))
    assert effects == []
    _wait_until_released(store)


def _wait_until_released(store: MemoryStore) -> None:
    until = time.monotonic() + SECONDS
    while [record.state for record in store.scan(limit=10)] != [State.RELEASED]:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("late", "status", "called"), [(_taken_over, 409, False), (_cut_off, 503, False), (_past_the_lease, 201, True)]
)
async def test_c6_an_app_whose_lease_is_over_is_not_called(
    late: Callable[[MemoryStore, Sequence[Claim]], None], status: int, called: bool
) -> None:
    effects: list[str] = []

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        effects.append("called")
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"paid"})

    store, sent = LateReplies(late), list[dict[str, Any]]()
    layer = IdempotencyMiddleware(app, store=store, scope=single_tenant, policy=Policy(**BRIEF))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/pay",
        "query_string": b"",
        "headers": [(b"idempotency-key", b"k")],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await layer(scope, receive, send)
    assert (sent[0]["status"], bool(effects)) == (status, called)
    if late is _cut_off:
        await asyncio.to_thread(_wait_until_released, store)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no such clock on this platform")
def test_c6_the_time_that_a_machine_slept_counts_to_its_leases() -> None:
    assert drive.clock.func is time.clock_gettime  # type: ignore[attr-defined]  # a partial
    assert drive.clock.args == (time.CLOCK_BOOTTIME,)  # type: ignore[attr-defined]  # a partial
    assert vars(keeper)["clock"] is drive.clock


def test_c6_max_run_counts_from_the_claim_that_was_acquired(make_caller: MakeCaller) -> None:
    """C18: a waiter that acquires after a wait longer than max_run is not overrun at once."""
    store = MemoryStore()
    policy: dict[str, Any] = {"lease": 0.2, "max_run": 0.6, "wait": SECONDS, "poll": 0.02}
    begun = time.monotonic()
    caller = make_caller(store, **policy)

    def claim_of(claims: Any) -> Claim:
        return Claim(claims, b"\0\0", b"r" * 16, 0.9, 60.0, 60.0)

    engine: Any = caller.sync or caller.task
    id = engine.id_of(caller.scope, "k")
    fingerprint = _fingerprint_of(caller)
    store.claim([replace(claim_of(id), fingerprint=fingerprint)])
    caller.run("k", lambda: time.sleep(0.3))
    assert time.monotonic() - begun > 0.9
    assert "overrun" not in caller.events.kinds


def _fingerprint_of(caller: Any) -> bytes:
    caller.run("other", lambda: 0)
    engine = caller.sync or caller.task
    store: MemoryStore = engine._source.given
    (record,) = store.get([engine.id_of(caller.scope, "other")])
    assert record is not None
    return record.fingerprint
