"""SIGTERM while operations run, on real servers (C10, H11): within the grace period what can end is stored; what is
left is said in the log.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from retryproof.core.record import State
from retryproof.http.asgi import DRAIN
from retryproof.stores import open_store
from tests.engine.support import in_thread
from tests.http.servers import SECONDS, exchange, read_all, request_bytes, split

APP = "tests.http.shutdown_app:app"
GRACE = 4


def _uvicorn(port: int) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(port), "--timeout-graceful-shutdown", str(GRACE)]
    return ["-m", "uvicorn", *options, APP]


def _hypercorn(port: int) -> list[str]:
    options = ["--bind", f"127.0.0.1:{port}", "--graceful-timeout", str(GRACE), "--error-logfile", "-"]
    return ["-m", "hypercorn", *options, APP]


def _granian(port: int) -> list[str]:
    options = ["--interface", "asgi", "--host", "127.0.0.1", "--port", str(port)]
    return ["-m", "granian", *options, "--workers-kill-timeout", str(GRACE + 15), APP]


def _gunicorn(port: int) -> list[str]:
    options = ["-w", "1", "-b", f"127.0.0.1:{port}", "--graceful-timeout", str(GRACE + 15)]
    return ["-m", "gunicorn", *options, "-k", "tests.http.shutdown_app.Worker", APP]


def _needs(make: Callable[[int], list[str]], *modules: str) -> Any:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    mark = pytest.mark.skipif(bool(missing), reason=f"pip install {' '.join(modules)}")
    return pytest.param(make, id=make.__name__.strip("_"), marks=mark)


SERVERS = [
    _needs(_uvicorn, "uvicorn"),
    _needs(_hypercorn, "hypercorn"),
    _needs(_granian, "granian"),
    _needs(_gunicorn, "gunicorn", "uvicorn_worker"),
]
SAY_GOODBYE = [server for server in SERVERS if server.id != "granian"]
"""Granian kills a worker whose requests go on, without `lifespan.shutdown`."""


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    port: int
    begun: Path
    log: Path
    url: str

    def charge(self, key: str) -> socket.socket:
        """A request whose handler runs."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=2 * SECONDS)
        connection.sendall(request_bytes(key=key))
        until = time.monotonic() + SECONDS
        while not self.begun.exists():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)
        return connection

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(GRACE + DRAIN + SECONDS)

    def states(self) -> list[State]:
        store = open_store(self.url)
        try:
            return [record.state for record in store.scan()]
        finally:
            store.close()


@pytest.fixture(params=SERVERS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[float], Serving]]:
    begun: list[Serving] = []

    def start(seconds: float) -> Serving:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        url, log = f"sqlite:///{tmp_path / 'keys.db'}", tmp_path / "log"
        given = {"SHUTDOWN_STORE": url, "SHUTDOWN_SECONDS": str(seconds), "SHUTDOWN_BEGUN": str(tmp_path / "begun")}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *request.param(port)], env={**os.environ, **given}, stdout=out, stderr=out
            )
        serving = Serving(process, port, tmp_path / "begun", log, url)
        begun.append(serving)
        _wait_for(serving)
        return serving

    yield start
    for serving in begun:
        if serving.process.poll() is None:
            serving.process.kill()
            serving.process.wait()


pytestmark = pytest.mark.timeout(90)


def _wait_for(serving: Serving) -> None:
    until = time.monotonic() + 2 * SECONDS
    while True:
        with suppress(OSError):
            if exchange(serving.port, b"GET /ready HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"):
                return
        assert time.monotonic() < until, serving.log.read_text()
        time.sleep(0.05)


def test_what_ends_within_the_grace_period_is_stored_and_answered(start: Callable[[float], Serving]) -> None:
    serving = start(2.0)
    with serving.charge(str(uuid4())) as connection:
        answer = in_thread(lambda: read_all(connection))
        serving.stop()
        received = answer.result(SECONDS)
    assert serving.states() == [State.COMPLETED], serving.log.read_text()
    assert split(received)[0] == 201


def test_h11_what_runs_without_its_client_ends_within_the_grace_period(start: Callable[[float], Serving]) -> None:
    serving = start(2.0)
    serving.charge(str(uuid4())).close()
    threading.Event().wait(0.3)  # the server has noticed
    serving.stop()
    assert serving.states() == [State.COMPLETED], serving.log.read_text()


@pytest.mark.parametrize("start", SAY_GOODBYE, indirect=True)
def test_what_is_left_at_the_end_of_the_grace_period_is_said_in_the_log(start: Callable[[float], Serving]) -> None:
    serving = start(60.0)
    with serving.charge(str(uuid4())):
        store = open_store(serving.url)
        [record] = store.scan()
        store.close()
        serving.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE + DRAIN + SECONDS
        while record.id.hex()[:16] not in serving.log.read_text():
            assert time.monotonic() < until, serving.log.read_text()
            time.sleep(0.1)
    assert serving.states() == [State.IN_PROGRESS]
