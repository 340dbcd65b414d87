"""The servers behind the other tests: found in the documented order, and crashed without losing what they promised."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from servers import SERVICES, Instance, Missing, NoAnswer, RunDirectory, Unanswered, resolve

PROJECT = Path(__file__).resolve().parents[2]


def services(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -S leaves the environment's packages out: the script has to run before there are any.
    return subprocess.run(
        [sys.executable, "-S", PROJECT / "scripts" / "services", *arguments],
        env={"PATH": os.defpath, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture(params=sorted(SERVICES))
def private(request: pytest.FixtureRequest) -> Callable[..., Instance]:
    start: Callable[..., Instance] = request.getfixturevalue(f"private_{request.param}")
    return start


@pytest.mark.crash
def test_a_private_server_survives_kill_and_restart_at_the_same_url(private: Callable[..., Instance]) -> None:
    server = private()
    first = (server.pid, server.url)
    server.kill()
    assert not server.alive()
    with pytest.raises(NoAnswer):
        server.service.probe(server.url)
    server.restart()
    assert server.service.probe(server.url) == server.answer
    assert (server.pid != first[0], server.url) == (True, first[1])


@pytest.mark.crash
def test_a_paused_server_accepts_connections_and_says_nothing(private: Callable[..., Instance]) -> None:
    server = private()
    server.pause()
    with pytest.raises(NoAnswer, match="timed out"):
        server.service.probe(server.url)
    server.resume()
    assert server.service.probe(server.url) == server.answer


def test_an_environment_variable_that_does_not_answer_is_an_error(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("RETRYPROOF_TEST_REDIS_URL", f"redis://:secret@127.0.0.1:{taken.getsockname()[1]}/0")
        with pytest.raises(Unanswered, match="RETRYPROOF_TEST_REDIS_URL") as caught:
            resolve("redis", run)
    assert "secret" not in str(caught.value)


def test_a_valkey_is_not_taken_for_redis(run: RunDirectory, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRYPROOF_TEST_REDIS_URL", valkey_url)
    with pytest.raises(Unanswered, match="wants Redis, but Valkey answers"):
        resolve("redis", run)


def test_an_open_port_that_speaks_another_protocol_does_not_answer(postgres_url: str, redis_url: str) -> None:
    with pytest.raises(NoAnswer):
        SERVICES["redis"].probe(postgres_url.replace("postgresql", "redis"))
    with pytest.raises(NoAnswer):
        SERVICES["postgres"].probe(redis_url.replace("redis", "postgresql"))


def test_a_missing_program_is_named_with_what_to_install(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Missing, match="apt-get install redis-server"):
        run.start(SERVICES["redis"])


def test_what_a_run_directory_started_is_stopped_by_a_later_process(run: RunDirectory) -> None:
    try:
        shared = run.shared(SERVICES["valkey"])
    except Missing as error:
        pytest.skip(str(error))
    again = RunDirectory(run.path)
    assert again.shared(SERVICES["valkey"]).pid == shared.pid
    assert [instance.pid for instance in again.clear()] == [shared.pid]
    assert not shared.alive()


def test_status_says_of_each_server_what_it_is_without_any_package_installed() -> None:
    done = services("status")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SERVICES), done.stderr


def test_an_unknown_server_is_refused_with_the_names_there_are() -> None:
    done = services("up", "oracle")
    assert done.returncode == 2
    assert "redis, valkey, postgres" in done.stderr
