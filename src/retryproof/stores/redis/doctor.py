"""What of a Redis or Valkey server silently breaks safety (O2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retryproof.core.errors import StoreUnavailable
from retryproof.stores.diagnosis import Finding, Verdict, clock_skew
from retryproof.stores.redis.blocking import RedisStore
from retryproof.stores.redis.protocol import Plan, RedisRequest

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

OLDEST = (5, 0)
"""Older servers refuse to read the clock in a script that writes."""
CONFIGURATION = ("maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server said.

    info: the lines of INFO. config: of CONFIG GET. Either is empty where the server refuses it. clock: the
    server's time; before, after: the host's around it, in seconds since the epoch.
    """

    info: Mapping[str, str]
    config: Mapping[str, str] = field(default_factory=dict)
    clock: float = 0.0
    before: float = 0.0
    after: float = 0.0


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Ask the server and judge."""
    store = RedisStore(url, timeout=timeout)
    try:
        return verdicts(store.perform(gather(time.time)))
    finally:
        store.close()


def gather(host_clock: Callable[[], float]) -> Plan[Facts]:
    """A few small commands; the first is one that every user of the store may send."""
    before = host_clock()
    seconds, micros = yield RedisRequest(["TIME"])
    after = host_clock()
    info = yield from _allowed("INFO", "everything")
    config: dict[str, str] = {}
    for name in CONFIGURATION:
        answer = yield from _allowed("CONFIG", "GET", name)
        if answer:
            config[name] = answer[1].decode()
    return Facts(parse_info(info or b""), config, int(seconds) + int(micros) / 1e6, before, after)


def _allowed(*command: str) -> Generator[RedisRequest, Any, Any]:
    """The answer to a command, or None where this user may not send it, or the server has none such."""
    try:
        return (yield RedisRequest(command))
    except StoreUnavailable:
        return None


def parse_info(info: bytes) -> Mapping[str, str]:
    """The lines `name:value` of INFO."""
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def verdicts(facts: Facts) -> Sequence[Finding]:
    """Judge what the server said."""
    clock = clock_skew(facts.clock, facts.before, facts.after)
    if not facts.info:
        return [Finding("permission", WARN, "this user may not send INFO", "Ask again as a user who may."), clock]
    return [
        _version(facts),
        _role(facts),
        _cluster(facts),
        _eviction(facts),
        _memory(facts),
        _persistence(facts),
        _replicas(facts),
        clock,
    ]


def _version(facts: Facts) -> Finding:
    product = "valkey" if "valkey_version" in facts.info else "redis"
    version = facts.info.get("valkey_version") or facts.info.get("redis_version", "?")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if product == "redis" and numbers < OLDEST:
        return Finding("version", FAIL, f"{product} {version}", "Upgrade: 5.0 or later is needed, 7.0 or later tested.")
    return Finding("version", OK, f"{product} {version}")


def _role(facts: Facts) -> Finding:
    role = facts.info.get("role", "?")
    if role == "master":
        return Finding("role", OK, "master")
    return Finding("role", FAIL, f"this server is a {role}", "Give the master's URL: claims need the latest writes.")


def _cluster(facts: Facts) -> Finding:
    if facts.info.get("cluster_enabled", "0") == "0":
        return Finding("cluster", OK, "not a cluster")
    return Finding(
        "cluster",
        FAIL,
        "this server is a cluster node",
        "A batch's keys lie on several nodes; use a server of its own.",
    )


def _eviction(facts: Facts) -> Finding:
    policy = facts.config.get("maxmemory-policy") or facts.info.get("maxmemory_policy", "?")
    if policy == "noeviction":
        return Finding("eviction", OK, "noeviction")
    return Finding(
        "eviction",
        FAIL,
        f"maxmemory-policy is {policy}: a full server forgets records, and their operations run again",
        "CONFIG SET maxmemory-policy noeviction, and in the configuration file; keep caches on another server.",
    )


def _memory(facts: Facts) -> Finding:
    used, most = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    if most == 0:
        return Finding("memory", OK, f"{used >> 20} MiB used, no limit of its own")
    says = f"{used >> 20} of {most >> 20} MiB used"
    if used > 0.9 * most:
        return Finding(
            "memory", WARN, says, "When it is full, claims fail closed: raise maxmemory or shorten retention."
        )
    return Finding("memory", OK, says)


def _persistence(facts: Facts) -> Finding:
    on = facts.info.get("aof_enabled", "0") == "1" or facts.config.get("appendonly") == "yes"
    fsync = facts.config.get("appendfsync")
    if on and facts.info.get("aof_last_write_status", "ok") != "ok":
        return Finding("persistence", FAIL, "the append-only file cannot be written", "See the server's log and disk.")
    if on and fsync == "no":
        return Finding(
            "persistence", WARN, "appendonly, appendfsync no", "A crash may lose some 30 s: set everysec or always."
        )
    if on and fsync == "always":
        return Finding("persistence", OK, "appendonly, appendfsync always")
    if on:
        return Finding("persistence", OK, f"appendonly, appendfsync {fsync or '?'}: a crash loses up to a second or so")
    snapshots = facts.config.get("save")
    says = (
        f"snapshots only (save {snapshots})"
        if snapshots
        else "nothing is written to disk"
        if snapshots == ""
        else ("no append-only file")
    )
    return Finding(
        "persistence",
        WARN if snapshots or snapshots is None else FAIL,
        f"{says}: after a crash of the server, operations that were done run again",
        "Set appendonly yes and appendfsync everysec (or always, for the last second too).",
    )


def _replicas(facts: Facts) -> Finding:
    replicas = int(facts.info.get("connected_slaves", 0))
    if replicas == 0:
        return Finding("fail-over", OK, "no replicas")
    if facts.config.get("min-replicas-to-write", "0") == "0":
        return Finding(
            "fail-over",
            WARN,
            f"{replicas} replicas, none of which a write waits for",
            "A fail-over loses what they had not got yet. Set min-replicas-to-write 1, which bounds the loss, or use "
            "PostgreSQL with a synchronous standby where none may be lost.",
        )
    return Finding("fail-over", OK, f"{replicas} replicas; writes stop without them")
