"""A store that was used before the process forked: the child has a store of its own, and both exclude each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from retryproof import Idempotency
from retryproof.stores.sql.migrate import migrate
from tests.crash.conftest import ROOT, SECONDS
from tests.crash.forking import run_all

pytestmark = [pytest.mark.crash, pytest.mark.slow]

KEYS = [f"key-{number}" for number in range(40)]


class Family:
    """A parent and its children over one store, and what they did."""

    def __init__(self, store: str, folder: Path, scope: str) -> None:
        self.store = store
        self.scope = scope
        self.effects = folder / "effects"

    def live(self, **life: Any) -> list[dict[str, str]]:
        """Have them live, look at the store when the children have done their part; what each child met."""
        given = {"store": self.store, "effects": str(self.effects), "scope": self.scope, "keys": KEYS, **life}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.forking", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        with process:
            try:
                assert process.stdout is not None
                said = [json.loads(process.stdout.readline()) for _ in range(life.get("children", 1))]
                if not any(said):
                    self.repeat_all()
                out, err = process.communicate(timeout=SECONDS)
            finally:
                process.kill()  # its children end with it
        assert (out, process.returncode) == ("", 0)
        assert all(line.startswith("store_error ") for line in err.splitlines()), err
        return said

    def repeat_all(self) -> None:
        """Another process comes with the same keys."""
        for _ in range(2):  # it opens and closes the file, as `retryproof keys list` does
            engine = Idempotency(self.store)
            met = run_all(engine, ["before", "early", *KEYS], self.effects, self.scope)
            engine.close()
            assert met == {}

    def effects_by_key(self) -> dict[str, int]:
        return Counter(line.split()[0] for line in self.effects.read_text().splitlines())


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def family(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Family:
    if request.param == "sqlite":
        return Family(f"sqlite:///{tmp_path / 'keys.db'}", tmp_path, unique)
    url = request.getfixturevalue(f"{request.param}_url")
    if request.param == "postgres":
        migrate(url)
    return Family(url, tmp_path, unique)


@pytest.fixture
def on_sqlite(tmp_path: Path, unique: str) -> Family:
    return Family(f"sqlite:///{tmp_path / 'keys.db'}", tmp_path, unique)


@pytest.mark.parametrize("parent", ["closes", "ends", "works"])
def test_c1_a_child_excludes_everybody_whatever_its_parent_does(family: Family, parent: str) -> None:
    assert family.live(parent=parent) == [{}]
    assert family.effects_by_key() == dict.fromkeys(["before", "early", *KEYS], 1)


@pytest.mark.parametrize("parent", ["closes", "works"])
def test_c1_it_holds_beside_busy_threads(on_sqlite: Family, parent: str) -> None:
    """The fork comes while threads of the parent are in the store, and waits for the end of a call."""
    assert on_sqlite.live(parent=parent, threads=4, children=6) == [{}] * 6
    assert set(on_sqlite.effects_by_key().values()) == {1}


def test_c1_a_child_refuses_a_file_that_the_application_had_open(on_sqlite: Family) -> None:
    """In the store, and under an outbox on a connection from before the fork or on one from after it."""
    (met,) = on_sqlite.live(parent="works", others=True)
    assert set(met) == {"early", *KEYS, "outbox", "outbox, connected here"}
    assert all("was open when this process was forked" in error for error in met.values())
    assert on_sqlite.effects_by_key() == dict.fromkeys(["before", *KEYS], 1)


def test_c1_a_child_refuses_a_file_that_was_in_mid_transaction_for_too_long(on_sqlite: Family) -> None:
    """The parent forks nevertheless, and goes on as if nothing had been."""
    (met,) = on_sqlite.live(parent="works", locked=True)
    assert set(met) == {"early", *KEYS}
    assert all("was open when this process was forked" in error for error in met.values())
    assert on_sqlite.effects_by_key() == dict.fromkeys(["before", *KEYS], 1)


def test_what_a_child_inherits_is_never_closed_in_it() -> None:
    """Neither by the garbage collector nor by the interpreter's end: a driver would speak on the parent's sockets."""
    program = """
import gc, os, sys, threading
from retryproof import Idempotency
from retryproof.stores import keeper
from retryproof.stores.memory import MemoryStore

class Told(MemoryStore):
    def __del__(self, pid=os.getpid(), getpid=os.getpid, write=os.write):
        write(1, b"parent " if getpid() == pid else b"child ")

keeper.IDLE_SECONDS = 0.05
engine = Idempotency(Told())
engine.run("k", lambda: 1, scope="s")
for thread in set(threading.enumerate()) - {threading.current_thread()}:
    thread.join()
if os.fork() == 0:
    del engine
    gc.collect()
    sys.exit(0)
os.wait()
del engine
gc.collect()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["parent"], "")
