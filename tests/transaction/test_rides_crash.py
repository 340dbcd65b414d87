"""The rides example, killed at every point: one ride, one charge, one receipt, whoever finishes it (T3, I8)."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import stripe

from examples.rides.app import SCHEMA, Request, Rides
from retryproof.phased.completer import Round
from retryproof.transaction import Completer
from tests.transaction.rides import opened
from tests.transaction.support import Database

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(110),
    # What the stripe library does with httpx.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]
SECONDS = 15.0


class Process:
    """A process that says JSON objects, one a line."""

    def __init__(self, *command: str, **options: Any) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._heard: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._heard.put(line)

    def say(self, message: dict[str, Any] | None = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n" if message is None else json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> bytes:
        return self._heard.get(timeout=SECONDS)

    def hear_json(self, name: str) -> dict[str, Any]:
        """The next that has this name in it."""
        while True:
            said: dict[str, Any] = json.loads(self.hear())
            if name in said:
                return said

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # and what it has forked, which may be stopped
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Stripe:
    """localstripe, and what was charged there."""

    def __init__(self, *options: str) -> None:
        self._process = Process("examples/rides/local_stripe.py", "0", *options)
        line = self._process.hear().decode()  # "======== Running on http://127.0.0.1:PORT ========"
        self.url = line.split()[3]
        self._client = stripe.StripeClient("sk_test_rides", base_addresses={"api": self.url})
        card = {"number": "4242424242424242", "exp_month": 12, "exp_year": 2030, "cvc": "123"}
        token = httpx.post(
            f"{self.url}/v1/tokens",
            data={f"card[{name}]": str(value) for name, value in card.items()},
            auth=("sk_test_rides", ""),
        ).json()["id"]
        self.customer = self._client.v1.customers.create({"source": token}).id

    def charges(self, ride: str) -> list[str]:
        """The ids of a ride's charges."""
        charges: Any = self._client.v1.charges.list({"limit": 100}).auto_paging_iter()
        return [charge.id for charge in charges if charge.metadata["ride"] == ride]

    def close(self) -> None:
        self._process.close()


@pytest.fixture(scope="module")
def local_stripe() -> Iterator[Stripe]:
    found = Stripe()
    yield found
    found.close()


@dataclass
class World:
    """A database, a Stripe, and one server's life after the other."""

    database: Database
    stripe: Stripe
    lives: Process
    port: int = 0
    pid: int = 0
    key: str = field(default_factory=lambda: str(uuid.uuid4()))

    def serve(self, crash: str = "", *, stops: bool = False) -> None:
        self.lives.say({**self.life, "crash": crash, "stops": stops})
        said = self.lives.hear_json("port")
        self.port, self.pid = said["port"], said["pid"]

    @property
    def life(self) -> dict[str, Any]:
        return {"database": self.database.store, "stripe": self.stripe.url, "crash": ""}

    def end(self) -> dict[str, int]:
        """End the server; the points that it reached."""
        self.lives.say()
        reached: dict[str, int] = self.lives.hear_json("reached")["reached"]
        assert self.lives.hear_json("exit")["exit"] == 0
        return reached

    def request(self) -> httpx.Response:
        return httpx.post(
            f"http://127.0.0.1:{self.port}/rides",
            json={"destination": "home", "customer": self.stripe.customer},
            headers={"Idempotency-Key": self.key, "X-Rider": "ada"},
            timeout=SECONDS,
        )

    def request_until_done(self) -> httpx.Response:
        """A client that is told that an attempt is in progress asks again."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            response = self.request()
            if response.status_code != 409:
                return response
            time.sleep(0.1)
        raise AssertionError(f"not done in {SECONDS} s")

    def rows(self, sql: str) -> list[Any]:
        with psycopg.connect(self.database.store, autocommit=True) as connection:
            return connection.execute(sql.encode()).fetchall()

    def complete(self) -> Round:
        """What a completer's look comes to after the leases are over."""

        async def look() -> Round:
            async with opened(self.life, Rides) as rides:
                return await Completer(rides.phased).run_once()

        self.database.execute("UPDATE retryproof_phased SET due_at = 0")
        free = "SELECT id FROM retryproof_operations WHERE state = 1 FOR UPDATE SKIP LOCKED"
        self.database.execute(f"UPDATE retryproof_operations SET lease_until = 0 WHERE id IN ({free})")
        return asyncio.run(look())

    def check_once(self) -> None:
        """One ride, one charge, one receipt, and nothing is left to do."""
        ((ride, status, charge),) = self.rows("SELECT id::text, status, charge FROM rides")
        assert status == "paid"
        assert self.stripe.charges(ride) == [charge]
        ((payload,),) = self.rows("SELECT payload FROM retryproof_outbox")
        assert json.loads(payload) == {"ride": ride, "rider": "ada", "status": "paid"}
        assert self.rows("SELECT * FROM retryproof_phased") == []

    def forget(self) -> None:
        """Begin anew, under another key."""
        self.key = str(uuid.uuid4())
        for table in ("rides", "retryproof_outbox", "retryproof_phased", "retryproof_operations"):
            self.database.execute(f"DELETE FROM {table}")


@pytest.fixture
def lives() -> Iterator[Process]:
    found = Process("-m", "tests.transaction.rides")
    yield found
    found.close()


@pytest.fixture
def world(postgres: Database, local_stripe: Stripe, lives: Process) -> World:
    postgres.execute(SCHEMA)
    return World(postgres, local_stripe, lives)


STATEMENTS = ("claim", "INSERT", "COMMIT", "charge", "checkpoint", "complete")
NAMED = {f"{when} {what}" for when in ("before", "after") for what in STATEMENTS}
"""Points that docs/explain/exactly-once.md names; a request passes them all."""


def points_of(world: World) -> list[str]:
    """Every point that a request passes, found by passing them."""
    world.serve()
    assert world.request().status_code == 201
    world.check_once()
    reached = world.end()
    world.forget()
    assert reached.keys() >= NAMED
    return [f"{name}:{number}" for name, count in reached.items() for number in range(1, count + 1)]


@pytest.mark.parametrize("finisher", ["the client's retry", "the completer"])
def test_t3_killed_at_every_point_it_happens_once(world: World, finisher: str) -> None:
    points = points_of(world)
    assert len(points) > 30
    killed, completed = 0, 0
    for point in points:
        world.serve(point)
        with contextlib.suppress(httpx.TransportError):
            assert world.request().status_code == 201, point
            world.lives.say()  # the point is behind the answer, in what tidies up
        killed += world.lives.hear_json("exit")["exit"] == -signal.SIGKILL
        if finisher == "the completer":
            found = world.complete()
            assert found.completed == found.taken, point
            completed += found.completed
        world.serve()
        response = world.request_until_done()
        world.end()
        assert response.status_code == 201, (point, response.text)
        world.check_once()
        world.forget()
    assert killed > 30, points
    assert completed > 15 or finisher != "the completer"


@contextlib.contextmanager
def stopped(world: World, point: str) -> Iterator[list[httpx.Response]]:
    """A server that is stopped at a point, for as long as the block; then the response that it gives."""
    world.serve(point, stops=True)
    responses: list[httpx.Response] = []
    client = threading.Thread(target=lambda: responses.append(world.request()))
    client.start()
    world.lives.hear_json("stopped")
    yield responses
    os.kill(world.pid, signal.SIGCONT)
    client.join(SECONDS)
    world.end()


@pytest.mark.parametrize("point", ["before charge", "after charge", "before checkpoint", "before UPDATE"])
def test_t3_a_server_that_was_stopped_past_its_lease_commits_nothing(world: World, point: str) -> None:
    """A completer took over meanwhile, and what the zombie answers is the completer's result (C8)."""
    with stopped(world, point) as responses:
        assert world.complete().completed == 1
        world.check_once()
    assert (responses[0].status_code, responses[0].headers.get("Idempotency-Replayed")) == (201, "true")
    world.check_once()


def test_t3_a_zombie_in_its_first_phase_commits_nothing(world: World) -> None:
    """Nothing is listed yet; the client's retry, to another server, takes over."""

    async def retry() -> int:
        async with opened(world.life, Rides) as rides:
            wanted = Request("home", world.stripe.customer)
            return (await rides.request.run(world.key, wanted, scope=("rides", "ada"))).attempt

    with stopped(world, "before INSERT") as responses:
        assert world.complete() == Round()
        assert asyncio.run(retry()) == 2
        world.check_once()
    assert (responses[0].status_code, responses[0].headers.get("Idempotency-Replayed")) == (201, "true")
    world.check_once()


def test_t2_behind_its_fence_a_stopped_server_is_waited_for(world: World) -> None:
    """It holds the record's row, so nobody takes over, and nobody waits for a lock."""
    with stopped(world, "before COMMIT:2") as responses:
        found = world.complete()
        assert (found.taken, found.running) == (1, 1)
    assert (responses[0].status_code, responses[0].headers.get("Idempotency-Replayed")) == (201, None)
    world.check_once()


@pytest.fixture
def careless_stripe() -> Iterator[Stripe]:
    """One that ignores keys."""
    found = Stripe("--ignore-keys")
    yield found
    found.close()


def test_where_the_other_side_ignores_keys_a_charge_can_be_repeated(
    postgres: Database, careless_stripe: Stripe, lives: Process
) -> None:
    """What remains at-least-once: between a foreign call and its checkpoint only the key helps (C14)."""
    postgres.execute(SCHEMA)
    world = World(postgres, careless_stripe, lives)
    world.serve("after charge")
    with pytest.raises(httpx.TransportError):
        world.request()
    assert world.lives.hear_json("exit")["exit"] == -signal.SIGKILL
    assert world.complete().completed == 1
    ((ride,),) = world.rows("SELECT id::text FROM rides")
    assert len(careless_stripe.charges(ride)) == 2
