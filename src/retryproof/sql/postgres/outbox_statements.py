"""The statements of the outbox on PostgreSQL, by name; `{…}` are its tables, `:name` are parameters.
Long lists of numbers come as text (`{1,2}`): asyncpg takes three times as long for the elements of an array.

Messages are ordered by a number alone, which is drawn when one is added. Who saw another's commit before has a higher
number, and a claim that sees it sees the other's as well; so what a claim takes in this order is in order, and waits
for no other transaction. Two transactions that did not see each other may go out either way.

Claims begin at floors (`retryproof.outbox.floors`), which spare the walk over what was deleted and not yet
vacuumed. They rest on a transaction having its id before it draws a number: `xid` is the first column, and its default
asks for the id, so it is evaluated before the number.

`sequence + 0` is what the indexes by partition hold. With a bare number the planner may take the primary key instead,
which has the same order, and read the whole table for a partition that is empty.
"""

from __future__ import annotations

from retryproof.core.message import UNCOUNTED
from retryproof.sql.outbox import HELD
from retryproof.sql.postgres.statements import NOW

_NOW_FAST = "(date_part('epoch', clock_timestamp()) * 1000000)::bigint"
"""The same by floating point, which is exact to the microsecond until the year 2255, and faster than `numeric`."""
STARTED = "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint"
ALL = -1
"""In place of a partition where the order is strict: what is held back is everything, and its queue is empty."""

_SENT = "id, topic, payload, key, headers, content_type, trace, attempts, created_at"
_KEPT = f"{_SENT}, sequence, partition, chain"
_MESSAGE = f"{_KEPT}, failed_at, answers, deaths"
"""As Message has them, which is made from a row as it comes."""
_TAKEN = f"{_MESSAGE}, was_parked, xid"


def _xids(numbers: str) -> str:
    """The transaction ids of messages, in their order: relays of the release before bury others by both."""
    return f"""ARRAY(
        SELECT coalesce(o.xid, 0) FROM unnest({numbers}) WITH ORDINALITY AS s(sequence, place)
        LEFT JOIN {{outbox}} o ON o.sequence = s.sequence ORDER BY s.place
    )"""


def _fenced(slow: str = "") -> str:
    """The relay's row, locked and extended; slow: what stays in flight."""
    flight = f"flight_xids = {_xids(slow)}, flight = {slow}" if slow else "flight_xids = '{{}}', flight = '{{}}'"
    return f"""held AS MATERIALIZED (
    UPDATE {{relays}} SET {flight}, lease_until = {NOW} + :lease::bigint
    WHERE id = :relay::uuid RETURNING id
)"""


_ENDED = """gone AS (
    DELETE FROM {outbox} o USING held, unnest(:done::text::bigint[]) d(sequence) WHERE o.sequence = d.sequence
)"""
_GIVEN_UP = f"""dead AS (
    DELETE FROM {{outbox}} o
    USING held, unnest(:dead::bigint[], :dead_attempts::int[], :dead_reasons::text[]) d(sequence, tried, why)
    WHERE o.sequence = d.sequence RETURNING o.*, d.tried, d.why
), letters AS (
    INSERT INTO {{letters}} ({_KEPT}, reason, died_at)
    SELECT {_KEPT.replace("attempts", "tried")}, why, {NOW} FROM dead
    ON CONFLICT (id) DO UPDATE SET reason = excluded.reason, died_at = excluded.died_at, attempts = excluded.attempts
), fails AS MATERIALIZED (
    SELECT f.* FROM held, unnest(
        :failed::bigint[], :failed_attempts::int[], :failed_reasons::text[], :delays::bigint[], :answers::int[])
        f(sequence, tried, why, delay, answers)
), ended AS MATERIALIZED (SELECT unnest(:done::text::bigint[] || :dead::bigint[]) AS sequence)"""
_FAILED = f"""attempts = f.tried, reason = f.why,
        alone = o.alone AND f.answers = {UNCOUNTED},
        answers = CASE WHEN f.answers = {UNCOUNTED} THEN o.answers ELSE f.answers END,
        failed_at = CASE WHEN f.answers = {UNCOUNTED} THEN o.failed_at ELSE coalesce(o.failed_at, {NOW}) END"""
_ADD = "id, partition, chain, topic, payload, key, headers, content_type, trace"


def _seen(xids: str, lows: str, server: str) -> str:
    """What the claim's snapshot says of transactions: where to begin at the most, and which are open still."""
    return f"""snapshot AS MATERIALIZED (
    SELECT txid_current_snapshot() AS snapshot, txid_current() AS own, {STARTED} AS started
), known AS MATERIALIZED (
    SELECT k.xid, k.low, txid_visible_in_snapshot(k.xid, snapshot) AS over
    FROM snapshot, unnest({xids}::bigint[], {lows}::bigint[]) AS k(xid, low)
), seen AS MATERIALIZED (
    SELECT CASE WHEN started = {server}::bigint THEN (SELECT min(low) FROM known WHERE over) ELSE 0 END AS low,
        ARRAY(SELECT xid FROM known WHERE NOT over UNION SELECT txid_snapshot_xip(snapshot) FROM snapshot) AS running,
        txid_snapshot_xmax(snapshot) < own AS unlisted, own, started
    FROM snapshot
)"""


def _answer(suspects: str, waiting: str) -> str:
    """A row about the claim, as JSON in the place of headers, and one for each message, with the columns of Message.

    Columns of its own for the claim would be in each message's row, and would be read there.
    """
    about = f"""json_build_array(EXISTS (SELECT FROM held), {suspects}, {waiting}, low, running, unlisted, own, started
)::text"""
    columns = [about if column == "headers" else "NULL" for column in _MESSAGE.split(", ")]
    return f"SELECT {', '.join(columns)}, NULL FROM seen UNION ALL SELECT {_MESSAGE}, was_parked FROM taken"


_SUSPECTS = f"""EXISTS (SELECT FROM {{blocked}}) AND EXISTS (
        SELECT FROM owned o JOIN {{blocked}} b ON b.partition = o.partition AND b.alone AND b.due_at <= {NOW}
    )"""
_WAITING = "(SELECT array_agg(partition) FROM found WHERE waits)"

STATEMENTS = {
    "add": f"""INSERT INTO {{outbox}} ({_ADD}, created_at)
SELECT :id::uuid, :partition::int, :queue::bytea, :topic::text, :payload::bytea, :key::text, :headers::text,
    :content_type::text, :trace::text, {_NOW_FAST}
FROM {{settings}} WHERE partitions = :partitions::int""",
    "add_many": f"""INSERT INTO {{outbox}} ({_ADD})
SELECT m.id, m.partition, m.chain, m.topic, m.payload, m.key, m.headers, m.content_type, m.trace
FROM {{settings}}, unnest(:ids::text[]::uuid[], :in_partitions::int[], :queues::bytea[], :topics::text[],
    :payloads::bytea[], :keys::text[], :headers::text[], :content_types::text[], :traces::text[]
) WITH ORDINALITY AS m({_ADD}, place)
WHERE partitions = :partitions::int ORDER BY m.place""",
    "partition_number": "SELECT partitions FROM {settings}",
    "settings": """SELECT partitions, cluster, (
    SELECT max(xid) FROM ((SELECT xid FROM {outbox} ORDER BY sequence LIMIT 1)
        UNION ALL (SELECT xid FROM {outbox} ORDER BY sequence DESC LIMIT 1)) AS ends
), txid_snapshot_xmax(txid_current_snapshot()), quote_ident(current_user),
has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE') FROM {settings}""",
    "sequence": """SELECT s.seqrelid::regclass::text, s.seqcache, s.seqincrement,
has_table_privilege('{outbox}', 'SELECT')
FROM pg_catalog.pg_sequence s WHERE s.seqrelid = pg_get_serial_sequence('{outbox}', 'sequence')::regclass""",
    "highest": "SELECT max(sequence) FROM {outbox}",
    "last_number": """SELECT CASE WHEN has_sequence_privilege(s.id, 'SELECT')
THEN coalesce(pg_sequence_last_value(s.id), 0) END
FROM (SELECT pg_get_serial_sequence('{outbox}', 'sequence')::regclass AS id) s""",
    "server": "SELECT system_identifier::text FROM pg_catalog.pg_control_system()",
    "own": "UPDATE {settings} SET cluster = :cluster::text WHERE cluster IS NULL RETURNING 1",
    "join": f"""INSERT INTO {{relays}} (id, lease_until, strict, routes)
SELECT :relay::uuid, {NOW} + :lease::bigint, :strict::boolean, :routes::text
WHERE NOT EXISTS (SELECT FROM {{relays}} WHERE strict <> :strict::boolean OR routes IS DISTINCT FROM :routes::text)
ON CONFLICT (id) DO NOTHING""",
    "rivals": """SELECT EXISTS (SELECT FROM {relays} WHERE id = :relay::uuid), (
    SELECT bool_or(strict <> :strict::boolean) FROM {relays}
    WHERE id <> :relay::uuid AND (strict <> :strict::boolean OR routes IS DISTINCT FROM :routes::text)
)""",
    "renew": f"UPDATE {{relays}} SET lease_until = {NOW} + :lease::bigint WHERE id = :relay::uuid RETURNING {NOW}",
    "bury": f"""WITH over AS MATERIALIZED (
    SELECT id FROM {{relays}} WHERE lease_until < {NOW} FOR UPDATE SKIP LOCKED
), buried AS (
    DELETE FROM {{relays}} r USING over WHERE r.id = over.id RETURNING r.*
), suspects AS (
    UPDATE {{outbox}} o SET parked = NOT f.strict, alone = true, attempts = o.attempts + o.alone::int,
        deaths = o.deaths + o.alone::int, failed_at = coalesce(o.failed_at, greatest(f.lease_until, o.created_at))
    FROM (SELECT strict, lease_until, unnest(flight) AS sequence FROM buried) f WHERE o.sequence = f.sequence
    RETURNING CASE WHEN f.strict THEN {ALL} ELSE o.partition END AS partition,
        CASE WHEN f.strict THEN ''::bytea ELSE o.chain END AS chain
), marked AS (
    INSERT INTO {{blocked}} (partition, chain, due_at, alone)
    SELECT DISTINCT partition, chain, 0, true FROM suspects
    ON CONFLICT (partition, chain) DO UPDATE SET due_at = 0, alone = true
)
SELECT count(*) FROM buried""",
    "target": f"""SELECT (SELECT partitions FROM {{settings}}),
(SELECT count(*) FROM {{relays}} WHERE lease_until > {NOW} OR id = :relay::uuid),
(SELECT count(*) FROM {{partitions}} WHERE relay = :relay::uuid)
FROM {{relays}} WHERE id = :relay::uuid""",
    "give_up": """UPDATE {partitions} SET relay = NULL WHERE partition IN (
    SELECT partition FROM {partitions} WHERE relay = :relay::uuid AND partition <> ALL(:kept::int[])
    ORDER BY partition OFFSET :keep::bigint
) AND relay = :relay::uuid RETURNING 1""",
    "take": """WITH held AS MATERIALIZED (SELECT id FROM {relays} WHERE id = :relay::uuid FOR UPDATE)
UPDATE {partitions} p SET relay = held.id FROM held WHERE p.relay IS NULL AND p.partition IN (
    SELECT partition FROM {partitions} WHERE relay IS NULL ORDER BY partition LIMIT :count::bigint
    FOR UPDATE SKIP LOCKED
) RETURNING 1""",
    "mine": "SELECT partition FROM {partitions} WHERE relay = :relay::uuid ORDER BY partition",
    "leave": "DELETE FROM {relays} WHERE id = :relay::uuid AND flight = '{{}}' RETURNING 1",
    "claim": f"""WITH {_seen(":open", ":lows", ":server")}, held AS MATERIALIZED (
    SELECT id FROM {{relays}} WHERE id = :relay::uuid FOR UPDATE
), owned AS MATERIALIZED (
    SELECT p.partition, least(p.floor, seen.low) AS floor
    FROM held, seen, unnest(:partitions::text::int[], :floors::text::bigint[]) AS p(partition, floor)
), due AS MATERIALIZED (
    SELECT b.* FROM owned, LATERAL (
        SELECT partition, chain FROM {{blocked}} b
        WHERE b.partition = owned.partition AND b.alone = :alone::boolean AND b.due_at <= {NOW}
        ORDER BY b.due_at LIMIT :quota::bigint
    ) b WHERE EXISTS (SELECT FROM {{blocked}}) LIMIT :batch::bigint
), retried AS MATERIALIZED (
    SELECT o.* FROM held, due, LATERAL (
        SELECT {_MESSAGE}, true AS was_parked, xid FROM {{outbox}} o
        WHERE o.parked AND o.partition = due.partition AND o.chain = due.chain
        ORDER BY o.sequence + 0 LIMIT :quota::bigint
    ) o LIMIT :batch::bigint
), found AS MATERIALIZED (
    SELECT o.*, (
        SELECT true FROM {{blocked}} b WHERE b.partition = o.partition AND b.chain = o.chain LIMIT 1
    ) IS NOT NULL AS waits
    FROM owned, LATERAL (
        SELECT {_MESSAGE}, false AS was_parked, xid FROM {{outbox}} o
        WHERE o.partition = owned.partition AND NOT o.parked AND o.sequence + 0 >= owned.floor
        ORDER BY o.sequence + 0 LIMIT :quota::bigint
    ) o WHERE NOT :alone::boolean LIMIT :batch::bigint
), parking AS (
    UPDATE {{outbox}} o SET parked = true FROM found f WHERE f.waits AND o.sequence = f.sequence
), taken AS MATERIALIZED (
    SELECT {_TAKEN} FROM retried UNION ALL SELECT {_TAKEN} FROM found WHERE NOT waits
), in_flight AS (
    UPDATE {{relays}} r SET lease_until = {NOW} + :lease::bigint,
        flight_xids = {_xids(":slow::bigint[]")} || f.xids, flight = :slow::bigint[] || f.sequences
    FROM held, (
        SELECT coalesce(array_agg(xid), '{{{{}}}}') AS xids, coalesce(array_agg(sequence), '{{{{}}}}') AS sequences
        FROM taken
    ) f
    WHERE r.id = held.id
)
{_answer(_SUSPECTS, _WAITING)}""",
    "claim_strict": f"""WITH {_seen(":open", ":lows", ":server")}, held AS MATERIALIZED (
    SELECT id FROM {{relays}} WHERE id = :relay::uuid FOR UPDATE
), pause AS MATERIALIZED (
    SELECT due_at, alone FROM {{blocked}} WHERE partition = {ALL}
), found AS MATERIALIZED (
    SELECT o.* FROM held, seen, LATERAL (
        SELECT {_MESSAGE}, false AS was_parked, xid, alone FROM {{outbox}}
        WHERE sequence >= least(:floor::bigint, seen.low) AND NOT EXISTS (SELECT FROM pause WHERE due_at > {NOW})
        ORDER BY sequence LIMIT :batch::bigint
    ) o
), first_alone AS MATERIALIZED (
    SELECT min(sequence) AS sequence FROM found WHERE alone
), single AS MATERIALIZED (
    SELECT {_MESSAGE}, true AS was_parked, xid
    FROM (SELECT * FROM found ORDER BY sequence LIMIT 1) f WHERE f.alone
), taken AS MATERIALIZED (
    SELECT {_TAKEN} FROM single UNION ALL SELECT {_TAKEN} FROM found f
    WHERE NOT EXISTS (SELECT FROM first_alone a WHERE f.sequence >= a.sequence)
), in_flight AS (
    UPDATE {{relays}} r SET lease_until = {NOW} + :lease::bigint, flight_xids = f.xids, flight = f.sequences
    FROM held, (
        SELECT coalesce(array_agg(xid), '{{{{}}}}') AS xids, coalesce(array_agg(sequence), '{{{{}}}}') AS sequences
        FROM taken
    ) f
    WHERE r.id = held.id
)
{_answer("false", "NULL::int[]")}""",
    "finish_plain": f"WITH {_fenced()}, {_ENDED} SELECT count(*) FROM held",
    "finish": f"""WITH {_fenced(":slow::bigint[]")}, {_ENDED}, {_GIVEN_UP}, failing AS (
    UPDATE {{outbox}} o SET parked = true, {_FAILED},
        chain = CASE WHEN :passing::boolean AND f.answers <> {UNCOUNTED} THEN uuid_send(o.id) ELSE o.chain END
    FROM fails f WHERE o.sequence = f.sequence
    RETURNING o.partition, o.chain, o.sequence, o.alone, f.delay
), queues AS MATERIALIZED (
    SELECT t.partition, t.chain, count(o.sequence) AS more, coalesce(bool_or(o.alone), false) AS alone
    FROM held CROSS JOIN unnest(:free_partitions::int[], :free_queues::bytea[]) AS t(partition, chain)
    LEFT JOIN LATERAL (
        SELECT o.sequence, EXISTS (
            SELECT FROM {{outbox}} a WHERE a.alone AND a.partition = t.partition AND a.chain = t.chain
            AND NOT EXISTS (SELECT FROM ended e WHERE e.sequence = a.sequence)
            AND NOT EXISTS (SELECT FROM fails f WHERE f.sequence = a.sequence)) AS alone
        FROM {{outbox}} o WHERE o.parked AND o.partition = t.partition AND o.chain = t.chain
        AND NOT EXISTS (SELECT FROM ended e WHERE e.sequence = o.sequence)
        AND NOT EXISTS (SELECT FROM fails f WHERE f.sequence = o.sequence)
        LIMIT 1
    ) o ON true GROUP BY t.partition, t.chain
), unblocked AS (
    DELETE FROM {{blocked}} b USING queues l WHERE b.partition = l.partition AND b.chain = l.chain AND l.more = 0
), again AS (
    UPDATE {{blocked}} b SET due_at = 0, alone = l.alone FROM queues l
    WHERE b.partition = l.partition AND b.chain = l.chain AND l.more > 0
), blocking AS (
    INSERT INTO {{blocked}} (partition, chain, due_at, alone)
    SELECT f.partition, f.chain, {NOW} + f.delay, f.alone OR EXISTS (
        SELECT FROM {{outbox}} a WHERE a.alone AND a.partition = f.partition AND a.chain = f.chain
        AND a.sequence <> f.sequence
        AND NOT EXISTS (SELECT FROM ended e WHERE e.sequence = a.sequence))
    FROM failing f
    ON CONFLICT (partition, chain) DO UPDATE SET due_at = excluded.due_at, alone = excluded.alone
), slow AS MATERIALIZED (
    SELECT s.* FROM held,
        unnest(:slow::bigint[], :slow_partitions::int[], :slow_queues::bytea[]) s(sequence, partition, chain)
), waiting AS (
    UPDATE {{outbox}} o SET parked = true FROM slow s WHERE o.sequence = s.sequence AND NOT o.parked
), holding AS (
    INSERT INTO {{blocked}} (partition, chain, due_at, alone) SELECT partition, chain, {HELD}, false FROM slow s
    WHERE NOT EXISTS (
        SELECT FROM {{blocked}} b WHERE b.partition = s.partition AND b.chain = s.chain AND b.due_at = {HELD}
    )
    ON CONFLICT (partition, chain) DO UPDATE SET due_at = excluded.due_at
)
SELECT count(*) FROM held""",
    "finish_strict": f"""WITH {_fenced(":slow::bigint[]")}, {_ENDED}, {_GIVEN_UP}, failing AS (
    UPDATE {{outbox}} o SET {_FAILED}
    FROM fails f WHERE o.sequence = f.sequence RETURNING f.delay
), opened AS (
    DELETE FROM {{blocked}} b USING held WHERE b.partition = {ALL} AND NOT EXISTS (SELECT FROM fails)
), closed AS (
    INSERT INTO {{blocked}} (partition, chain, due_at, alone)
    SELECT {ALL}, ''::bytea, {NOW} + min(delay), false FROM failing HAVING count(*) > 0
    ON CONFLICT (partition, chain) DO UPDATE SET due_at = excluded.due_at
)
SELECT count(*) FROM held""",
    "stats": f"""SELECT (SELECT count(*) FROM {{outbox}}), (SELECT count(*) FROM {{outbox}} WHERE parked),
(SELECT count(*) FROM {{blocked}}), (SELECT count(*) FROM {{letters}}),
(SELECT count(*) FROM {{relays}} WHERE lease_until > {NOW}), (SELECT partitions FROM {{settings}}),
greatest(0, coalesce(({NOW} - (SELECT min(created_at) FROM {{outbox}})) / 1e6, 0))::float8""",
    "letters": f"""SELECT {_KEPT}, reason, died_at FROM {{letters}}
WHERE (:topic::text IS NULL OR topic = :topic::text)
AND (cardinality(:ids::text[]) = 0 OR id = ANY(:ids::text[]::uuid[]))
ORDER BY died_at, id LIMIT :limit::bigint""",
    "requeue": f"""WITH back AS (
    DELETE FROM {{letters}} WHERE id = ANY(:ids::text[]::uuid[]) RETURNING {_ADD}, created_at, sequence
), added AS (INSERT INTO {{outbox}} ({_ADD}, created_at) SELECT {_ADD}, created_at FROM back ORDER BY sequence)
SELECT count(*), count(*) FILTER (WHERE created_at < {NOW} - :remembered::bigint) FROM back""",
    "drop": """WITH dropped AS (DELETE FROM {letters} WHERE id = ANY(:ids::text[]::uuid[]) RETURNING 1)
SELECT count(*) FROM dropped""",
    "purge": f"""WITH old AS (
    SELECT id FROM {{letters}} WHERE died_at < {NOW} - :older_than::bigint ORDER BY died_at, id LIMIT :limit::bigint
    FOR UPDATE SKIP LOCKED
), purged AS (DELETE FROM {{letters}} l USING old WHERE l.id = old.id RETURNING 1)
SELECT count(*) FROM purged""",
    "adopt": """WITH owned AS (
    UPDATE {settings} SET cluster = NULL
), moved AS (UPDATE {outbox} SET xid = 0 RETURNING 1)
SELECT count(*) FROM moved""",
}
