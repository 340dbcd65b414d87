"""What of a PostgreSQL server or database silently breaks safety (O2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlsplit

from retryproof.core.findings import Finding, Verdict, clock_skew
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.postgres.migrate import migrations, transaction
from retryproof.sql.postgres.outbox import Numbering, PostgresOutbox
from retryproof.sql.postgres.statements import TABLE, markers, worklist
from retryproof.sql.postgres.url import SCHEMA_VERSION, PostgresTarget, ReadReplica, parse

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

INDEXES = tuple(f"{TABLE}_{name}" for name in ("expires_at", "pkey", "tenant"))
OLDEST = 130_000
LISTED, MARKED = 4, 7
"""The migrations that made the completer's worklist and the table of markers."""
MIGRATE = "Run `retryproof migrate` with this URL."

_SERVER = """
SELECT current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'),
       current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),
       extract(epoch FROM clock_timestamp())::float8, to_regclass($1::text) IS NOT NULL,
       (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()),
       NOT coalesce(inet_server_addr() <<= '127.0.0.0/8' OR inet_server_addr() <<= '::1', true),
       to_regclass($2::text) IS NOT NULL, to_regclass($3::text) IS NOT NULL
"""
_INDEXES = """
SELECT relation.relname::text FROM pg_index AS index JOIN pg_class AS relation ON relation.oid = index.indexrelid
WHERE index.indrelid = to_regclass($1::text) AND index.indisvalid AND index.indisready
"""
_PRIVILEGES = """
SELECT privilege FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
WHERE NOT has_table_privilege($1::text, privilege)
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server said; seconds since the epoch. version: the newest migration applied, None without any.

    lacking, lacking_phased: privileges on the records and markers, and on the completer's worklist.
    encrypted: whether this connection is, None where a pooler does not say. remote: whether it leaves the machine.
    """

    release: int
    product: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    isolation: str
    read_only: str
    clock: float
    table: bool
    encrypted: bool | None = None
    remote: bool = False
    before: float = 0.0
    after: float = 0.0
    version: int | None = None
    indexes: Sequence[str] = ()
    lacking: Sequence[str] = ()
    lacking_phased: Sequence[str] = ()
    numbering: Numbering | None = None


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Ask the primary and judge; where there is only a replica, that is the finding."""
    return judge(parse(url), url)


def judge(target: PostgresTarget, url: str) -> Sequence[Finding]:
    """`diagnose` for a target. url: what says how its connections are encrypted."""
    try:
        facts = transaction(target, lambda: gather(target, time.time))
    except ReadReplica as error:
        return [Finding("role", FAIL, error.message)]
    return [*verdicts(facts), encryption(facts, url)]


def gather(target: PostgresTarget, host_clock: Callable[[], float]) -> Plan[Facts]:
    """A few statements that read the catalogue."""
    before = host_clock()
    outbox = f"{target.prefix}retryproof_outbox"
    ((*settings, versions, numbered),) = yield Statement(_SERVER, (target.table, target.versions, outbox))
    facts = replace(Facts(*settings), before=before, after=host_clock())
    if versions:
        ((version,),) = yield Statement(f"SELECT max(version) FROM {target.versions}")
        facts = replace(facts, version=version)
    if facts.table:
        indexes = yield Statement(_INDEXES, (target.table,))
        lacking = [*(yield Statement(_PRIVILEGES, (target.table,)))]
        if (facts.version or 0) >= MARKED:
            lacking += yield Statement(_PRIVILEGES, (markers(target.table),))
        if (facts.version or 0) >= LISTED:
            phased = yield Statement(_PRIVILEGES, (worklist(target.table),))
            facts = replace(facts, lacking_phased=[row[0] for row in phased])
        facts = replace(
            facts, indexes=[row[0] for row in indexes], lacking=list(dict.fromkeys(row[0] for row in lacking))
        )
    if numbered:
        numbering = yield from PostgresOutbox(target.prefix).numbering()
        facts = replace(facts, numbering=numbering)
    return facts


def verdicts(facts: Facts) -> Sequence[Finding]:
    """Judge what the server said."""
    return [
        _version(facts),
        _role(facts),
        _schema(facts),
        *([_indexes(facts), _privileges(facts)] if facts.table else []),
        *([_order(facts.numbering)] if facts.numbering else []),
        _durability(facts),
        _commit(facts),
        _isolation(facts),
        clock_skew(facts.clock, facts.before, facts.after),
    ]


def encryption(facts: Facts, url: str) -> Finding:
    """Whether others on the network can read the records, or pose as the server; `sslmode` alone decides it."""
    mode = dict(parse_qsl(urlsplit(url).query)).get("sslmode", "prefer")
    advice = "Put ?sslmode=verify-full&sslrootcert=… into the URL."
    if not facts.remote:
        return Finding("encryption", OK, "the connection stays on this machine")
    if not facts.encrypted:
        return Finding("encryption", WARN, f"the connection is in the clear (sslmode {mode})", advice)
    if mode not in ("verify-ca", "verify-full"):
        return Finding("encryption", WARN, f"encrypted, but anybody may be the server (sslmode {mode})", advice)
    return Finding("encryption", OK, f"encrypted, sslmode {mode}")


def _version(facts: Facts) -> Finding:
    if facts.release < OLDEST:
        return Finding("version", WARN, f"PostgreSQL {facts.product}", "Not tested; PostgreSQL 15 and later are.")
    return Finding("version", OK, f"PostgreSQL {facts.product}")


def _role(facts: Facts) -> Finding:
    if facts.read_only == "on":
        return Finding(
            "role", WARN, "primary; transactions are read-only by default", "Check that this is wanted here."
        )
    return Finding("role", OK, "primary")


def _schema(facts: Facts) -> Finding:
    newest = migrations()[-1].version
    if facts.version is None or not facts.table:
        return Finding("schema", FAIL, "this database has no tables of retryproof", MIGRATE)
    if facts.version < SCHEMA_VERSION:
        return Finding("schema", FAIL, f"version {facts.version}; this release needs {SCHEMA_VERSION}", MIGRATE)
    if facts.version < newest:
        return Finding("schema", WARN, f"version {facts.version}; this release has {newest}", MIGRATE)
    if facts.version > newest:
        return Finding("schema", OK, f"version {facts.version}, of a later release; this one knows {newest}")
    return Finding("schema", OK, f"version {facts.version}")


def _indexes(facts: Facts) -> Finding:
    missing = sorted(set(INDEXES) - set(facts.indexes))
    if not missing:
        return Finding("indexes", OK, "all there and valid")
    without_key = f"{TABLE}_pkey" in missing
    return Finding(
        "indexes",
        FAIL if without_key else WARN,
        f"missing or invalid: {', '.join(missing)}",
        "Without the primary key two claims can win. REINDEX it, or restore it from the migration's SQL."
        if without_key
        else "Reaping or listing reads the whole table. REINDEX them, or make them by the migration's SQL.",
    )


def _privileges(facts: Facts) -> Finding:
    if not facts.lacking:
        if not facts.lacking_phased:
            return Finding("privileges", OK, "read, insert, update, delete")
        lacking, on = ", ".join(facts.lacking_phased), worklist(TABLE)
        return Finding(
            "privileges",
            WARN,
            f"this user lacks {lacking} on {on}, which reaping, evicting and phases need",
            f"GRANT {lacking} ON {on} TO it, where it does.",
        )
    lacking = ", ".join(facts.lacking)
    return Finding(
        "privileges", FAIL, f"this user lacks {lacking}", f"GRANT {lacking} ON {TABLE}, {markers(TABLE)} TO it."
    )


def _order(numbering: Numbering) -> Finding:
    if disorder := numbering.disorder:
        why, mend = disorder
        return Finding(
            "outbox order",
            FAIL,
            f"numbers do not order messages: {why}",
            f"Stop the applications that add messages, and: {mend}",
        )
    if not numbering.known:
        return Finding("outbox order", OK, "CACHE 1; this user may not ask for the last number")
    return Finding("outbox order", OK, "numbers are ahead of all messages, CACHE 1")


def _durability(facts: Facts) -> Finding:
    off = [name for name in ("fsync", "full_page_writes") if getattr(facts, name) == "off"]
    if not off:
        return Finding("durability", OK, "fsync on")
    return Finding(
        "durability",
        FAIL,
        f"{' and '.join(off)} off: a crash of the machine can lose or corrupt what was answered",
        "Turn it on; nothing that matters belongs on such a server.",
    )


def _commit(facts: Facts) -> Finding:
    if facts.synchronous_commit != "off":
        return Finding("commit", OK, f"synchronous_commit {facts.synchronous_commit}")
    return Finding(
        "commit",
        FAIL,
        "synchronous_commit off: a crash loses the last commits, and their operations run again",
        "ALTER ROLE or ALTER DATABASE … SET synchronous_commit = on for the store's connections.",
    )


def _isolation(facts: Facts) -> Finding:
    if facts.isolation in ("read committed", "read uncommitted"):
        return Finding("isolation", OK, facts.isolation)
    return Finding(
        "isolation",
        OK,
        f"{facts.isolation} by default; the store asks for read committed, and is safe behind a pooler too",
    )
