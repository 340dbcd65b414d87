"""Stores that hang, die, restart or are locked, before, during and after the handler of an HTTP app (C10).

Every answer is definite, nothing runs before the store has said so, and the effect happens once for one key.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI

from retryproof import AsyncIdempotency, Policy, current_operation, errors
from retryproof.core.record import State
from retryproof.drive import clock
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.stores import open_store
from retryproof.stores.keeper import Keeper
from retryproof.stores.sql.migrate import migrate
from tests.conftest import PrivateServer
from tests.engine.support import SECONDS, Events, in_thread
from tests.http.servers import exchange, request_bytes, split, uvicorn_server

pytestmark = [pytest.mark.crash]

POLICY = Policy(lease=1.0, store_timeout=0.3, complete_timeout=0.6)
SLACK = 1.5
"""Seconds beyond what the policy says that an answer may take on busy machines."""


@dataclass
class Trouble:
    """A store that can be put out of reach, and how."""

    url: str
    begin: Callable[[], None]
    end: Callable[[], None]


def hung_redis(start: PrivateServer) -> Trouble:
    server = start()
    return Trouble(server.url, server.pause, server.resume)


def dead_redis(start: PrivateServer) -> Trouble:
    # Everything that it acknowledged is there again after a restart.
    server = start("--appendonly", "yes", "--appendfsync", "always")
    return Trouble(server.url, server.kill, server.restart)


def hung_postgres(start: PrivateServer) -> Trouble:
    server = start()
    migrate(server.url)
    return Trouble(server.url, server.pause, server.resume)


def dead_postgres(start: PrivateServer) -> Trouble:
    server = start()
    migrate(server.url)
    return Trouble(server.url, server.kill, server.restart)


def locked_sqlite(path: Path) -> Trouble:
    file = path / "keys.db"
    rival = sqlite3.connect(file, isolation_level=None, check_same_thread=False)

    def lock() -> None:
        rival.execute("BEGIN EXCLUSIVE")

    return Trouble(f"sqlite:///{file}", lock, rival.rollback)


KINDS = ["hung redis", "dead redis", "hung postgres", "dead postgres", "locked sqlite"]


@pytest.fixture(params=KINDS)
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trouble]:
    how, what = request.param.split()
    if what == "sqlite":
        yield locked_sqlite(tmp_path)
        return
    make: Callable[[PrivateServer], Trouble] = globals()[f"{how}_{what}"]
    yield make(request.getfixturevalue(f"private_{what}"))


class Service:
    """A payments app whose handler can be held up; effects by derived id."""

    def __init__(self, url: str) -> None:
        self.effects: list[str] = []
        self.runs = 0
        self.inside = threading.Event()
        self.leave = threading.Event()
        self.leave.set()
        self.events = Events()
        app = FastAPI()

        @app.post("/charges", status_code=201)
        async def create_charge() -> dict[str, str]:
            id = str(current_operation().derive("charge"))
            self.runs += 1
            if id not in self.effects:
                self.effects.append(id)
            self.inside.set()
            await asyncio.to_thread(self.leave.wait, SECONDS)
            return {"id": id}

        self.app = IdempotencyMiddleware(app, store=url, scope=single_tenant, policy=POLICY, events=(self.events,))


@dataclass
class Reply:
    status: int
    headers: dict[bytes, list[bytes]]
    content: Any
    seconds: float


def post(port: int, key: str) -> Reply:
    began = time.monotonic()
    status, headers, content = split(exchange(port, request_bytes(key=key)))
    return Reply(status, headers, json.loads(content), time.monotonic() - began)


def post_until(port: int, key: str, status: int, seconds: float) -> Reply:
    """Retry as a client does, until this is the answer; all answers before it invite a retry with the same key."""
    began = time.monotonic()
    while (reply := post(port, key)).status != status:
        assert reply.status in (409, 503)
        assert b"retry-after" in reply.headers
        assert time.monotonic() - began < seconds, reply
        time.sleep(0.05)  # the client's back-off
    return reply


@contextmanager
def serving(trouble: Trouble) -> Iterator[tuple[Service, int]]:
    service = Service(trouble.url)
    with uvicorn_server(service.app) as port:
        try:
            yield service, port
        finally:
            service.leave.set()


def running(service: Service, port: int, key: str) -> Future[Reply]:
    """A request whose handler has had its effect and has not returned."""
    service.inside.clear()
    service.leave.clear()
    reply = in_thread(lambda: post(port, key))
    assert service.inside.wait(SECONDS)
    return reply


@pytest.mark.quiet
@pytest.mark.timeout(90)
def test_c10_before_the_handler_nothing_runs_and_the_answer_is_503(trouble: Trouble) -> None:
    key = str(uuid4())
    with serving(trouble) as (service, port):
        assert post(port, str(uuid4())).status == 201  # connections are made
        trouble.begin()
        try:
            down = post(port, key)
        finally:
            trouble.end()
        assert (down.status, down.content["code"]) == (503, "store-unavailable")
        assert int(down.headers[b"retry-after"][0]) >= 1
        assert down.seconds < 2 * POLICY.store_timeout + SLACK
        assert service.runs == 1
        fresh = post_until(port, key, 201, 10.0)
        assert service.runs == 2
        assert post(port, key).content == fresh.content


@pytest.mark.timeout(90)
def test_c10_a_store_that_is_back_before_the_end_goes_unnoticed(trouble: Trouble) -> None:
    """During the handler: renewal fails meanwhile, and what the handler made is stored all the same."""
    key = str(uuid4())
    with serving(trouble) as (service, port):
        asked = running(service, port, key)
        trouble.begin()
        threading.Event().wait(0.4)  # long enough for a renewal to fail
        trouble.end()
        service.leave.set()
        fresh = asked.result(SECONDS)
        assert fresh.status == 201
        replay = post_until(port, key, 201, 10.0)
        assert replay.content == fresh.content
        assert replay.headers[b"idempotency-replayed"] == [b"true"]
        assert service.runs == 1


@pytest.mark.timeout(90)
def test_c10_after_the_effect_the_caller_gets_the_real_result_and_it_is_stored_late(trouble: Trouble) -> None:
    key = str(uuid4())
    with serving(trouble) as (service, port):
        asked = running(service, port, key)
        trouble.begin()
        try:
            released = time.monotonic()
            service.leave.set()
            fresh = asked.result(SECONDS)
            waited = time.monotonic() - released
            assert (fresh.status, fresh.content) == (201, {"id": service.effects[0]})
            assert waited < POLICY.complete_timeout + POLICY.store_timeout + SLACK
            assert "unstored" in service.events.kinds
        finally:
            trouble.end()
        service.events.wait_for("stored_late", 15.0)
        replay = post(port, key)
        assert (replay.status, replay.content) == (201, fresh.content)
        assert replay.headers[b"idempotency-replayed"] == [b"true"]
        assert (service.runs, len(service.effects)) == (1, 1)


def test_c10_a_release_lingers_too(private_redis: PrivateServer) -> None:
    """The handler failed while the store hung: once it is back, a retry runs without waiting for the lease."""
    trouble = hung_redis(private_redis)
    failing, inside, leave = FastAPI(), threading.Event(), threading.Event()
    runs: list[int] = []

    @failing.post("/charges", status_code=201)
    async def create_charge() -> dict[str, int]:
        runs.append(1)
        if len(runs) == 1:
            inside.set()
            await asyncio.to_thread(leave.wait, SECONDS)
            raise OSError("the bank hung up")
        return {"runs": len(runs)}

    policy = Policy(lease=60.0, store_timeout=0.3, complete_timeout=0.3)
    layer = IdempotencyMiddleware(failing, store=trouble.url, scope=single_tenant, policy=policy)
    key = str(uuid4())
    with uvicorn_server(layer) as port:
        asked = in_thread(lambda: exchange(port, request_bytes(key=key)))
        assert inside.wait(SECONDS)
        trouble.begin()
        leave.set()
        assert split(asked.result(SECONDS))[0] == 500
        trouble.end()
        assert post_until(port, key, 201, 15.0).content == {"runs": 2}


def test_a_restart_of_redis_that_empties_its_scripts_goes_unnoticed(private_redis: PrivateServer) -> None:
    server = private_redis("--appendonly", "yes", "--appendfsync", "always")
    trouble = Trouble(server.url, server.kill, server.restart)
    key = str(uuid4())
    with serving(trouble) as (service, port):
        fresh = post(port, key)
        server.restart()
        replay = post(port, key)
        assert (replay.status, replay.content) == (201, fresh.content)
        assert post(port, str(uuid4())).status == 201
        assert service.runs == 2


def test_c10_claims_whose_callers_gave_up_on_a_hung_store_are_given_back(private_redis: PrivateServer) -> None:
    """C3: what a hung server had been sent and applies once it wakes is released, not held until its lease ends."""
    trouble = hung_redis(private_redis)
    service = Service(trouble.url)
    service.app = IdempotencyMiddleware(
        service.app.app, store=trouble.url, scope=single_tenant, policy=Policy(lease=60.0, store_timeout=0.3)
    )
    keys = [str(uuid4()) for _ in range(5)]
    with uvicorn_server(service.app) as port:
        assert post(port, str(uuid4())).status == 201
        trouble.begin()
        assert {post(port, key).status for key in keys} == {503}
        trouble.end()
        for key in keys:
            post_until(port, key, 201, 15.0)
        assert service.runs == 1 + len(keys)
    store = open_store(trouble.url)
    assert {record.state for record in store.scan()} == {State.COMPLETED}
    store.close()


# Twins in the process that holds the result, and longer outages than a lease (C10)


def outlasting_a_lease() -> None:
    threading.Event().wait(POLICY.lease + 0.5)


@pytest.mark.quiet
@pytest.mark.timeout(90)
def test_c10_a_twin_gets_the_result_that_waits_for_a_store_and_never_runs(trouble: Trouble) -> None:
    """C8: from memory while the store is away, however long that is; from the store once it is back."""
    key = str(uuid4())
    with serving(trouble) as (service, port):
        asked = running(service, port, key)
        trouble.begin()
        try:
            service.leave.set()
            fresh = asked.result(SECONDS)
            outlasting_a_lease()
            in_the_outage = post(port, key)
            other = split(exchange(port, request_bytes(key=key, body=b'{"other": 1}')))
        finally:
            trouble.end()
        assert (in_the_outage.status, in_the_outage.content) == (201, fresh.content)
        assert in_the_outage.headers[b"idempotency-replayed"] == [b"true"]
        assert in_the_outage.seconds < POLICY.store_timeout + SLACK
        assert other[0] == 422
        twins = [in_thread(lambda: post(port, key)) for _ in range(8)]  # as the store returns
        assert [twin.result(SECONDS).content for twin in twins] == [fresh.content] * 8
        service.events.wait_for("stored_late", 15.0)
        assert post(port, key).content == fresh.content
        assert (service.runs, len(service.effects)) == (1, 1)


@pytest.mark.timeout(90)
def test_c10_no_twin_takes_over_in_the_process_whose_handler_outlasts_the_outage(trouble: Trouble) -> None:
    """Its lease ended in the outage, and is renewed before a twin's claim leaves."""
    key = str(uuid4())
    with serving(trouble) as (service, port):
        asked = running(service, port, key)
        trouble.begin()
        try:
            outlasting_a_lease()
            in_the_outage = post(port, key)
        finally:
            trouble.end()
        assert in_the_outage.status in (409, 503)
        twins = [in_thread(lambda: post(port, key)) for _ in range(8)]
        assert {twin.result(SECONDS).status for twin in twins} <= {409, 503}
        service.leave.set()
        fresh = asked.result(SECONDS)
        assert post_until(port, key, 201, 15.0).content == fresh.content
        assert (service.runs, len(service.effects)) == (1, 1)


def test_c10_a_replay_from_memory_asks_whether_its_caller_may_have_it(private_redis: PrivateServer) -> None:
    """H13: as any other replay."""
    trouble, key = hung_redis(private_redis), str(uuid4())
    service, asked_for = Service(trouble.url), list[str]()

    def authorize(scope: Any) -> bool:
        asked_for.append(scope["path"])
        return False

    service.app = IdempotencyMiddleware(
        service.app.app, store=trouble.url, scope=single_tenant, policy=POLICY, authorize=authorize
    )
    with uvicorn_server(service.app) as port:
        asked = running(service, port, key)
        trouble.begin()
        service.leave.set()
        assert asked.result(SECONDS).status == 201
        denied = post(port, key)
        trouble.end()
    assert (denied.status, denied.content["code"], asked_for) == (403, "replay-denied", ["/charges"])


@pytest.mark.quiet
def test_c10_too_much_that_waits_for_a_store_begins_nothing_new(private_redis: PrivateServer) -> None:
    """What is held is bounded in bytes; then a new operation is refused before it runs, and twins are answered."""
    trouble, key = hung_redis(private_redis), str(uuid4())
    service = Service(trouble.url)
    policy = Policy(lease=1.0, store_timeout=0.3, complete_timeout=0.6, max_unstored=1)
    service.app = IdempotencyMiddleware(service.app.app, store=trouble.url, scope=single_tenant, policy=policy)
    with uvicorn_server(service.app) as port:
        asked = running(service, port, key)
        trouble.begin()
        service.leave.set()
        fresh = asked.result(SECONDS)
        refused = post(port, str(uuid4()))
        twin = post(port, key)
        trouble.end()
        assert (refused.status, refused.content["code"]) == (503, "store-unavailable")
        assert refused.seconds < POLICY.store_timeout  # nobody waited for the store
        assert twin.content == fresh.content
        assert post_until(port, str(uuid4()), 201, 15.0).status == 201


@pytest.mark.quiet
@pytest.mark.timeout(120)
def test_c10_a_flood_of_new_keys_at_a_hung_store_leaves_little_to_do(private_redis: PrivateServer) -> None:
    """C3: what never left needs no taking back, and what was applied late is released; nothing else is written."""
    server = private_redis()
    policy = Policy(lease=30.0, store_timeout=0.5)

    async def main() -> tuple[int, float]:
        engine = AsyncIdempotency(server.url, policy=policy)
        await engine.run("warm", lambda: 0, scope="s")
        keeper = engine.opened().background
        server.pause()

        async def ask(number: int) -> None:
            for turn in range(3):
                with pytest.raises(errors.StoreUnavailable):
                    await engine.run(f"{number}-{turn}", lambda: pytest.fail("it ran"), scope="s")

        began = time.monotonic()
        await asyncio.gather(*(ask(number) for number in range(2_000)))
        took = time.monotonic() - began
        left_to_do = len(keeper._disowned)
        server.resume()
        await asyncio.to_thread(looked_for, keeper)
        await engine.aclose()
        return left_to_do, took

    def looked_for(keeper: Keeper) -> None:
        """Each was looked for once or more since the server is back."""
        while keeper._disowned.due < clock() + 1.0:
            threading.Event().wait(0.05)

    left_to_do, took = asyncio.run(main())
    assert left_to_do <= 8 * 256  # the batches that left
    assert took < 30.0
    store = open_store(server.url)
    records = list(store.scan(limit=10_000))
    store.close()
    assert [record for record in records if record.state is State.IN_PROGRESS] == []
    assert len(records) <= 1 + left_to_do
