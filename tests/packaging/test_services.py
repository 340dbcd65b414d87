"""The servers behind the other tests: found in the documented order, and crashed without losing what they promised."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import pymysql
import pytest
import redis

from servers import SERVICES, Instance, Missing, NoAnswer, RunDirectory, Unanswered, plan, resolve

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


def test_the_standard_port_is_used_where_the_right_server_answers(
    run: RunDirectory, private: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = private()
    monkeypatch.delenv(server.service.variable, raising=False)
    monkeypatch.setitem(SERVICES, server.name, replace(server.service, port=server.port))
    found = resolve(server.name, run)
    assert (found.url, found.origin, found.answer) == (server.url, "standard port", server.answer)
    assert run.instances() == []


def test_a_standard_port_with_another_server_is_passed_over(
    run: RunDirectory, private_valkey: Callable[..., Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = private_valkey()
    monkeypatch.delenv("RETRYPROOF_TEST_REDIS_URL", raising=False)
    monkeypatch.setitem(SERVICES, "redis", replace(SERVICES["redis"], port=other.port))
    monkeypatch.setattr("servers.order.RunDirectory.of_project", lambda: run)
    try:
        assert resolve("redis", run).origin.startswith("private")
    except Missing as error:
        pytest.skip(str(error))
    finally:
        run.clear()


def test_a_redis_with_a_password_answers_only_to_it(private_redis: Callable[..., Instance]) -> None:
    server = private_redis()
    with redis.Redis(port=server.port) as client:
        client.config_set("requirepass", "open sesame")
    with pytest.raises(NoAnswer, match="NOAUTH"):
        server.service.probe(server.url)
    with_password = server.url.replace("127.0.0.1", ":open%20sesame@127.0.0.1")
    assert server.service.probe(with_password) == server.answer


def test_a_postgres_with_a_password_answers_only_to_it(private_postgres: Callable[..., Instance]) -> None:
    server = private_postgres()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("ALTER USER postgres PASSWORD 'sesame'")
    (server.directory / "data" / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    os.kill(server.pid, signal.SIGHUP)
    assert "asks postgres for a password" in refusal(server)
    with_password = server.url.replace("postgres@", "postgres:sesame@")
    assert server.service.probe(with_password) == server.answer
    with pytest.raises(NoAnswer, match="password authentication failed"):
        server.service.probe(server.url.replace("postgres@", "postgres:wrong@"))


def test_a_mariadb_with_a_password_answers_only_to_it(private_mariadb: Callable[..., Instance]) -> None:
    server = private_mariadb()
    with pymysql.connect(port=server.port, user="root") as connection, connection.cursor() as cursor:
        cursor.execute("SET PASSWORD FOR root@127.0.0.1 = PASSWORD('sesame')")
    with pytest.raises(NoAnswer, match="lets nobody in"):
        server.service.probe(server.url)
    assert server.service.probe(server.url.replace("root@", "root:sesame@")) == server.answer


def test_an_emulator_is_called_one() -> None:
    assert [name for name, service in SERVICES.items() if service.kind == "emulator"] == ["dynamodb"]


def test_the_emulator_says_that_it_is_one_and_its_version(dynamodb_url: str) -> None:
    found = SERVICES["dynamodb"].probe(dynamodb_url)
    if found.product != "ministack":
        pytest.skip(f"{SERVICES['dynamodb'].variable} names another server")
    assert "ministack" in plan("dynamodb")
    assert "(emulator)" in plan("dynamodb")
    assert found.version != "?"


def test_whoever_has_another_dynamodb_may_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), AnotherDynamoDb) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("RETRYPROOF_TEST_DYNAMODB_URL", f"http://127.0.0.1:{server.server_port}")
        said = plan("dynamodb")
        server.shutdown()
        thread.join(10)
    assert said.startswith("another server of DynamoDB's protocol ? (real or not, it does not say)")


class AnotherDynamoDb(BaseHTTPRequestHandler):
    """Lists no tables, and knows no page of ministack's."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("x-amzn-RequestId", "1")
        self.end_headers()
        self.wfile.write(b'{"TableNames": []}')

    def do_GET(self) -> None:
        self.send_error(400)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to stderr."""


def refusal(server: Instance) -> str:
    """What the probe says once the server has read its new settings, which it does in its own time."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            server.service.probe(server.url)
        except NoAnswer as error:
            return str(error)
    return "still lets everyone in"


def test_an_open_port_that_speaks_another_protocol_does_not_answer(postgres_url: str, redis_url: str) -> None:
    with pytest.raises(NoAnswer):
        SERVICES["redis"].probe(postgres_url.replace("postgresql", "redis"))
    with pytest.raises(NoAnswer):
        SERVICES["postgres"].probe(redis_url.replace("redis", "postgresql"))
    with pytest.raises(NoAnswer):
        SERVICES["mariadb"].probe(redis_url.replace("redis", "mysql"))
    with pytest.raises(NoAnswer):
        SERVICES["dynamodb"].probe(redis_url.replace("redis", "http"))


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
