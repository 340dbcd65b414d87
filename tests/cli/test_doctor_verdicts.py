"""What the doctor says of facts: pure, without a server (O2)."""

from dataclasses import replace
from pathlib import Path

import pytest

from retryproof.sql.postgres import doctor as postgres_doctor
from retryproof.sql.postgres import url as postgres_url
from retryproof.sql.sqlite import doctor as sqlite_doctor
from retryproof.sql.sqlite import records as sqlite_plans
from retryproof.stores.diagnosis import Finding, Verdict, clock_skew
from retryproof.stores.redis import doctor as redis_doctor

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

GOOD_REDIS = {"redis_version": "7.0.15", "role": "master", "cluster_enabled": "0", "aof_enabled": "1"}
GOOD_CONFIG = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": ""}


def redis_verdicts(info: dict[str, str] | None = None, config: dict[str, str] | None = None) -> dict[str, Verdict]:
    facts = redis_doctor.Facts(GOOD_REDIS | (info or {}), GOOD_CONFIG | (config or {}))
    return {finding.check: finding.verdict for finding in redis_doctor.verdicts(facts)}


def test_o2_a_redis_as_it_should_be_is_ok_throughout() -> None:
    assert set(redis_verdicts().values()) == {OK}


@pytest.mark.parametrize(
    ("check", "verdict", "info", "config"),
    [
        ("version", FAIL, {"redis_version": "4.0.14"}, {}),
        ("version", OK, {"redis_version": "7.2.4", "valkey_version": "9.0.0"}, {}),
        ("role", FAIL, {"role": "slave"}, {}),
        ("cluster", FAIL, {"cluster_enabled": "1"}, {}),
        ("eviction", FAIL, {}, {"maxmemory-policy": "allkeys-lru"}),
        ("eviction", FAIL, {}, {"maxmemory-policy": "volatile-ttl"}),
        ("memory", WARN, {"used_memory": "95", "maxmemory": "100"}, {}),
        ("memory", OK, {"used_memory": "50", "maxmemory": "100"}, {}),
        ("persistence", OK, {}, {"appendfsync": "always"}),
        ("persistence", WARN, {}, {"appendfsync": "no"}),
        ("persistence", FAIL, {"aof_last_write_status": "err"}, {}),
        ("persistence", WARN, {"aof_enabled": "0"}, {"appendonly": "no", "save": "3600 1"}),
        ("persistence", FAIL, {"aof_enabled": "0"}, {"appendonly": "no", "save": ""}),
        ("fail-over", WARN, {"connected_slaves": "2"}, {}),
        ("fail-over", OK, {"connected_slaves": "2"}, {"min-replicas-to-write": "1"}),
    ],
)
def test_o2_judges_redis(check: str, verdict: Verdict, info: dict[str, str], config: dict[str, str]) -> None:
    assert redis_verdicts(info, config)[check] is verdict


def test_o2_a_hosted_redis_that_hides_its_configuration_is_judged_by_info() -> None:
    hidden = redis_doctor.Facts(GOOD_REDIS | {"maxmemory_policy": "allkeys-lru", "aof_enabled": "0"})
    verdicts = {finding.check: finding.verdict for finding in redis_doctor.verdicts(hidden)}

    assert verdicts["eviction"] is FAIL
    assert verdicts["persistence"] is WARN


GOOD_POSTGRES = postgres_doctor.Facts(
    release=150_018,
    product="15.18",
    fsync="on",
    full_page_writes="on",
    synchronous_commit="on",
    isolation="read committed",
    read_only="off",
    clock=0.0,
    table=True,
    version=postgres_url.SCHEMA_VERSION,
    indexes=postgres_doctor.INDEXES,
)


def postgres_verdicts(**changes: object) -> dict[str, Verdict]:
    facts = replace(GOOD_POSTGRES, **changes)  # type: ignore[arg-type]  # fields by name
    return {finding.check: finding.verdict for finding in postgres_doctor.verdicts(facts)}


def test_o2_a_postgresql_as_it_should_be_is_ok_throughout() -> None:
    assert set(postgres_verdicts().values()) == {OK}


@pytest.mark.parametrize(
    ("check", "verdict", "changes"),
    [
        ("version", WARN, {"release": 120_000}),
        ("role", WARN, {"read_only": "on"}),
        ("schema", FAIL, {"version": None, "table": False}),
        ("schema", FAIL, {"version": 0}),
        ("schema", OK, {"version": 1_000}),
        ("indexes", WARN, {"indexes": ("retryproof_operations_pkey",)}),
        ("indexes", FAIL, {"indexes": ("retryproof_operations_expires_at",)}),
        ("privileges", FAIL, {"lacking": ("DELETE",)}),
        ("privileges", FAIL, {"lacking": ("DELETE",), "lacking_phased": ("DELETE",)}),
        ("privileges", WARN, {"lacking_phased": ("DELETE",)}),
        ("durability", FAIL, {"fsync": "off"}),
        ("durability", FAIL, {"full_page_writes": "off"}),
        ("commit", FAIL, {"synchronous_commit": "off"}),
        ("isolation", OK, {"isolation": "serializable"}),
        ("clock", WARN, {"clock": 100.0}),
    ],
)
def test_o2_judges_postgresql(check: str, verdict: Verdict, changes: dict[str, object]) -> None:
    assert postgres_verdicts(**changes)[check] is verdict


GOOD_SQLITE = sqlite_doctor.Facts("FULL", True, True, "ext4", 0o600, "wal", sqlite_plans.SCHEMA_VERSION, "ok")


def sqlite_verdicts(**changes: object) -> dict[str, Verdict]:
    facts = replace(GOOD_SQLITE, **changes)  # type: ignore[arg-type]  # fields by name
    return {finding.check: finding.verdict for finding in sqlite_doctor.verdicts(facts)}


def test_o2_a_sqlite_file_as_it_should_be_is_ok_throughout() -> None:
    assert set(sqlite_verdicts().values()) == {OK}


@pytest.mark.parametrize(
    ("check", "verdict", "changes"),
    [
        ("place", FAIL, {"filesystem": "nfs4"}),
        ("place", WARN, {"filesystem": "tmpfs"}),
        ("permission", FAIL, {"writable": False}),
        ("durability", WARN, {"synchronous": "NORMAL"}),
        ("durability", FAIL, {"synchronous": "OFF"}),
        ("privacy", WARN, {"mode": 0o644}),
        ("integrity", FAIL, {"integrity": "row 3 missing from index"}),
        ("journal", WARN, {"journal": "delete"}),
        ("schema", WARN, {"version": 0}),
        ("schema", FAIL, {"version": 1_000}),
        ("file", WARN, {"exists": False}),
    ],
)
def test_o2_judges_sqlite(check: str, verdict: Verdict, changes: dict[str, object]) -> None:
    assert sqlite_verdicts(**changes)[check] is verdict


def test_the_file_system_is_that_of_the_innermost_and_latest_mount() -> None:
    mounts = "\n".join(
        ("/dev/a / ext4 rw 0 0", "srv:/x /data nfs4 rw 0 0", "tmpfs /data/hot\\040set tmpfs rw 0 0", "broken")
    )

    assert sqlite_doctor.filesystem_of(Path("/data/keys"), mounts) == "nfs4"
    assert sqlite_doctor.filesystem_of(Path("/data/hot set/x"), mounts) == "tmpfs"
    assert sqlite_doctor.filesystem_of(Path("/database"), mounts) == "ext4"
    assert sqlite_doctor.filesystem_of(Path("/data"), "") == ""


@pytest.mark.parametrize(("store", "verdict"), [(10.5, OK), (8.5, OK), (13.5, WARN), (5.0, WARN)])
def test_o2_a_clock_is_judged_against_the_hosts_before_and_after(store: float, verdict: Verdict) -> None:
    assert clock_skew(store, 10.0, 11.0).verdict is verdict


def test_everything_that_is_not_ok_says_what_to_do() -> None:
    findings: list[Finding] = [
        *redis_doctor.verdicts(redis_doctor.Facts({"role": "slave", "redis_version": "4.0"})),
        *postgres_doctor.verdicts(
            replace(GOOD_POSTGRES, fsync="off", synchronous_commit="off", version=None, indexes=())
        ),
        *sqlite_doctor.verdicts(replace(GOOD_SQLITE, filesystem="cifs", mode=0o666, synchronous="OFF", writable=False)),
    ]

    assert [finding.check for finding in findings if finding.verdict is not OK and not finding.advice] == []


def test_a_redis_user_without_info_is_told_to_ask_as_another() -> None:
    (permission, clock) = redis_doctor.verdicts(redis_doctor.Facts({}))

    assert (permission.verdict, clock.verdict) == (WARN, OK)


@pytest.mark.parametrize(
    ("encrypted", "remote", "query", "verdict"),
    [
        (False, False, "", OK),
        (False, True, "", WARN),
        (None, True, "?sslmode=prefer", WARN),
        (True, True, "", WARN),
        (True, True, "?sslmode=require", WARN),
        (True, True, "?sslmode=verify-full", OK),
    ],
)
def test_o2_a_connection_in_the_clear_or_to_anybody_is_a_finding(
    encrypted: bool | None, remote: bool, query: str, verdict: Verdict
) -> None:
    facts = replace(GOOD_POSTGRES, encrypted=encrypted, remote=remote)
    finding = postgres_doctor.encryption(facts, f"postgresql://u:hush@h/d{query}")
    assert finding.verdict is verdict
    assert "hush" not in f"{finding}"
