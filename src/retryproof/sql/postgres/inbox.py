"""The inbox's statements on PostgreSQL (T4)."""

from __future__ import annotations

from collections.abc import Sequence

from retryproof.sql.inbox import InboxPlans, InboxStatements
from retryproof.sql.named import Named, dollars
from retryproof.sql.plan import Statement
from retryproof.sql.postgres.statements import NOW


class PostgresInbox(InboxPlans):
    """The plans. prefix: of the tables, a quoted schema and a dot, or nothing."""

    def __init__(self, prefix: str = "") -> None:
        inbox, dead = f"{prefix}retryproof_inbox", f"{prefix}retryproof_inbox_dead"
        super().__init__(_statements(inbox, dead))
        self._take = (
            f"INSERT INTO {inbox} (seen_at, id, fingerprint) SELECT {NOW}, asked.id, asked.fingerprint "
            "FROM unnest($1::bytea[], $2::bytea[]) AS asked (id, fingerprint) ORDER BY asked.id "
            "ON CONFLICT (id) DO NOTHING RETURNING id"
        )
        self._known = f"SELECT id, fingerprint, result, outgoing FROM {inbox} WHERE id = ANY ($1::bytea[])"

    def _insert(self, ids: Sequence[bytes], fingerprints: Sequence[bytes]) -> Statement:
        return Statement(self._take, (list(ids), list(fingerprints)))

    def _find(self, ids: Sequence[bytes]) -> Statement:
        return Statement(self._known, (list(ids),))


def _statements(inbox: str, dead: str) -> InboxStatements:
    return InboxStatements(
        keep=dollars(
            f"UPDATE {inbox} SET result = :result::bytea, outgoing = :outgoing::bytea WHERE id = :id::bytea "
            "RETURNING id"
        ),
        refuse=dollars(
            f"INSERT INTO {dead} (id, fingerprint, consumer, source, message_id, reason, payload, seen_at) "
            "VALUES (:id::bytea, :fingerprint::bytea, :consumer::text, :source::text, :message_id::text, "
            f":reason::text, :payload::bytea, {NOW}) ON CONFLICT (id, fingerprint) DO NOTHING"
        ),
        dead=dollars(
            f"SELECT id, fingerprint, consumer, source, message_id, reason, payload, seen_at FROM {dead} "
            "WHERE :consumer::text IS NULL OR consumer = :consumer::text ORDER BY seen_at, id LIMIT :limit::bigint"
        ),
        drop=dollars(f"DELETE FROM {dead} WHERE id = :id::bytea AND fingerprint = :fingerprint::bytea RETURNING id"),
        drop_named=dollars(
            f"DELETE FROM {dead} WHERE substr(id, 1, 8) = :id::bytea "
            "AND substr(fingerprint, 1, 8) = :fingerprint::bytea RETURNING id"
        ),
        purge=_purge(inbox),
        purge_dead=_purge(dead),
        stats=dollars(
            f"SELECT (SELECT count(*) FROM {inbox}), "
            f"(SELECT coalesce(({NOW} - min(seen_at)) / 1e6, 0) FROM {inbox}), "
            f"(SELECT count(*) FROM {dead}), "
            f"(SELECT coalesce(({NOW} - min(seen_at)) / 1e6, 0) FROM {dead})"
        ),
    )


def _purge(table: str) -> Named:
    return dollars(
        f"DELETE FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table} "
        f"WHERE seen_at < {NOW} - :older_than::bigint ORDER BY seen_at LIMIT :limit::bigint FOR UPDATE SKIP LOCKED)) "
        "RETURNING id"
    )
