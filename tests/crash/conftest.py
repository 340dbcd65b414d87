"""Processes to kill, and the stores that outlive them."""

from __future__ import annotations

import json
import queue
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retryproof.stores.sql.migrate import migrate

SECONDS = 20.0
"""How long a process may take for anything before it counts as hung."""
LEASE = 0.5
ROOT = Path(__file__).parents[2]


class Lives:
    """One process after the other, each a fork of one that has imported everything."""

    def __init__(self, module: str = "tests.crash.lives") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        self._heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self._living = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard.put(json.loads(line))

    def begin(self, life: dict[str, Any]) -> None:
        """Start a life; it says what happens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(life).encode() + b"\n")
        self._process.stdin.flush()
        self._living = True

    def hear(self) -> dict[str, Any]:
        """The next thing that is said; fails the test when nothing is."""
        said = self._heard.get(timeout=SECONDS)
        self._living = self._living and "exit" not in said
        return said

    def end(self) -> int:
        """End a server's life in an orderly way; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self.ended()

    def ended(self) -> int:
        """How a life ended that ends by itself."""
        while "exit" not in (said := self.hear()):
            pass
        code: int = said["exit"]
        return code

    def clear(self) -> None:
        """End what a failed test has left alive."""
        if self._living:
            self.end()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(SECONDS)
        self._process.stdout.close()


@dataclass
class World:
    """A store and a ledger that outlive the processes, and one operation's key."""

    lives: Lives
    store: str
    ledger: Path
    key: str = field(default_factory=lambda: str(uuid.uuid4()))
    policy: dict[str, Any] = field(default_factory=dict)

    def life(self, kind: str, crash: str = "") -> dict[str, Any]:
        policy = {"lease": LEASE, **self.policy}
        given = {"store": self.store, "ledger": str(self.ledger), "key": self.key}
        return {"kind": kind, "crash": crash, "policy": policy, **given}

    @property
    def charges(self) -> list[str]:
        """The ids of what was charged for this key."""
        return [id for (id,) in self._rows("SELECT id FROM charges WHERE reference = ?")]

    @property
    def attempts(self) -> list[int]:
        """The attempts whose handler ran, in order."""
        return [attempt for (attempt,) in self._rows("SELECT attempt FROM runs WHERE reference = ? ORDER BY rowid")]

    def _rows(self, sql: str) -> list[Any]:
        connection = sqlite3.connect(self.ledger, timeout=10.0)
        try:
            return connection.execute(sql, (self.key,)).fetchall()
        finally:
            connection.close()


@pytest.fixture(scope="session")
def process() -> Iterator[Lives]:
    lives = Lives()
    yield lives
    lives.close()


@pytest.fixture
def lives(process: Lives) -> Iterator[Lives]:
    """Lives of this test's own."""
    yield process
    process.clear()


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def world(request: pytest.FixtureRequest, lives: Lives, tmp_path: Path) -> World:
    """A world for each store that outlives its users."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'keys.db'}"
    else:
        url = request.getfixturevalue(f"{request.param}_url")
    if request.param == "postgres":
        migrate(url)
    return World(lives, url, tmp_path / "ledger.db")
