"""The tables of the outbox on SQLite, as steps: each release appends its own, and no step changes."""

from __future__ import annotations

from retryproof.sql.sqlite.schema import Part

_FIRST = (
    """CREATE TABLE IF NOT EXISTS retryproof_outbox (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    parked INTEGER NOT NULL DEFAULT 0,
    alone INTEGER NOT NULL DEFAULT 0,
    id TEXT NOT NULL,
    chain BLOB NOT NULL,
    topic TEXT NOT NULL,
    key TEXT,
    headers TEXT,
    content_type TEXT,
    trace TEXT,
    reason TEXT,
    payload BLOB NOT NULL
)""",
    "CREATE INDEX IF NOT EXISTS retryproof_outbox_ready ON retryproof_outbox (partition, sequence) WHERE NOT parked",
    """CREATE INDEX IF NOT EXISTS retryproof_outbox_parked ON retryproof_outbox (partition, chain, sequence)
    WHERE parked""",
    "CREATE INDEX IF NOT EXISTS retryproof_outbox_alone ON retryproof_outbox (partition, chain) WHERE alone",
    """CREATE TABLE IF NOT EXISTS retryproof_outbox_blocked (
    partition INTEGER NOT NULL,
    chain BLOB NOT NULL,
    due_at INTEGER NOT NULL,
    alone INTEGER NOT NULL,
    PRIMARY KEY (partition, chain)
) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS retryproof_outbox_blocked_due ON retryproof_outbox_blocked (partition, alone, due_at)",
    """CREATE TABLE IF NOT EXISTS retryproof_outbox_dead (
    id TEXT PRIMARY KEY,
    sequence INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    died_at INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    chain BLOB NOT NULL,
    topic TEXT NOT NULL,
    key TEXT,
    headers TEXT,
    content_type TEXT,
    trace TEXT,
    reason TEXT NOT NULL,
    payload BLOB NOT NULL
)""",
    "CREATE INDEX IF NOT EXISTS retryproof_outbox_dead_died_at ON retryproof_outbox_dead (died_at, id)",
    """CREATE TABLE IF NOT EXISTS retryproof_outbox_relays (
    id TEXT PRIMARY KEY,
    lease_until INTEGER NOT NULL,
    strict INTEGER NOT NULL,
    flight TEXT NOT NULL DEFAULT '[]'
)""",
    "CREATE TABLE IF NOT EXISTS retryproof_outbox_partitions (partition INTEGER PRIMARY KEY, relay TEXT)",
    """CREATE TABLE IF NOT EXISTS retryproof_outbox_settings (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    partitions INTEGER NOT NULL
)""",
)

_ROUTES_AND_AGES = (
    "ALTER TABLE retryproof_outbox ADD COLUMN failed_at INTEGER",
    "ALTER TABLE retryproof_outbox ADD COLUMN answers INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE retryproof_outbox ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE retryproof_outbox_relays ADD COLUMN routes TEXT",
)
"""See the migration of the same name for PostgreSQL."""

SQLITE_OUTBOX = Part("outbox", "retryproof_outbox", (_FIRST, _ROUTES_AND_AGES))
