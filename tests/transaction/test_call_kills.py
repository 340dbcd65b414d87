"""A process killed around a foreign call: what a later attempt calls, and under which key (C13, C14, T3).

The other side honours keys: the first answer under a key is everybody's. It counts what it did, not what it was asked.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.transaction.receivers import Request, http_receiver
from tests.transaction.support import Database

pytestmark = [pytest.mark.crash, pytest.mark.timeout(60)]
ROOT = Path(__file__).parents[2]


@dataclass
class Bank:
    """Somebody else's API. caller: the process that is killed by its next call, once the bank has done it."""

    url: str = ""
    caller: "subprocess.Popen[str] | None" = None
    calls: list[str] = field(default_factory=list)
    charges: dict[str, str] = field(default_factory=dict)

    def answer(self, request: Request) -> tuple[int, dict[str, str]]:
        key = request.headers["idempotency-key"]
        self.calls.append(key)
        charge = self.charges.setdefault(key, f"ch_{len(self.charges) + 1}")
        if self.caller is not None:
            self.caller.kill()
        return 201, {"x-charge": charge}


@pytest.fixture
def bank() -> Iterator[Bank]:
    with http_receiver() as receiver:
        found = Bank(receiver.url)
        receiver.answer = found.answer
        yield found


def start(mode: str, keys: str, database: Database, bank: Bank, point: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.transaction.calling", mode, keys, database.store, bank.url, point]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill(mode: str, keys: str, database: Database, bank: Bank, point: str) -> None:
    """An attempt that dies at the point."""
    process = start(mode, keys, database, bank, "" if point == "in the call" else point)
    if point == "in the call":
        bank.caller = process
    process.communicate(timeout=30)
    bank.caller = None
    assert process.returncode == -signal.SIGKILL


def finish(mode: str, keys: str, database: Database, bank: Bank) -> str:
    """What the operation comes to; the dead attempt's lease has to end first."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        process = start(mode, keys, database, bank)
        said, _ = process.communicate(timeout=30)
        if process.returncode == 0:
            return said.strip()
    raise AssertionError("no answer")


CALLS = {"before the call": 1, "in the call": 2, "after the call": 2}
"""Where the process dies, and how often the bank is called in the end."""


@pytest.mark.parametrize("mode", ["plain", "transactional", "phases"])
@pytest.mark.parametrize("point", CALLS)
def test_c13_a_foreign_call_is_repeated_under_its_derived_key(
    postgres: Database, bank: Bank, mode: str, point: str
) -> None:
    kill(mode, "derived", postgres, bank, point)
    assert postgres.charges() == ([1] if mode == "phases" else [])
    assert finish(mode, "derived", postgres, bank) == "ch_1"
    assert len(bank.calls) == CALLS[point]
    assert len(bank.charges) == 1
    assert postgres.charges() == ([] if mode == "plain" else [1])


@pytest.mark.parametrize("mode", ["plain", "transactional"])
@pytest.mark.parametrize("point", ["in the call", "after the call"])
def test_under_a_key_that_is_not_derived_it_is_another_call(
    postgres: Database, bank: Bank, mode: str, point: str
) -> None:
    """What remains, and why keys are to be derived."""
    kill(mode, "random", postgres, bank, point)
    assert finish(mode, "random", postgres, bank) == "ch_2"
    assert len(bank.charges) == 2


def test_c14_a_call_that_was_noted_is_not_repeated(postgres: Database, bank: Bank) -> None:
    kill("phases", "random", postgres, bank, "after it is noted")
    assert finish("phases", "random", postgres, bank) == "ch_1"
    assert len(bank.calls) == 1
