"""What a `postgresql://` URL means to the store, and what the server's errors mean: the same for both drivers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from retryproof.core.errors import ConfigurationError, IdempotencyError, StoreUnavailable
from retryproof.sql.postgres.statements import TABLE

TIMEOUT = 2.0
"""Seconds that a call may take, connecting included."""
CONNECT_TIMEOUT = 10.0
"""Seconds to connect for a migration, which may take its time then."""
POOL_SIZE = 4
"""Connections a store opens at most: an opened store has one batch of each kind on its way at a time."""
PAUSES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.1)
"""Seconds, at most, before a statement is sent again that the server undid for a rival's sake. At READ COMMITTED that
is next to never; behind a transaction pooler the server's default may be SERIALIZABLE, where rivals undo each other."""
VERSIONS = "retryproof_schema"
"""The table of applied migrations."""
SCHEMA_VERSION = 7
"""The number of the newest migration that this code needs."""

_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg")
_UNDEFINED = {"42P01", "42703", "3F000"}  # table, column, schema
_RETRY = {"40001", "40P01"}  # serialization failure, deadlock
_NO_DATABASE = re.compile(r'FATAL: +database ".*" does not exist')
"""What libpq says in place of an SQLSTATE, where the server's messages are English."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


Maker = Callable[[], Any]
"""Makes a driver's connection in the way of a caller's engine; one of asyncpg's is awaited."""


@dataclass(frozen=True, slots=True)
class PostgresTarget:
    """Where the records are.

    dsns: what the driver is given, one for each host of the URL, tried in turn until one is a primary.
    maker: in their place, what makes connections. driver: whose connections these are.
    schema: of the table, or None for the search path.
    statement_cache: whether statements stay prepared; not behind a pooler that changes sessions between them.
    """

    dsns: tuple[str, ...] = field(repr=False)  # with the password
    schema: str | None = None
    statement_cache: bool = True
    pool_size: int = POOL_SIZE
    maker: Maker | None = None
    driver: Literal["psycopg", "asyncpg"] | None = None

    @property
    def prefix(self) -> str:
        """What stands before each table in SQL."""
        return f'"{self.schema}".' if self.schema else ""

    @property
    def table(self) -> str:
        """The table as it stands in SQL."""
        return f"{self.prefix}{TABLE}"

    @property
    def versions(self) -> str:
        """The table of applied migrations as it stands in SQL."""
        return f"{self.prefix}{VERSIONS}"

    @property
    def check(self) -> str:
        """The statement whose row `check_server` judges."""
        return check_statement(self.versions)

    def settings(self, timeout: float) -> dict[str, str]:
        """Settings of a session of our own; none behind a transaction pooler, which refuses them.

        Statements end by themselves where the client has given up. Their plans never scan the table, are made once,
        and are not compiled.
        """
        if not self.statement_cache:
            return {}
        milliseconds = str(max(1, round(timeout * 1_000)))
        return {
            "default_transaction_isolation": "read committed",
            "default_transaction_read_only": "off",
            "statement_timeout": milliseconds,
            "lock_timeout": milliseconds,
            "plan_cache_mode": "force_generic_plan",
            "enable_seqscan": "off",
            "jit": "off",
        }


def check_statement(versions: str = VERSIONS) -> str:
    """Whether the server is a replica, and the newest migration it has seen."""
    return f"SELECT pg_is_in_recovery(), (SELECT max(version) FROM {versions})"


BACKEND = "SELECT pg_backend_pid()"
"""Whose answer is not what a pooler said at connect. Behind one that lends a session for a transaction alone, our
settings would stay with sessions that are others' next."""
SET = "SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS settings (name, value)"


def parse(url: str) -> PostgresTarget:
    """Take the store's own options (`schema`, `statement_cache_size`, `pool_size`) out of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ConfigurationError(f"{parts.scheme}:// is not PostgreSQL; use postgresql://user@host/database")
    target = PostgresTarget(())
    kept = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        match name:
            case "schema":
                target = replace(target, schema=_schema(value))
            case "statement_cache_size":
                target = replace(target, statement_cache=_number(name, value, 0) > 0)
            case "pool_size":
                target = replace(target, pool_size=_number(name, value, 1))
            case "connect_timeout":
                pass  # the store's own time-out covers connecting, and asyncpg would send it to the server
            case _:
                kept.append((name, value))
    query = f"?{urlencode(kept, quote_via=quote)}" if kept else ""
    user, at, hosts = parts.netloc.rpartition("@")
    return replace(target, dsns=tuple(f"postgresql://{user}{at}{host}{parts.path}{query}" for host in hosts.split(",")))


def _schema(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigurationError("schema= must be letters, digits and underscores, not beginning with a digit")
    return name


def _number(name: str, value: str, least: int) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise ConfigurationError(f"{name}={value} is not a whole number of at least {least}")
    return int(value)


def shares(target: PostgresTarget, now: float, deadline: float) -> Iterator[tuple[str | Maker, float]]:
    """Each host's DSN with its own deadline, so that one that swallows packets leaves time for the others; or what
    makes the connection."""
    hosts: tuple[str | Maker, ...] = target.dsns if target.maker is None else (target.maker,)
    for place, host in enumerate(hosts, 1):
        yield host, now + (deadline - now) * place / len(hosts)


def pauses() -> Iterator[float]:
    """How long to pause before each new try, by chance, so that rivals part."""
    return (random.uniform(0.0, pause) for pause in PAUSES)


def retryable(sqlstate: str | None) -> bool:
    """Whether the server undid the statement and asks for it again."""
    return sqlstate in _RETRY


def explain(error: BaseException, sqlstate: str | None) -> IdempotencyError:
    """The error that a caller sees; raise it from the driver's."""
    if sqlstate in _UNDEFINED:
        return no_schema()
    said = str(error).strip()
    if sqlstate == "3D000" or _NO_DATABASE.search(said):
        return NoDatabase(f"PostgreSQL has no such database: {said}"[:500])
    if sqlstate == "53200":
        return StoreUnavailable(
            "PostgreSQL is out of shared memory for locks; raise max_locks_per_transaction (docs/howto/postgresql.md)"
        )
    return StoreUnavailable(f"PostgreSQL gave no answer: {type(error).__name__}: {said}"[:500])


class NoDatabase(StoreUnavailable):
    """The server has no database of that name, as it may for the time of a restore."""


def not_made(error: Exception) -> StoreUnavailable:
    """The error of an engine that made no connection."""
    return StoreUnavailable(f"The engine made no connection: {type(error).__name__}: {str(error).strip()}"[:500])


def timed_out(timeout: float) -> StoreUnavailable:
    """The error of a call that has run out of time."""
    return StoreUnavailable(f"PostgreSQL gave no answer within {timeout:g} s; what was asked may have been done")


def no_schema() -> ConfigurationError:
    """The error of a database without the tables, or with older ones."""
    return ConfigurationError(
        "the database has no tables of this version of retryproof; run `retryproof migrate URL` with the store's URL"
    )


class ReadReplica(StoreUnavailable):
    """The server is a replica, or all that the URL names are."""


def check_primary(recovering: bool) -> None:
    """Refuse a read replica: it would not know what was just claimed."""
    if recovering:
        raise ReadReplica(
            "this PostgreSQL server is a read replica (in recovery); give the primary's URL, or all hosts: host1,host2"
        )


def check_server(recovering: bool, version: int | None) -> None:
    """Refuse a read replica and an old schema, at connect."""
    check_primary(recovering)
    if version is None or version < SCHEMA_VERSION:
        raise no_schema()
