"""The inbox's statements on SQLite, and its tables, which are made at the first use (T4)."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.clock import wall_clock
from retryproof.sql.inbox import InboxPlans, InboxStatements
from retryproof.sql.named import Named, marks
from retryproof.sql.plan import Plan, Statement
from retryproof.sql.sqlite.schema import Part, ready

_FIRST = (
    """CREATE TABLE IF NOT EXISTS retryproof_inbox (
        seen_at INTEGER NOT NULL, id BLOB NOT NULL PRIMARY KEY, fingerprint BLOB NOT NULL, result BLOB, outgoing BLOB
    )""",
    "CREATE INDEX IF NOT EXISTS retryproof_inbox_seen_at ON retryproof_inbox (seen_at)",
    """CREATE TABLE IF NOT EXISTS retryproof_inbox_dead (
        seen_at INTEGER NOT NULL, id BLOB NOT NULL, fingerprint BLOB NOT NULL, consumer TEXT NOT NULL,
        source TEXT NOT NULL, message_id TEXT NOT NULL, reason TEXT NOT NULL, payload BLOB NOT NULL,
        PRIMARY KEY (id, fingerprint)
    )""",
)
SQLITE_INBOX = Part("inbox", "retryproof_inbox", (_FIRST,))


class SqliteInbox(InboxPlans):
    """The plans."""

    def __init__(self) -> None:
        super().__init__(_STATEMENTS)

    def ready(self) -> Plan[None]:
        """Make the tables where there are none."""
        return ready(SQLITE_INBOX)

    def _insert(self, ids: Sequence[bytes], fingerprints: Sequence[bytes]) -> Statement:
        places = ", ".join(["(?, ?, ?)"] * len(ids))
        now = wall_clock()
        return Statement(
            f"INSERT INTO retryproof_inbox (seen_at, id, fingerprint) VALUES {places} "
            "ON CONFLICT (id) DO NOTHING RETURNING id",
            [value for id, fingerprint in zip(ids, fingerprints, strict=True) for value in (now, id, fingerprint)],
        )

    def _find(self, ids: Sequence[bytes]) -> Statement:
        places = ", ".join("?" * len(ids))
        return Statement(
            f"SELECT id, fingerprint, result, outgoing FROM retryproof_inbox WHERE id IN ({places})", list(ids)
        )


class _Timed(Named):
    """A statement one of whose parameters is the host's time, `:now`."""

    __slots__ = ()

    def __call__(self, **values: object) -> Statement:
        return super().__call__(now=wall_clock(), **values)


def _timed(sql: str) -> Named:
    rendered = marks(sql)
    return _Timed(rendered.sql, rendered.names)


def _purge(table: str) -> Named:
    return _timed(
        f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE seen_at < :now - :older_than "
        "LIMIT :limit) RETURNING id"
    )


_STATEMENTS = InboxStatements(
    keep=marks("UPDATE retryproof_inbox SET result = :result, outgoing = :outgoing WHERE id = :id RETURNING id"),
    refuse=_timed(
        "INSERT INTO retryproof_inbox_dead (id, fingerprint, consumer, source, message_id, reason, payload, seen_at) "
        "VALUES (:id, :fingerprint, :consumer, :source, :message_id, :reason, :payload, :now) "
        "ON CONFLICT (id, fingerprint) DO NOTHING"
    ),
    dead=marks(
        "SELECT id, fingerprint, consumer, source, message_id, reason, payload, seen_at FROM retryproof_inbox_dead "
        "WHERE :consumer IS NULL OR consumer = :consumer ORDER BY seen_at, id LIMIT :limit"
    ),
    drop=marks("DELETE FROM retryproof_inbox_dead WHERE id = :id AND fingerprint = :fingerprint RETURNING id"),
    drop_named=marks(
        "DELETE FROM retryproof_inbox_dead WHERE substr(id, 1, 8) = :id AND substr(fingerprint, 1, 8) = :fingerprint "
        "RETURNING id"
    ),
    purge=_purge("retryproof_inbox"),
    purge_dead=_purge("retryproof_inbox_dead"),
    stats=_timed(
        "SELECT (SELECT count(*) FROM retryproof_inbox), "
        "(SELECT coalesce((:now - min(seen_at)) / 1e6, 0) FROM retryproof_inbox), "
        "(SELECT count(*) FROM retryproof_inbox_dead), "
        "(SELECT coalesce((:now - min(seen_at)) / 1e6, 0) FROM retryproof_inbox_dead)"
    ),
)
