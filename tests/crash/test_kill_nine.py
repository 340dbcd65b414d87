"""A process is killed at every point of an operation; another one, with the same store, is asked again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.crash.conftest import LEASE, Lives, World
from tests.http.servers import exchange, request_bytes, split

pytestmark = [pytest.mark.crash, pytest.mark.quiet]

SLACK = 2.0
"""Seconds beyond the lease that a recovery may take on busy machines."""
POINTS: dict[str, list[int]] = {
    "before claim": [1],
    "after claim": [2],
    "before effect": [1, 2],
    "after effect": [1, 2],
    "before complete": [1, 2],
    "after complete": [1],
}
"""Where the process dies, in order: the attempts whose handlers have run in the end."""


def post(port: int, world: World) -> tuple[int, dict[bytes, list[bytes]], Any]:
    """One request; the status is 0 when the server died."""
    body = json.dumps({"reference": world.key}).encode()
    answer = exchange(port, request_bytes(key=world.key, body=body, headers=("content-type: application/json",)))
    if not answer:
        return 0, {}, None
    status, headers, content = split(answer)
    return status, headers, json.loads(content)


def post_until_answered(port: int, world: World) -> tuple[dict[bytes, list[bytes]], Any]:
    """Ask again with the same key for as long as the answer is "in progress"; within the lease it is the result."""
    began = time.monotonic()
    while True:
        status, headers, content = post(port, world)
        if status == 201:
            return headers, content
        assert (status, content["code"]) == (409, "in-progress")
        assert time.monotonic() - began < LEASE + SLACK
        time.sleep(0.02)  # the client's back-off


@pytest.mark.parametrize("point", POINTS)
def test_c6_a_killed_server_is_recovered_from_within_the_lease(world: World, point: str) -> None:
    world.lives.begin(world.life("http", crash=point))
    assert post(world.lives.hear()["port"], world)[0] == 0
    assert world.lives.ended() == -signal.SIGKILL

    world.lives.begin(world.life("http"))
    port = world.lives.hear()["port"]
    headers, content = post_until_answered(port, world)
    assert world.charges == [content["id"]]
    assert world.attempts == POINTS[point]
    assert (b"idempotency-replayed" in headers) == (point == "after complete")

    status, headers, replay = post(port, world)
    assert (status, headers[b"idempotency-replayed"], replay) == (201, [b"true"], content)
    assert world.lives.end() == 0
    assert world.charges == [content["id"]]


@pytest.mark.parametrize("point", POINTS)
def test_c6_a_killed_function_is_recovered_from_within_the_lease(world: World, point: str) -> None:
    world.lives.begin(world.life("function", crash=point))
    assert world.lives.ended() == -signal.SIGKILL

    began = time.monotonic()
    while "value" not in (outcome := run(world)):
        assert outcome == {"error": "InProgress"}
        assert time.monotonic() - began < LEASE + SLACK
    assert world.charges == [outcome["value"]["id"]]
    assert world.attempts == POINTS[point]
    assert outcome["replayed"] == (point == "after complete")
    assert run(world) == {**outcome, "replayed": True}
    assert world.charges == [outcome["value"]["id"]]


def run(world: World) -> dict[str, Any]:
    """One call in a process of its own."""
    world.lives.begin(world.life("function"))
    said = world.lives.hear()
    assert world.lives.ended() == 0
    return said


@pytest.mark.parametrize("deaths", [2])
def test_c13_an_operation_that_dies_again_and_again_keeps_its_derived_ids(world: World, deaths: int) -> None:
    for death in range(deaths):
        world.lives.begin(world.life("http", crash="after effect"))
        port = world.lives.hear()["port"]
        while (status := post(port, world)[0]) != 0:
            assert status == 409
            time.sleep(0.02)  # the client's back-off
        assert world.lives.ended() == -signal.SIGKILL
        assert world.attempts == list(range(1, death + 2))
    world.lives.begin(world.life("http"))
    _, content = post_until_answered(world.lives.hear()["port"], world)
    assert world.charges == [content["id"]]
    assert content["attempt"] == deaths + 1
    assert world.lives.end() == 0


def test_c15_an_operation_that_kills_its_process_is_refused_in_the_end(world: World) -> None:
    world.policy = {"max_attempts": 2}
    for _ in range(2):
        world.lives.begin(world.life("http", crash="after effect"))
        port = world.lives.hear()["port"]
        while post(port, world)[0] != 0:
            time.sleep(0.02)  # the client's back-off
        assert world.lives.ended() == -signal.SIGKILL
    world.lives.begin(world.life("http"))
    port = world.lives.hear()["port"]
    began = time.monotonic()
    while (answer := post(port, world))[2]["code"] == "in-progress":
        assert time.monotonic() - began < LEASE + SLACK
        time.sleep(0.02)  # the client's back-off
    status, headers, content = answer
    assert (status, content["code"], b"retry-after" in headers) == (409, "outcome-unknown", False)
    assert len(world.charges) == 1
    assert world.lives.end() == 0


def test_c7_refuse_leaves_what_died_to_an_operator(world: World) -> None:
    world.policy = {"on_abandoned": "refuse"}
    world.lives.begin(world.life("http", crash="after effect"))
    assert post(world.lives.hear()["port"], world)[0] == 0
    assert world.lives.ended() == -signal.SIGKILL
    world.lives.begin(world.life("http"))
    port = world.lives.hear()["port"]
    began = time.monotonic()
    while (answer := post(port, world))[2]["code"] == "in-progress":
        assert time.monotonic() - began < LEASE + SLACK
        time.sleep(0.02)  # the client's back-off
    assert (answer[0], answer[2]["code"]) == (409, "outcome-unknown")
    assert world.attempts == [1]
    assert world.lives.end() == 0


@pytest.mark.parametrize(("point", "charges"), [("after claim", 1), ("after effect", 2), ("after complete", 2)])
def test_c1_memory_dies_with_its_process(lives: Lives, tmp_path: Path, point: str, charges: int) -> None:
    """As its page says: what a process knew is gone, and a retry after its end is a first request."""
    world = World(lives, "memory://", tmp_path / "ledger.db")
    lives.begin(world.life("http", crash=point))
    assert post(lives.hear()["port"], world)[0] == 0
    assert lives.ended() == -signal.SIGKILL
    lives.begin(world.life("http"))
    status, headers, content = post(lives.hear()["port"], world)
    assert (status, content["attempt"], b"idempotency-replayed" in headers) == (201, 1, False)
    assert len(world.charges) == charges
    assert lives.end() == 0
