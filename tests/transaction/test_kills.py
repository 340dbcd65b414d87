"""Processes killed at each point of a transactional operation, or stopped past their lease and resumed (T1, I8)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.transaction.support import Database

pytestmark = [pytest.mark.crash, pytest.mark.timeout(60)]
PROGRAM = Path(__file__).with_name("charging.py")
BEFORE = ["before join", "before work", "after work", "after complete"]
AFTER = ["after commit", "before answer"]


def start(database: Database, point: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, PROGRAM, database.store, point], stdout=subprocess.PIPE, text=True)


def answer(database: Database) -> str:
    """Ask until there is one: the dead attempt's lease has to end first."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        said, _ = (process := start(database, "")).communicate(timeout=20)
        if process.returncode == 0:
            return said.strip()
    raise AssertionError("no answer")


@pytest.mark.parametrize("point", BEFORE + AFTER)
def test_i8_a_kill_leaves_work_and_result_or_neither(
    postgres: Database, point: str, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(postgres, point)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    assert postgres.charges() == ([] if point in BEFORE else [1])
    expected = "charged by attempt 2 False" if point in BEFORE else "charged by attempt 1 True"
    assert answer(postgres) == expected
    assert postgres.charges() == [1]


@pytest.mark.parametrize("point", ["before work", "after work"])
def test_t1_a_zombie_past_its_lease_cannot_commit(
    postgres: Database, point: str, capfd: pytest.CaptureFixture[str]
) -> None:
    zombie = start(postgres, f"stop {point}")
    assert zombie.stdout is not None
    assert zombie.stdout.readline() == "stopped\n"
    assert answer(postgres) == "charged by attempt 2 False"
    os.kill(zombie.pid, signal.SIGCONT)
    said, _ = zombie.communicate(timeout=20)
    assert (zombie.returncode, said) == (0, "charged by attempt 2 True\n")
    assert postgres.charges() == [1]
