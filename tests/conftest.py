"""Real servers and their isolation: one server for a session, a separate database or prefix for a worker or test."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit, urlunsplit

import hypothesis
import pytest

from servers import SERVICES, Instance, Missing, RunDirectory, Server, Unanswered, plan, resolve, start_private

RUN_VARIABLE = "RETRYPROOF_TEST_RUN_DIRECTORY"  # tells pytest-xdist's workers where their session's servers are

# Two busy cores make any time limit on one example a matter of luck; pytest-timeout still ends what hangs.
hypothesis.settings.register_profile("home", deadline=None)
# CI repeats the same examples, so that a change is judged by what it changed.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "home")

STARTED = pytest.StashKey[RunDirectory]()

PrivateServer = Callable[..., Instance]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timing", choices=("only", "none"), help="the tests marked `quiet` only, or all others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timing = config.getoption("timing")
    if timing is None:
        return
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        measures = item.get_closest_marker("quiet") is not None
        (chosen if measures == (timing == "only") else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        run = RunDirectory.of_session()
        os.environ[RUN_VARIABLE] = str(run.path)
        config.stash[STARTED] = run


def pytest_unconfigure(config: pytest.Config) -> None:
    run = config.stash.get(STARTED, None)
    if run is not None:
        run.clear()


def pytest_report_header() -> list[str]:
    return [f"{name}: {plan(name)}" for name in SERVICES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(STARTED, None)
    if run is None:
        return
    for service in SERVICES.values():
        instance = run.running(service)
        if instance is not None:
            terminalreporter.write_line(
                f"tested against {service.product} {instance.version} ({service.kind}), private: {instance.binary}"
            )


@pytest.fixture(scope="session")
def run_directory() -> RunDirectory:
    """Where this session's private servers live, shared by its workers."""
    return RunDirectory(Path(os.environ[RUN_VARIABLE]))


@pytest.fixture(scope="session")
def redis_url(run_directory: RunDirectory) -> str:
    """A Redis that others may share: take key prefixes from `unique`, never flush."""
    return _server("redis", run_directory).url


@pytest.fixture(scope="session")
def valkey_url(run_directory: RunDirectory) -> str:
    """A Valkey that others may share: take key prefixes from `unique`, never flush."""
    return _server("valkey", run_directory).url


@pytest.fixture(scope="session")
def postgres_url(run_directory: RunDirectory) -> Iterator[str]:
    """A fresh PostgreSQL database of this worker's own, dropped at the end."""
    import psycopg

    server = _server("postgres", run_directory)
    database = f"retryproof_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{database}"'.encode())
    yield _with_database(server.url, database)
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{database}" WITH (FORCE)'.encode())


@pytest.fixture(scope="session")
def mariadb_url(run_directory: RunDirectory) -> Iterator[str]:
    """A fresh MariaDB database of this worker's own, dropped at the end."""
    server = _server("mariadb", run_directory)
    database = f"retryproof_{uuid.uuid4().hex[:12]}"
    _in_mariadb(server.url, f"CREATE DATABASE {database}")
    yield _with_database(server.url, database)
    _in_mariadb(server.url, f"DROP DATABASE {database}")


@pytest.fixture(scope="session")
def dynamodb_url(run_directory: RunDirectory) -> str:
    """An emulator of DynamoDB that others may share: take names of tables from `unique`."""
    return _server("dynamodb", run_directory).url


@pytest.fixture
def unique() -> str:
    """A short random name, for a key prefix, a table or a scope that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def private_redis(run_directory: RunDirectory) -> Iterator[PrivateServer]:
    """Starts Redis servers of this test's own, to be killed, paused and restarted: `private_redis(*options)`."""
    yield from _private("redis", run_directory)


@pytest.fixture
def private_valkey(run_directory: RunDirectory) -> Iterator[PrivateServer]:
    """Starts Valkey servers of this test's own, to be killed, paused and restarted: `private_valkey(*options)`."""
    yield from _private("valkey", run_directory)


@pytest.fixture
def private_postgres(run_directory: RunDirectory) -> Iterator[PrivateServer]:
    """Starts PostgreSQL servers of this test's own, to be killed, paused, restarted: `private_postgres(*options)`."""
    yield from _private("postgres", run_directory)


@pytest.fixture
def private_mariadb(run_directory: RunDirectory) -> Iterator[PrivateServer]:
    """Starts MariaDB servers of this test's own, to be killed, paused, restarted: `private_mariadb(*options)`."""
    yield from _private("mariadb", run_directory)


@pytest.fixture
def private_dynamodb(run_directory: RunDirectory) -> Iterator[PrivateServer]:
    """Starts emulators of this test's own, to be killed and paused; what they hold ends with them."""
    yield from _private("dynamodb", run_directory)


def _in_mariadb(server_url: str, sql: str) -> None:
    import pymysql

    parts = urlsplit(server_url)
    user, password = unquote(parts.username or "root"), unquote(parts.password or "")
    connection = pymysql.connect(host=parts.hostname, port=parts.port or 3306, user=user, password=password)
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)


def _with_database(server_url: str, database: str) -> str:
    """The same server's URL with another database."""
    return urlunsplit(urlsplit(server_url)._replace(path=f"/{database}"))


def _server(name: str, run: RunDirectory) -> Server:
    try:
        return resolve(name, run)
    except Unanswered as error:
        pytest.fail(str(error), pytrace=False)
    except Missing as error:
        _missing(error)


def _private(name: str, run: RunDirectory) -> Iterator[PrivateServer]:
    started: list[Instance] = []

    def start(*options: str) -> Instance:
        try:
            started.append(start_private(name, *options, run=run))
        except Missing as error:
            _missing(error)
        return started[-1]

    yield start
    for instance in started:
        instance.discard()


def _missing(error: Missing) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs every server: {error}", pytrace=False)
    pytest.skip(str(error))
