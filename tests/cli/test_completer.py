"""`retryproof completer`, over a SQLite file."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

MODULE = """
import contextlib
import sqlite3
import aiosqlite
from retryproof import AsyncIdempotency, Idempotency, current_operation
from retryproof.transaction import BlockingPhased, Phased

@contextlib.asynccontextmanager
async def connect():
    async with aiosqlite.connect("shop.db", isolation_level=None) as connection:
        yield connection

class Crash(BaseException):
    pass

def make():
    phased = Phased(AsyncIdempotency("sqlite:///shop.db"), connect=connect)

    @phased.function("order")
    async def order(crash: bool) -> str:
        async with current_operation().phase("reserve"):
            pass
        if crash and current_operation().attempt == 1:
            raise Crash
        return "done"

    return phased

@contextlib.asynccontextmanager
async def opened():
    phased = make()
    async with phased.engine:
        yield phased

@contextlib.contextmanager
def connect_blocking():
    with contextlib.closing(sqlite3.connect("shop.db", isolation_level=None)) as connection:
        yield connection

def blocking():
    phased = BlockingPhased(Idempotency("sqlite:///shop.db"), connect=connect_blocking)

    @phased.function("order")
    def order(crash: bool) -> str:
        with current_operation().phase("reserve"):
            pass
        return "done in a thread"

    return phased

nothing = 1
"""


@pytest.fixture
def abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `shop_<n>` with an operation that died between its phases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"shop_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    module: Any = __import__(name)

    async def die() -> None:
        async with module.opened() as phased:
            with contextlib.suppress(module.Crash):
                await phased.functions["order"].run("k", True, scope="acme")

    asyncio.run(die())
    with contextlib.closing(sqlite3.connect("shop.db", isolation_level=None)) as connection:
        connection.execute("UPDATE retryproof_operations SET lease_until = 0")
        connection.execute("UPDATE retryproof_phased SET due_at = 0")
    return name


@pytest.mark.parametrize("object", ["make", "opened", "blocking"])
def test_one_look_completes_what_was_abandoned(run: Run, abandoned: str, object: str) -> None:
    listed = run("completer", f"{abandoned}:{object}", "--list", "--json").document["operations"]
    assert [(each["function"], each["tries"], each["reason"]) for each in listed] == [("order", 0, None)]
    assert "order" in run("completer", f"{abandoned}:{object}", "--list").out
    ran = run("completer", f"{abandoned}:{object}", "--once", "--json")
    assert (ran.code, ran.document["completed"]) == (0, 1)
    assert run("completer", f"{abandoned}:{object}", "--list").out == "0 under way.\n"


def test_what_was_given_up_is_revived(run: Run, abandoned: str) -> None:
    with contextlib.closing(sqlite3.connect("shop.db", isolation_level=None)) as connection:
        connection.execute("UPDATE retryproof_phased SET due_at = 9000000000000000")
    assert run("completer", f"{abandoned}:make", "--once", "--json").document["taken"] == 0
    assert run("completer", f"{abandoned}:make", "--once", "--revive", "--json").document["completed"] == 1


def test_what_cannot_be_loaded_is_a_usage_error(run: Run, abandoned: str) -> None:
    for target in ("nothing", "no_such_module:phased", f"{abandoned}:missing", f"{abandoned}:nothing", "json:loads"):
        assert run("completer", target, "--once").code == 2


def test_sigterm_ends_it_in_an_orderly_way(abandoned: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retryproof.cli", "completer", f"{abandoned}:make", "--poll", "0.02", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db", isolation_level=None, timeout=10)) as connection:
        while connection.execute("SELECT count(*) FROM retryproof_phased").fetchone()[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert '"completed": 1' in out
