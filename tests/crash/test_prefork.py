"""One server of several processes over one store, as `uvicorn --workers 2`, or `gunicorn --preload`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from retryproof.stores.sql.migrate import migrate
from tests.crash.conftest import ROOT, SECONDS
from tests.http.servers import exchange, request_bytes, split

pytestmark = [pytest.mark.crash, pytest.mark.slow]

TWINS = 50
KEYS = 4


@contextmanager
def two_workers(store: str, effects: Path, *, preload: bool) -> Iterator[int]:
    """The port of a server of two processes, of which both serve. preload: one that used the store forks them."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        listener.set_inheritable(True)
        port, fd = listener.getsockname()[1], listener.fileno()
        command = ["uvicorn", "--factory", "tests.crash.prefork_app:create_app", "--workers", "2", "--fd", str(fd)]
        command = ["tests.crash.prefork_app", str(fd)] if preload else [*command, "--log-level", "warning"]
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, "PREFORK_STORE": store, "PREFORK_EFFECTS": str(effects)},
            pass_fds=[fd],
        )
        try:
            pids: set[bytes] = set()
            deadline = time.monotonic() + SECONDS
            while len(pids) < 2:
                assert time.monotonic() < deadline
                pids.add(split(exchange(port, b"GET /pid HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"))[2])
            yield port
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.parametrize("preload", [False, True], ids=["started", "forked"])
@pytest.mark.parametrize("kind", ["sqlite", "redis", "postgres", "an engine on psycopg", "an engine on asyncpg"])
def test_c1_twins_at_two_processes_have_one_effect(
    kind: str, preload: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server = "redis" if kind == "redis" else "postgres"
    store = f"sqlite:///{tmp_path / 'keys.db'}" if kind == "sqlite" else request.getfixturevalue(f"{server}_url")
    if kind not in ("sqlite", "redis"):
        migrate(store)
    if kind.startswith("an engine"):
        store = store.replace("://", f"+{kind.rpartition(' ')[2]}://", 1)
    keys, effects = [str(uuid4()) for _ in range(KEYS)], tmp_path / "effects"
    with two_workers(store, effects, preload=preload) as port, ThreadPoolExecutor(TWINS) as pool:
        for key in keys:
            twins = [request_bytes(key=key)] * TWINS
            answers = [split(answer) for answer in pool.map(lambda twin: exchange(port, twin), twins)]
            assert {status for status, _, _ in answers} <= {201, 409}
            assert {json.loads(body)["code"] for status, _, body in answers if status == 409} <= {"in-progress"}
            results = {body for status, _, body in answers if status == 201}
            assert len(results) == 1
            status, headers, body = split(exchange(port, request_bytes(key=key)))
            assert (status, headers[b"idempotency-replayed"], {body}) == (201, [b"true"], results)
    charged = Counter(line.split()[0] for line in effects.read_text().splitlines())
    assert charged == dict.fromkeys([f'"{effects}"', *keys] if preload else keys, 1)
