"""The text of PostgreSQL's statements; `postgres` says why they look as they do."""

from __future__ import annotations

from enum import Enum, IntEnum
from functools import cache

TABLE = "retryproof_operations"
WORKLIST = "retryproof_phased"
MARKERS = "retryproof_markers"


class ClaimCase(IntEnum):
    """What a claim found. The first four are written; a missing answer was not taken yet, or lost a race."""

    ABSENT = 1
    EXPIRED = 2
    RELEASED = 3
    TAKEN_OVER = 4
    REPEATED = 5
    RUNNING = 6
    FINISHED = 7
    MISMATCH = 8
    REFUSED = 9
    POISONED = 10
    COMMITTED = 11


class Items(Enum):
    """How a statement is given its items.

    ONE: by plain values, which halves the cost of the statement's start. MANY: by an array a column. ALIKE: where the
    strings of each column have one length, by one long string a column, which the server cuts: a driver encodes a
    string at once and an array item by item, at a third of a microsecond each. And what is the same for all is given
    once.
    """

    ONE = 1
    MANY = 2
    ALIKE = 3


NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
_CLOCK = f"SELECT {NOW} AS now"

_CLAIM = """
WITH clock AS MATERIALIZED ({clock}),
seen AS MATERIALIZED (
    SELECT asked.*, clock.now,
        r.token AS seen_token, r.state AS seen_state, r.lease_until AS seen_lease,
        r.attempt, r.first_seen, r.birth, r.trace AS seen_trace, r.checkpoints, r.result,
        r.fingerprint AS seen_fingerprint,
        CASE
            WHEN r.token IS NULL THEN 1
            WHEN {settled} AND clock.now >= r.expires_at THEN 2
            WHEN r.fingerprint <> asked.fingerprint THEN 8
            WHEN r.state >= 3 THEN 7
            WHEN r.state = 2 AND r.nonce = asked.nonce THEN 6 -- late: its attempt is over, nobody would run this one
            WHEN r.state = 2 AND asked.abandoned < 2 AND r.committed THEN 11
            WHEN r.state = 2 AND asked.abandoned = 1 AND r.attempt > 1 THEN 9
            WHEN r.state = 2 THEN 3
            WHEN r.nonce = asked.nonce THEN 5
            WHEN clock.now < r.lease_until THEN 6
            WHEN asked.abandoned < 2 AND r.committed THEN 11
            WHEN asked.abandoned = 1 THEN 9
            WHEN r.deaths + r.counts::int >= asked.max_attempts THEN 10
            ELSE 4
        END AS found
    FROM {asked}
    CROSS JOIN clock
    LEFT JOIN LATERAL (
        SELECT o.*, CASE WHEN o.state <= 2 THEN {committed} ELSE false END AS committed
        FROM {table} AS o WHERE o.id = asked.id LIMIT 1
    ) AS r ON true
),{taken}
inserted AS (
    INSERT INTO {table} (id, state, fingerprint, birth, nonce, token, attempt, deaths, counts, first_seen,
                         lease_until, expires_at, retention, tenant, trace)
    SELECT id, 1, fingerprint, nonce, nonce, now, 1, 0, alone = 2, now, now + lease, now + unsettled, retention,
           tenant, trace
    FROM seen
    WHERE CASE WHEN found = 1 THEN pg_try_advisory_xact_lock(lock_key) ELSE false END
    ON CONFLICT (id) DO NOTHING
    RETURNING id, token
)
SELECT string_agg(id, ''::bytea), 1, max(token), 1, NULL::bigint, NULL::bytea, NULL::bytea, NULL::text, NULL::bytea
FROM inserted HAVING count(*) > 0
UNION ALL{taken_rows}
SELECT id, found, CASE found WHEN 6 THEN greatest(seen_lease - now, 0) ELSE seen_token END, attempt, first_seen, birth,
       seen_trace, CASE found WHEN 5 THEN checkpoints::text END,
       CASE found WHEN 7 THEN result WHEN 8 THEN seen_fingerprint END
FROM seen WHERE found >= 5
"""
_TAKEN = """
taken AS (
    UPDATE {table} AS o SET
        state = 1,
        fingerprint = s.fingerprint,
        nonce = s.nonce,
        token = greatest(o.token + 1, s.now),
        counts = s.alone = 2 OR (s.found = 4 AND s.alone = 1),
        lease_until = s.now + s.lease,
        expires_at = s.now + s.unsettled,
        retention = s.retention,
        result = NULL,
        birth = CASE s.found WHEN 2 THEN s.nonce ELSE o.birth END,
        attempt = CASE s.found WHEN 2 THEN 1 WHEN 4 THEN o.attempt + 1 ELSE o.attempt END,
        deaths = CASE s.found WHEN 2 THEN 0 WHEN 4 THEN o.deaths + o.counts::int ELSE o.deaths END,
        first_seen = CASE s.found WHEN 2 THEN s.now ELSE o.first_seen END,
        tenant = CASE s.found WHEN 2 THEN s.tenant ELSE o.tenant END,
        trace = CASE s.found WHEN 2 THEN s.trace ELSE o.trace END,
        checkpoints = CASE s.found WHEN 2 THEN NULL ELSE o.checkpoints END
    FROM (
        SELECT s.*, locked.place FROM seen AS s
        CROSS JOIN LATERAL (
            SELECT o.ctid AS place FROM {table} AS o
            WHERE o.id = s.id AND o.token = s.seen_token AND o.state = s.seen_state AND o.lease_until = s.seen_lease
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS locked
        WHERE s.found IN (2, 3, 4)
    ) AS s
    WHERE o.ctid = s.place
    RETURNING o.id, s.found, o.token, o.attempt, o.first_seen, o.birth, o.trace, o.checkpoints
),"""
_TAKEN_ROWS = """
SELECT id, found, token, attempt, first_seen, birth, trace, checkpoints::text, NULL FROM taken
UNION ALL"""

_FENCED = """
WITH clock AS MATERIALIZED ({clock})
UPDATE {table} AS o SET {changes}
FROM (
    SELECT asked.*, clock.now, locked.place
    FROM (SELECT * FROM {asked} {order}) AS asked
    CROSS JOIN clock
    CROSS JOIN LATERAL (
        SELECT o.ctid AS place FROM {table} AS o
        WHERE o.id = asked.id AND o.nonce = asked.nonce AND o.token = asked.token AND o.state = 1
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS locked
) AS s
WHERE o.ctid = s.place
"""

_CLAIMED = {
    "id": "bytea",
    "fingerprint": "bytea",
    "nonce": "bytea",
    "tenant": "bytea",
    "trace": "bytea",
    "alone": "bigint",
    "lock_key": "bigint",
}
_TERMS = {
    "lease": "bigint",
    "retention": "bigint",
    "unsettled": "bigint",
    "abandoned": "bigint",
    "max_attempts": "bigint",
}
_FENCE = {"id": "bytea", "nonce": "bytea", "token": "bigint"}

_LOOK = """
WITH nap AS MATERIALIZED (SELECT pg_sleep({nap}::float8))
SELECT r.id, r.state
FROM nap
CROSS JOIN {asked}
CROSS JOIN LATERAL (
    SELECT o.id, o.state FROM {table} AS o
    WHERE o.id = asked.id AND o.nonce = asked.nonce AND o.token = asked.token LIMIT 1
) AS r
"""

RECORD = """o.id, o.state, o.fingerprint, o.birth, o.nonce, o.token, o.attempt, o.deaths, o.counts, o.first_seen,
    o.lease_until, o.expires_at, o.retention, o.tenant, o.trace"""

_GET = """
WITH clock AS MATERIALIZED ({clock})
SELECT {record}, o.result, o.checkpoints::text, clock.now, {committed}
FROM unnest($1::bytea[]) AS asked (id)
CROSS JOIN clock
CROSS JOIN LATERAL (SELECT * FROM {table} AS o WHERE o.id = asked.id LIMIT 1) AS o
WHERE NOT ({settled} AND clock.now >= o.expires_at)
"""

_SCAN = """
WITH clock AS MATERIALIZED ({clock})
SELECT {record}, NULL::bytea, o.checkpoints::text, clock.now, {committed}
FROM {table} AS o CROSS JOIN clock
WHERE o.id >= $1 AND ($2::bytea IS NULL OR o.id < $2) AND o.id > $3
    AND ($4::int IS NULL OR o.state = $4)
    AND NOT ({settled} AND clock.now >= o.expires_at)
    {tenant}
ORDER BY o.id
LIMIT $5
"""

_EVICT = """
WITH clock AS MATERIALIZED ({clock}),
gone AS (
    DELETE FROM {table} WHERE id = ANY (ARRAY(
        SELECT r.id FROM unnest($1::bytea[]) AS asked (id)
        CROSS JOIN clock
        CROSS JOIN LATERAL (
            SELECT o.id FROM {table} AS o WHERE o.id = asked.id AND NOT (o.state = 1 AND clock.now < o.lease_until)
            FOR UPDATE SKIP LOCKED
        ) AS r
    ))
    RETURNING id
),
delisted AS (
    DELETE FROM {worklist} WHERE id = ANY (ARRAY(SELECT id FROM gone))
),
unmarked AS (
    DELETE FROM {markers} WHERE id = ANY (ARRAY(SELECT id FROM gone))
)
SELECT r.id FROM unnest($1::bytea[]) AS asked (id)
CROSS JOIN LATERAL (SELECT o.id FROM {table} AS o WHERE o.id = asked.id LIMIT 1) AS r
WHERE r.id NOT IN (SELECT id FROM gone)
"""

_REAP = """
WITH clock AS MATERIALIZED ({clock}),
over AS MATERIALIZED (
    SELECT o.*, row_number() OVER () <= $1 AS within, {settled} AS settled
    FROM (
        SELECT o.* FROM {table} AS o
        WHERE o.expires_at <= (SELECT now FROM clock)
            AND NOT (o.state = 1 AND o.lease_until > (SELECT now FROM clock))
            AND NOT o.id = ANY ($2::bytea[])
        ORDER BY o.expires_at
        LIMIT $1::bigint + 1
        FOR UPDATE SKIP LOCKED
    ) AS o
),
gone AS (
    DELETE FROM {table} WHERE id = ANY (ARRAY(SELECT id FROM over WHERE within AND settled))
),
delisted AS (
    DELETE FROM {worklist} WHERE id = ANY (ARRAY(SELECT id FROM over WHERE within AND settled))
),
unmarked AS (
    DELETE FROM {markers} WHERE id = ANY (ARRAY(SELECT id FROM over WHERE within AND settled))
)
SELECT {record}, NULL::bytea, o.checkpoints::text, clock.now, {committed}, o.within, NOT o.settled
FROM over AS o CROSS JOIN clock
"""

_END = """
WITH clock AS MATERIALIZED ({clock}),
gone AS (
    DELETE FROM {table} WHERE id = ANY (ARRAY(
        SELECT r.id FROM unnest($1::bytea[], $2::bytea[], $3::bigint[]) AS told (id, nonce, token)
        CROSS JOIN clock
        CROSS JOIN LATERAL (
            SELECT o.id FROM {table} AS o
            WHERE o.id = told.id AND o.nonce = told.nonce AND o.token = told.token
                AND o.expires_at <= clock.now AND NOT (o.state = 1 AND o.lease_until > clock.now)
            FOR UPDATE SKIP LOCKED
        ) AS r
    ))
    RETURNING id
),
delisted AS (
    DELETE FROM {worklist} WHERE id = ANY (ARRAY(SELECT id FROM gone))
),
unmarked AS (
    DELETE FROM {markers} WHERE id = ANY (ARRAY(SELECT id FROM gone))
)
SELECT id FROM gone
"""


def _asked(columns: dict[str, str], *, one: bool) -> str:
    """The items of a batch as a table: from an array a column, or from plain values, which is quicker for one."""
    if one:
        values = ", ".join(f"${place}::{type}" for place, type in enumerate(columns.values(), 1))
        return f"(SELECT {values}) AS asked ({', '.join(columns)})"
    arrays = ", ".join(f"${place}::{type}[]" for place, type in enumerate(columns.values(), 1))
    return f"unnest({arrays}) AS asked ({', '.join(columns)})"


def _cut(parameter: str, count: str) -> str:
    """The string of item `place` in a parameter that is the strings of all items, of one length, in a row."""
    length = f"(octet_length({parameter}::bytea) / {count})"
    return f"substr({parameter}::bytea, ((place - 1) * {length} + 1)::int, {length})"


_ALIKE_CLAIMS = f"""(
    SELECT {_cut("$1", "cardinality($7::bigint[])")} AS id, {_cut("$2", "cardinality($7::bigint[])")} AS fingerprint,
        {_cut("$3", "cardinality($7::bigint[])")} AS nonce, {_cut("$4", "cardinality($7::bigint[])")} AS tenant,
        {_cut("$5", "cardinality($7::bigint[])")} AS trace, get_byte($6::bytea, (place - 1)::int) AS alone, lock_key,
        $8::bigint AS lease, $9::bigint AS retention, $10::bigint AS unsettled, $11::bigint AS abandoned,
        $12::bigint AS max_attempts
    FROM unnest($7::bigint[]) WITH ORDINALITY AS keys (lock_key, place)
) AS asked"""
_ALIKE_COMPLETIONS = f"""(
    SELECT {_cut("$1", "cardinality($3::bigint[])")} AS id, {_cut("$2", "cardinality($3::bigint[])")} AS nonce, token,
        result
    FROM unnest($3::bigint[], $4::bytea[]) WITH ORDINALITY AS given (token, result, place)
) AS asked"""


def _settled(row: str, committed: str) -> str:
    """Whether the outcome of a row's operation is known; as `core.record.Record.settled`."""
    known = f"{row}.checkpoints IS NULL AND {row}.attempt = 1 AND NOT {committed}"
    return f"({row}.state >= 3 OR {row}.state = 2 AND {known})"


def committed(row: str, table: str) -> str:
    """Whether a marker of this life of the record is there. With LIMIT, so that nobody hashes the whole table."""
    return (
        f"(SELECT true FROM {markers(table)} AS m WHERE m.id = {row}.id AND m.token >= {row}.first_seen LIMIT 1) "
        "IS NOT NULL"
    )


@cache
def claim(table: str, items: Items, *, taking: bool) -> str:
    """Claim a batch, or one item. taking: rows that are there as well (the cases from EXPIRED to TAKEN_OVER)."""
    return _CLAIM.format(
        clock=_CLOCK,
        table=table,
        asked=_ALIKE_CLAIMS if items is Items.ALIKE else _asked(_CLAIMED | _TERMS, one=items is Items.ONE),
        settled=_settled("r", "r.committed"),
        committed=committed("o", table),
        taken=_TAKEN.format(table=table) if taking else "",
        taken_rows=_TAKEN_ROWS if taking else "",
    )


@cache
def complete(table: str, items: Items, *, listed: bool = False) -> str:
    """Settle a batch with results. listed: take them off the completer's worklist as well."""
    asked = _ALIKE_COMPLETIONS if items is Items.ALIKE else _asked(_FENCE | {"result": "bytea"}, one=items is Items.ONE)
    settling = _update_fenced(table, completed("s.result", "s.now"), asked, one=items is Items.ONE)
    return _delisting(table, settling, listed)


def completed(result: str, now: str) -> str:
    """The changes that settle a row, whose result and time are expressions."""
    return f"""state = CASE WHEN {result} IS NULL THEN 4 ELSE 3 END, result = {result}, checkpoints = NULL,
        expires_at = {now} + o.retention, lease_until = {now}"""


def _delisting(table: str, settling: str, listed: bool) -> str:
    if not listed:
        return settling
    return f"WITH done AS ({settling}RETURNING o.id), {gone(table)} SELECT FROM done"


def gone(table: str) -> str:
    """A part of WITH that takes off the completer's worklist what `done` has."""
    return f"gone AS (DELETE FROM {worklist(table)} WHERE id = ANY (ARRAY(SELECT id FROM done)))"


def worklist(table: str) -> str:
    """The completer's worklist beside a table of operations."""
    return f"{table.removesuffix(TABLE)}{WORKLIST}"


def markers(table: str) -> str:
    """The markers of callers' transactions beside a table of operations."""
    return f"{table.removesuffix(TABLE)}{MARKERS}"


@cache
def release(table: str, *, one: bool = False) -> str:
    """Give a batch back."""
    changes = """state = 2, result = NULL, lease_until = s.now,
        attempt = CASE WHEN s.settles THEN 1 ELSE o.attempt END,
        deaths = CASE WHEN s.settles THEN 0 ELSE o.deaths END,
        expires_at = CASE WHEN o.checkpoints IS NULL AND (s.settles OR o.attempt = 1) THEN s.now + o.retention
            ELSE o.expires_at END"""
    return _fenced(table, changes, {"settles": "bool"}, one=one)


@cache
def renew(table: str, *, one: bool = False) -> str:
    """Extend the leases of a batch."""
    changes = "lease_until = greatest(o.lease_until, s.now + s.lease), counts = o.counts AND s.alone"
    return _fenced(table, changes, {"lease": "bigint", "alone": "bool"}, one=one)


@cache
def checkpoint(table: str, *, one: bool = False) -> str:
    """Keep a value for each item of a batch."""
    return _fenced(table, checkpointed("s.name", "s.value"), {"name": "text", "value": "text"}, one=one)


def checkpointed(name: str, value: str) -> str:
    """The changes that keep a value under a name; both are base64."""
    return f"checkpoints = coalesce(o.checkpoints, '{{}}') || jsonb_build_object({name}, {value})"


def _fenced(table: str, changes: str, columns: dict[str, str], *, one: bool) -> str:
    return f"{_update_fenced(table, changes, _asked(_FENCE | columns, one=one), one=one)}RETURNING o.id\n"


def _update_fenced(table: str, changes: str, asked: str, *, one: bool) -> str:
    order = "" if one else "ORDER BY id"
    return _FENCED.format(clock=_CLOCK, table=table, changes=changes, asked=asked, order=order)


def unmark(table: str) -> str:
    """Remove the markers of a batch."""
    return f"DELETE FROM {markers(table)} WHERE id = ANY ($1::bytea[]) RETURNING id"


@cache
def look(table: str) -> str:
    """The states of those records whose nonce and token are current, after a nap."""
    return _LOOK.format(table=table, asked=_asked(_FENCE, one=False), nap=f"${len(_FENCE) + 1}")


@cache
def get(table: str) -> str:
    """Read a batch."""
    return _GET.format(
        clock=_CLOCK,
        table=table,
        record=RECORD,
        settled=_settled("o", committed("o", table)),
        committed=committed("o", table),
    )


@cache
def scan(table: str, *, tenant: bool, indexed: bool) -> str:
    """Read a page; `indexed` says that the tenant's index has what is asked for."""
    condition = "AND o.tenant = $6" if tenant else ""
    if indexed:
        condition += " AND o.tenant <> ''::bytea"  # or the planner would not know that the partial index will do
    return _SCAN.format(
        clock=_CLOCK,
        table=table,
        record=RECORD,
        tenant=condition,
        settled=_settled("o", committed("o", table)),
        committed=committed("o", table),
    )


@cache
def evict(table: str) -> str:
    """Forget a batch; answers with what is still there."""
    return _EVICT.format(clock=_CLOCK, table=table, worklist=worklist(table), markers=markers(table))


@cache
def reap(table: str) -> str:
    """See some records whose time is over, but for those that are named, and one more if there is one; remove those of
    them that are settled.

    With them goes what the completer's worklist has of them: nobody's input outlives its operation.
    """
    return _REAP.format(
        clock=_CLOCK,
        table=table,
        worklist=worklist(table),
        markers=markers(table),
        record=RECORD,
        settled=_settled("o", committed("o", table)),
        committed=committed("o", table),
    )


@cache
def end(table: str) -> str:
    """Remove unsettled records whose end was told, as long as they are what they were; answers with those."""
    return _END.format(clock=_CLOCK, table=table, worklist=worklist(table), markers=markers(table))
