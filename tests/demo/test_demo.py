"""The demo, end to end: it shows what it says, counts what is in the ledger, and its commands work."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from retryproof.client import RetryPolicy
from retryproof.client.httpx import AsyncRetryTransport
from retryproof.demo import clients, process
from retryproof.demo.runner import run_half

ROWS = [
    "charges wanted",
    "charges made",
    "charged twice",
    "lost",
    "requests sent",
    "answers replayed",
    "faults of the network",
    "server kills (kill -9)",
    "of these between charge and answer",
]
# One run is shared by several, so they stay on one worker.
pytestmark = [pytest.mark.slow, pytest.mark.crash, pytest.mark.xdist_group("demo")]


def ledger_of(database: Path) -> Counter[str]:
    """How many charges each order has."""
    with closing(sqlite3.connect(database)) as connection:
        return Counter(order for (order,) in connection.execute("SELECT order_number FROM charges"))


@dataclass(frozen=True)
class Run:
    """One whole demo, as a user runs it: what it printed, and the ledgers that it left."""

    code: int
    text: str
    figures: dict[str, Any]
    without: Counter[str]
    layered: Counter[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    files = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "retryproof.demo", "--charges", "60", "--seed", "11", "--json"]
    done = subprocess.run(
        [*command, "--keep", str(files)],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    return Run(
        done.returncode,
        done.stderr,
        json.loads(done.stdout),
        ledger_of(files / "without" / "payments.db"),
        ledger_of(files / "with" / "payments.db"),
    )


def test_the_demo_succeeds_and_prints_a_table_and_what_it_means(run: Run) -> None:
    assert run.code == 0, run.text
    assert [row for row in ROWS if row not in run.text] == []
    assert "each of the 60 exactly once" in run.text


def test_with_the_layer_the_ledger_has_one_row_for_each_order(run: Run) -> None:
    assert run.layered == Counter(f"order-{number}" for number in range(1, 61))


def test_without_the_layer_the_ledger_has_some_orders_twice(run: Run) -> None:
    twice = [order for order, charges in run.without.items() if charges > 1]
    assert len(twice) > 0
    assert (run.figures["without"]["twice"], run.figures["without"]["made"]) == (len(twice), run.without.total())


def test_json_says_what_the_ledgers_say(run: Run) -> None:
    layered = run.figures["with"]
    assert (run.figures["ok"], run.figures["seed"]) == (True, 11)
    assert [layered[name] for name in ("wanted", "made", "twice", "lost")] == [60, 60, 0, 0]
    assert layered["sent"] > 60
    assert layered["kills"] >= layered["kills_after"] >= 1
    assert run.figures["without"]["replayed"] == 0


@pytest.mark.parametrize(
    ("idempotent", "moment", "booked", "charges"),
    [
        (True, "before", 0, 1),
        (True, "within", 0, 1),
        (True, "after", 1, 1),
        (False, "within", 0, 1),
        (False, "after", 1, 2),
    ],
    ids=["layered-before", "layered-within", "layered-after", "without-within", "without-after"],
)
async def test_a_retry_after_a_kill_around_the_charge_doubles_it_only_without_the_layer(
    tmp_path: Path, *, idempotent: bool, moment: process.Moment, booked: int, charges: int
) -> None:
    ports: asyncio.Queue[int] = asyncio.Queue()
    server = process.Server(tmp_path, idempotent=idempotent, moved=ports.put_nowait)
    living = asyncio.ensure_future(server.live([process.Death(moment, count=1)]))
    try:
        with pytest.raises(httpx.TransportError):
            await pay(await ports.get(), RetryPolicy(max_attempts=1))
        assert ledger_of(server.database).total() == booked
        response = await pay(await ports.get(), clients.PATIENT)
        assert response.status_code == 201
        assert server.kills == {moment: 1}
    finally:
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
    assert ledger_of(server.database) == {"1": charges}


async def pay(port: int, policy: RetryPolicy) -> httpx.Response:
    """The one charge of a test, always under the same key."""
    order = {"order": "1", "customer": "ada", "amount": 1200}
    async with httpx.AsyncClient(transport=AsyncRetryTransport(policy=policy), timeout=10) as client:
        return await client.post(f"http://127.0.0.1:{port}/charges", json=order, headers={"Idempotency-Key": "k1"})


async def test_a_server_that_ends_by_itself_ends_the_demo_with_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "payments.db").mkdir()  # where no ledger can be opened
    with pytest.raises(process.ServerFailed, match="unable to open database file"):
        await run_half(tmp_path, idempotent=True, charges=1, seconds=10, seed=1, watch=lambda done, kills: None)


def test_the_servers_end_when_their_input_does(tmp_path: Path) -> None:
    life = {"database": str(tmp_path / "payments.db"), "idempotent": False, "dies": "never", "count": 0}
    command = [sys.executable, "-m", "retryproof.demo.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as servers:
        assert servers.stdin is not None
        assert servers.stdout is not None
        servers.stdin.write(json.dumps(life) + "\n")
        servers.stdin.flush()
        port = json.loads(servers.stdout.readline())["port"]
        assert httpx.get(f"http://127.0.0.1:{port}/charges").json() == []
        servers.stdin.close()
        assert json.loads(servers.stdout.readline()) == {"exit": 0}
        assert servers.wait(timeout=10) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/charges")
