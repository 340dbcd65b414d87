"""A hand-written inbox on PostgreSQL: a row a message in the consumer's transaction, one by one or by the hundred."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

TABLE = """
CREATE TABLE IF NOT EXISTS bench_inbox (
    source text NOT NULL,
    message_id text NOT NULL,
    fingerprint bytea NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, message_id)
);
CREATE INDEX IF NOT EXISTS bench_inbox_seen_at ON bench_inbox (seen_at)
"""
_TAKE = """
INSERT INTO bench_inbox (source, message_id, fingerprint) VALUES ($1, $2, $3)
ON CONFLICT DO NOTHING RETURNING message_id
"""
_TAKE_MANY = """
INSERT INTO bench_inbox (source, message_id, fingerprint)
SELECT $1, m.id, m.fingerprint FROM unnest($2::text[], $3::bytea[]) AS m (id, fingerprint) ORDER BY m.id
ON CONFLICT DO NOTHING RETURNING message_id
"""
_KNOWN = "SELECT message_id, fingerprint FROM bench_inbox WHERE source = $1 AND message_id = ANY ($2::text[])"

Incoming = tuple[str, bytes]


async def take(connection: Any, source: str, message: Incoming) -> bool:
    """Whether a message is new; raises for an id that was used with another payload."""
    return bool(await take_many(connection, source, [message]))


async def take_many(connection: Any, source: str, messages: Sequence[Incoming]) -> set[str]:
    """The ids that are new."""
    prints = {message_id: sha256(payload).digest() for message_id, payload in messages}
    if len(prints) == 1:
        ((message_id, fingerprint),) = prints.items()
        rows = await connection.fetch(_TAKE, source, message_id, fingerprint)
    else:
        rows = await connection.fetch(_TAKE_MANY, source, list(prints), list(prints.values()))
    fresh = {row[0] for row in rows}
    known = [message_id for message_id in prints if message_id not in fresh]
    if known:
        for message_id, fingerprint in await connection.fetch(_KNOWN, source, known):
            if prints[message_id] != fingerprint:
                raise ValueError(f"{message_id} was used with another payload")
    return fresh
