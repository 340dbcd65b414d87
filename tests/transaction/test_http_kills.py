"""Servers killed at each point of a request that works in a transaction, or stopped past its lease (T1, I8)."""

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.crash.conftest import Lives
from tests.http.servers import exchange, request_bytes, split
from tests.transaction.support import Database

pytestmark = [pytest.mark.crash, pytest.mark.timeout(60)]

LEASE = 0.5
SECONDS = 15.0
DRIVERS = ["psycopg", "psycopg-blocking", "asyncpg", "sqlalchemy-asyncpg", "sqlite3", "aiosqlite"]
POSTGRES = DRIVERS[:4]
NOTHING = [
    "before claim",
    "after claim",
    "before join",
    "before work",
    "after work",
    "before complete",
    "before commit",
]
EVERYTHING = ["after commit", "before answer", "within answer"]


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Lives, Lives]]:
    """Two lines of servers."""
    one, other = (Lives("tests.transaction.http_lives") for _ in range(2))
    yield one, other
    one.close()
    other.close()


@dataclass
class World:
    """One operation's key, and where its servers keep what they do."""

    lives: Lives
    rival: Lives
    database: Database
    driver: str
    key: str

    def begin(self, *, crash: str = "", stop: str = "", lives: Lives | None = None) -> int:
        """Start a server; its port."""
        lives = lives or self.lives
        life = {"store": self.database.store, "table": "charges", "driver": self.driver}
        lives.begin({**life, "policy": {"lease": LEASE}, "crash": crash, "stop": stop})
        port: int = lives.hear()["port"]
        return port

    def post(self, port: int) -> tuple[int, bool, Any]:
        """One request: status, whether it is a replay, and what it says; the status is 0 without a whole answer."""
        answer = exchange(port, request_bytes(key=self.key))
        if b"\r\n\r\n" not in answer:
            return 0, False, None
        status, headers, content = split(answer)
        if len(content) < int(headers[b"content-length"][0]):
            return 0, False, None
        return status, b"idempotency-replayed" in headers, json.loads(content)

    def post_until_answered(self, port: int) -> tuple[int, bool, Any]:
        """Ask with the same key for as long as the answer is to ask again."""
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self.post(port)
            if answer[0] == 201:
                return answer
            assert (answer[0], answer[2]["code"]) == (409, "in-progress")
            assert time.monotonic() < deadline
            time.sleep(0.02)  # the client's back-off


@pytest.fixture(params=DRIVERS)
def world(request: pytest.FixtureRequest, processes: tuple[Lives, Lives]) -> Iterator[World]:
    """A world for each library."""
    database = request.getfixturevalue("postgres" if request.param in POSTGRES else "sqlite")
    yield World(*processes, database, request.param, str(uuid.uuid4()))
    for lives in processes:
        lives.clear()


@pytest.mark.parametrize("point", NOTHING + EVERYTHING)
def test_i8_a_killed_server_leaves_effect_and_response_or_neither(world: World, point: str) -> None:
    assert world.post(world.begin(crash=point))[0] == 0
    assert world.lives.ended() == -signal.SIGKILL
    assert world.database.charges() == ([] if point in NOTHING else [1])

    port = world.begin()
    attempt = 2 if point in NOTHING[1:] else 1
    assert world.post_until_answered(port) == (201, point in EVERYTHING, {"attempt": attempt})
    assert world.database.charges() == [attempt]
    assert world.post(port) == (201, True, {"attempt": attempt})
    assert world.lives.end() == 0
    assert world.database.charges() == [attempt]


@pytest.mark.parametrize("world", POSTGRES, indirect=True)
@pytest.mark.parametrize("point", ["before join", "after work"])
def test_t1_a_server_that_slept_past_its_lease_answers_for_the_one_that_took_over(world: World, point: str) -> None:
    answers: list[tuple[int, bool, Any]] = []
    zombie = world.begin(stop=point)
    client = threading.Thread(target=lambda: answers.append(world.post(zombie)))
    client.start()
    asleep = world.lives.hear()["stopped"]
    try:
        port = world.begin(lives=world.rival)
        assert world.post_until_answered(port) == (201, False, {"attempt": 2})
    finally:
        os.kill(asleep, signal.SIGCONT)
    client.join(SECONDS)
    assert answers == [(201, True, {"attempt": 2})]
    assert world.database.charges() == [2]
    assert world.lives.end() == 0
    assert world.rival.end() == 0


@pytest.mark.parametrize("world", POSTGRES, indirect=True)
def test_t1_a_server_that_sleeps_before_its_commit_holds_its_record_and_wins(world: World) -> None:
    """It has the record's row: nobody takes over from it, and nobody waits for it."""
    answers: list[tuple[int, bool, Any]] = []
    zombie = world.begin(stop="before commit")
    client = threading.Thread(target=lambda: answers.append(world.post(zombie)))
    client.start()
    asleep = world.lives.hear()["stopped"]
    try:
        port = world.begin(lives=world.rival)
        until = time.monotonic() + 2 * LEASE
        while time.monotonic() < until:
            status, _, content = world.post(port)
            assert (status, content["code"]) == (409, "in-progress")
    finally:
        os.kill(asleep, signal.SIGCONT)
    client.join(SECONDS)
    assert answers == [(201, False, {"attempt": 1})]
    assert world.post(port) == (201, True, {"attempt": 1})
    assert world.database.charges() == [1]
    assert world.lives.end() == 0
    assert world.rival.end() == 0
