"""The inbox as plans, for PostgreSQL and SQLite: statements out, rows in (T4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retryproof.stores.memory import wall_clock
from retryproof.stores.sql.plan import Plan, Row, Statement

SQLITE_SCHEMA = (
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
_NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the inbox has of a message that came before."""

    fingerprint: bytes
    result: bytes | None
    outgoing: bytes | None


class InboxPlans:
    """The statements for one dialect. prefix: of the tables, a quoted schema and a dot, or nothing."""

    def __init__(self, *, sqlite: bool, prefix: str = "") -> None:
        self._sqlite = sqlite
        self._table = f"{prefix}retryproof_inbox"
        self._dead = f"{prefix}retryproof_inbox_dead"

    def take(self, fingerprints: Mapping[bytes, bytes]) -> Plan[dict[bytes, Entry | None]]:
        """Take each id that is new (None), by one statement in the order of the ids; and what is there of the others.

        Waits for a rival that has not committed: only its end says whether the message is done.
        """
        ids = sorted(fingerprints)
        if self._sqlite:
            yield from self._make()
            places = ", ".join(["(?, ?, ?)"] * len(ids))
            given = [value for id in ids for value in (wall_clock(), id, fingerprints[id])]
            taken = yield Statement(
                f"INSERT INTO {self._table} (seen_at, id, fingerprint) VALUES {places} "
                "ON CONFLICT (id) DO NOTHING RETURNING id",
                given,
            )
        else:
            taken = yield Statement(
                f"INSERT INTO {self._table} (seen_at, id, fingerprint) SELECT {_NOW}, asked.id, asked.fingerprint "
                "FROM unnest($1::bytea[], $2::bytea[]) AS asked (id, fingerprint) ORDER BY asked.id "
                "ON CONFLICT (id) DO NOTHING RETURNING id",
                (ids, [fingerprints[id] for id in ids]),
            )
        found: dict[bytes, Entry | None] = {bytes(row[0]): None for row in taken}
        known = [id for id in ids if id not in found]
        if known:
            for id, *rest in (yield self._select(known)):
                found[bytes(id)] = Entry(*rest)
        return found

    def _make(self) -> Plan[None]:
        if not (yield Statement("SELECT 1 FROM sqlite_schema WHERE name = 'retryproof_inbox_dead'")):
            for statement in SQLITE_SCHEMA:
                yield Statement(statement)

    def _select(self, ids: Sequence[bytes]) -> Statement:
        columns = f"SELECT id, fingerprint, result, outgoing FROM {self._table} WHERE id"
        if self._sqlite:
            return Statement(f"{columns} IN ({', '.join('?' * len(ids))})", list(ids))
        return Statement(f"{columns} = ANY ($1::bytea[])", (list(ids),))

    def keep(self, id: bytes, result: bytes | None, outgoing: bytes | None) -> Plan[bool]:
        """Keep what the first run came to; whether the message was taken."""
        sql = f"UPDATE {self._table} SET result = $1::bytea, outgoing = $2::bytea WHERE id = $3::bytea RETURNING id"
        return bool((yield Statement(self._styled(sql), (result, outgoing, id))))

    def bury(self, id: bytes, fingerprint: bytes, words: Sequence[str], payload: bytes) -> Plan[None]:
        """Keep a message that cannot be taken. words: consumer, source, message id, reason."""
        columns = f"{self._dead} (id, fingerprint, consumer, source, message_id, reason, payload, seen_at)"
        given: tuple[object, ...] = (id, fingerprint, *words, payload)
        if self._sqlite:
            places, given = "?, ?, ?, ?, ?, ?, ?, ?", (*given, wall_clock())
        else:
            places = f"$1::bytea, $2::bytea, $3::text, $4::text, $5::text, $6::text, $7::bytea, {_NOW}"
        yield Statement(f"INSERT INTO {columns} VALUES ({places}) ON CONFLICT (id, fingerprint) DO NOTHING", given)

    def dead(self, limit: int) -> Plan[Sequence[Row]]:
        """The oldest dead letters: id, fingerprint, consumer, source, message id, reason, payload, seen_at."""
        if self._sqlite:
            yield from self._make()
        sql = (
            f"SELECT id, fingerprint, consumer, source, message_id, reason, payload, seen_at FROM {self._dead} "
            "ORDER BY seen_at LIMIT $1::bigint"
        )
        return (yield Statement(self._styled(sql), (limit,)))

    def drop(self, id: bytes, fingerprint: bytes) -> Plan[bool]:
        """Forget a dead letter; whether it was there."""
        sql = f"DELETE FROM {self._dead} WHERE id = $1::bytea AND fingerprint = $2::bytea RETURNING id"
        return bool((yield Statement(self._styled(sql), (id, fingerprint))))

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Forget at most `limit` messages seen before so many microseconds; how many. Never waits for a lock."""
        if self._sqlite:
            yield from self._make()
            sql = f"DELETE FROM {self._table} WHERE id IN (SELECT id FROM {self._table} WHERE seen_at < ? LIMIT ?)"
            rows = yield Statement(f"{sql} RETURNING id", (wall_clock() - older_than, limit))
        else:
            rows = yield Statement(
                f"DELETE FROM {self._table} WHERE id = ANY (ARRAY(SELECT id FROM {self._table} "
                f"WHERE seen_at < {_NOW} - $1::bigint ORDER BY seen_at LIMIT $2::bigint FOR UPDATE SKIP LOCKED)) "
                "RETURNING id",
                (older_than, limit),
            )
        return len(rows)

    def _styled(self, sql: str) -> str:
        """PostgreSQL's spelling, or SQLite's, whose parameters are in the same order."""
        if not self._sqlite:
            return sql
        for type in ("bytea", "bigint"):
            for place in range(1, 4):
                sql = sql.replace(f"${place}::{type}", "?")
        return sql
