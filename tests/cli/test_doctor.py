"""`retryproof doctor` on real servers and files (O2)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from redis import Redis

from retryproof import Idempotency
from retryproof.sql.postgres import asyncpg
from retryproof.sql.postgres import doctor as postgres_doctor
from retryproof.sql.postgres.doctor import INDEXES
from retryproof.sql.postgres.url import parse
from retryproof.stores.diagnosis import Verdict
from retryproof.stores.sql.migrate import migrate
from tests.cli.conftest import Run
from tests.conftest import PrivateServer


def verdicts(document: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {finding["check"]: finding["verdict"] for finding in document["findings"]}


def test_o2_memory_is_a_warning(run: Run) -> None:
    ran = run("doctor", "memory://", "--json")

    assert ran.code == 0
    assert verdicts(ran.document) == {"durability": "warn"}
    assert run("doctor", "memory://", "--strict").code == 1


# Redis


def test_o2_finds_what_breaks_safety_on_a_redis(run: Run, private_redis: PrivateServer) -> None:
    server = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")

    ran = run("doctor", server.url, "--json")

    assert ran.code == 1
    assert ran.document["verdict"] == "fail"
    found = verdicts(ran.document)
    assert (found["eviction"], found["persistence"], found["role"]) == ("fail", "fail", "ok")
    assert "noeviction" in run("doctor", server.url).out


def test_o2_a_good_redis_passes_and_nothing_is_written(run: Run, private_redis: PrivateServer) -> None:
    server = private_redis("--appendfsync", "always")

    assert run("doctor", server.url, "--strict").code == 0
    with Redis.from_url(server.url) as client:
        assert client.dbsize() == 0


def test_o2_a_redis_replica_fails(run: Run, private_redis: PrivateServer) -> None:
    master = private_redis()
    replica = private_redis("--replicaof", "127.0.0.1", str(master.port))

    assert verdicts(run("doctor", replica.url, "--json").document)["role"] == "fail"


def test_o2_a_redis_user_of_few_rights_is_told_so(run: Run, private_redis: PrivateServer) -> None:
    server = private_redis()
    with Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">s3cret", "~*", "+time", "+@hash", "+select")

    url = server.url.replace("redis://", "redis://app:s3cret@")
    ran = run("doctor", url, "--json")

    assert ran.code == 0
    assert verdicts(ran.document)["permission"] == "warn"
    assert "s3cret" not in ran.out + ran.err


def test_o2_valkey_is_judged_as_valkey(run: Run, private_valkey: PrivateServer) -> None:
    (version, *_) = run("doctor", private_valkey().url, "--json").document["findings"]

    assert version["says"].startswith("valkey 9")


# PostgreSQL


@pytest.fixture
def migrated(postgres_url: str, unique: str) -> str:
    url = f"{postgres_url}?schema={unique}"
    migrate(url)
    return url


@pytest.fixture
def admin(postgres_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield connection


def test_o2_a_good_postgresql_passes(run: Run, migrated: str) -> None:
    ran = run("doctor", migrated, "--json")

    assert ran.code == 0, ran.out
    assert set(verdicts(ran.document).values()) == {"ok"}


async def test_o2_asyncpg_alone_gives_the_same_answer(migrated: str) -> None:
    target = parse(migrated)

    facts = await asyncpg.transaction(target, lambda: postgres_doctor.gather(target, time.time))

    assert {finding.verdict for finding in postgres_doctor.verdicts(facts)} == {Verdict.OK}


def test_o2_the_indexes_that_are_looked_for_are_those_of_the_migrations(
    migrated: str, admin: psycopg.Connection, unique: str
) -> None:
    rows = admin.execute(
        "SELECT indexname::text FROM pg_indexes WHERE schemaname = %s AND tablename = 'retryproof_operations'", [unique]
    )

    assert sorted(row[0] for row in rows) == sorted(INDEXES)


def test_o2_an_index_that_is_missing_and_a_schema_that_is_old_are_found(
    run: Run, migrated: str, admin: psycopg.Connection, unique: str
) -> None:
    admin.execute(f'DROP INDEX "{unique}".retryproof_operations_expires_at'.encode())
    admin.execute(f'DELETE FROM "{unique}".retryproof_schema'.encode())

    ran = run("doctor", migrated, "--json")

    assert ran.code == 1
    found = verdicts(ran.document)
    assert (found["indexes"], found["schema"]) == ("warn", "fail")
    assert "retryproof migrate" in run("doctor", migrated).out


def test_o2_a_database_without_tables_is_told_to_migrate(run: Run, postgres_url: str, unique: str) -> None:
    ran = run("doctor", f"{postgres_url}?schema={unique}", "--json")

    assert ran.code == 1
    assert verdicts(ran.document)["schema"] == "fail"


def test_o2_a_user_without_rights_is_found(run: Run, migrated: str, admin: psycopg.Connection, unique: str) -> None:
    admin.execute(f"CREATE ROLE \"{unique}\" LOGIN PASSWORD 's3cret'".encode())
    admin.execute(f'GRANT USAGE ON SCHEMA "{unique}" TO "{unique}"'.encode())
    admin.execute(f'GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA "{unique}" TO "{unique}"'.encode())
    try:
        ran = run("doctor", migrated.replace("postgres@", f"{unique}:s3cret@"), "--json")
        assert verdicts(ran.document)["privileges"] == "fail"
        assert "UPDATE, DELETE" in ran.out
        assert "s3cret" not in ran.out + ran.err
    finally:
        admin.execute(f'DROP OWNED BY "{unique}"'.encode())
        admin.execute(f'DROP ROLE "{unique}"'.encode())


def test_o2_a_user_who_cannot_work_in_phases_is_told(
    run: Run, migrated: str, admin: psycopg.Connection, unique: str
) -> None:
    admin.execute(f"CREATE ROLE \"{unique}\" LOGIN PASSWORD 's3cret'".encode())
    admin.execute(f'GRANT USAGE ON SCHEMA "{unique}" TO "{unique}"'.encode())
    every = "SELECT, INSERT, UPDATE, DELETE"
    admin.execute(f'GRANT {every} ON ALL TABLES IN SCHEMA "{unique}" TO "{unique}"'.encode())
    admin.execute(f'REVOKE DELETE ON "{unique}".retryproof_phased FROM "{unique}"'.encode())
    try:
        ran = run("doctor", migrated.replace("postgres@", f"{unique}:s3cret@"), "--json")
        assert verdicts(ran.document)["privileges"] == "warn"
        assert "DELETE on retryproof_phased" in ran.out
    finally:
        admin.execute(f'DROP OWNED BY "{unique}"'.encode())
        admin.execute(f'DROP ROLE "{unique}"'.encode())


@pytest.mark.crash
def test_o2_a_postgresql_that_forgets_commits_and_a_replica_fail(run: Run, private_postgres: PrivateServer) -> None:
    server = private_postgres("-c", "synchronous_commit=off", "-c", "full_page_writes=off")
    migrate(server.url)
    found = verdicts(run("doctor", server.url, "--json").document)
    assert (found["commit"], found["durability"]) == ("fail", "fail")

    server.stop()
    (server.directory / "data" / "standby.signal").touch()
    server.restart()

    replica = run("doctor", server.url, "--json")
    assert replica.code == 1
    assert verdicts(replica.document) == {"role": "fail"}


# SQLite


def test_o2_a_sqlite_file_is_looked_at_and_not_changed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a b.db"
    url = f"sqlite:///{path}".replace(" ", "%20")
    missing = run("doctor", url, "--json")
    assert verdicts(missing.document)["file"] == "warn"
    assert list(tmp_path.iterdir()) == []

    with Idempotency(url) as engine:
        engine.run("k", lambda: 1, scope="charge")
    path.chmod(0o600)
    before = path.read_bytes()

    assert verdicts(run("doctor", url, "--json").document)["schema"] == "ok"
    assert verdicts(run("doctor", f"{url}?synchronous=OFF", "--json").document)["durability"] == "fail"
    assert path.read_bytes() == before


def test_o2_a_file_that_is_no_database_is_an_error(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    path.write_text("not a database, whatever its name says" * 100)

    ran = run("doctor", f"sqlite:///{path}", "--json")

    assert ran.code == 3
    assert ran.document["error"]["kind"] == "unreachable"


def test_o2_a_damaged_file_fails(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with Idempotency(f"sqlite:///{path}") as engine:
        for number in range(50):
            engine.run(f"k{number}", lambda: "x" * 2_000, scope="charge")
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(os.urandom(8 * 4096))

    ran = run("doctor", f"sqlite:///{path}", "--json")

    assert ran.code in (1, 3)


def test_o2_a_folder_that_is_missing_is_named_as_such(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nowhere/keys.db"
    assert "its folder does not exist" in run("doctor", url).out
    listed = run("reap", url)
    assert "make the folder" in listed.err
