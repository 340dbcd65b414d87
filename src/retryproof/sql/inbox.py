"""The inbox as plans, for PostgreSQL and SQLite: statements out, rows in (T4)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retryproof.clock import wall_clock
from retryproof.sql.plan import Plan, Row, Statement
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
_PARAMETER = re.compile(r"\$\d+::\w+")
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
            yield from ready(SQLITE_INBOX)
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

    def dead(self, limit: int, consumer: str | None = None) -> Plan[Sequence[Row]]:
        """The oldest dead letters: id, fingerprint, consumer, source, message id, reason, payload, seen_at."""
        yield from self._ready()
        sql = (
            f"SELECT id, fingerprint, consumer, source, message_id, reason, payload, seen_at FROM {self._dead} "
            "WHERE $1::text IS NULL OR consumer = $2::text ORDER BY seen_at, id LIMIT $3::bigint"
        )
        return (yield Statement(self._styled(sql), (consumer, consumer, limit)))

    def drop(self, id: bytes, fingerprint: bytes) -> Plan[bool]:
        """Forget a dead letter; whether it was there."""
        yield from self._ready()
        sql = f"DELETE FROM {self._dead} WHERE id = $1::bytea AND fingerprint = $2::bytea RETURNING id"
        return bool((yield Statement(self._styled(sql), (id, fingerprint))))

    def drop_named(self, starts: Sequence[tuple[bytes, bytes]]) -> Plan[int]:
        """Forget dead letters by the first eight bytes of their ids and fingerprints; how many there were."""
        yield from self._ready()
        sql = (
            f"DELETE FROM {self._dead} WHERE substr(id, 1, 8) = $1::bytea AND substr(fingerprint, 1, 8) = $2::bytea "
            "RETURNING id"
        )
        count = 0
        for start in starts:
            count += len((yield Statement(self._styled(sql), start)))
        return count

    def purge(self, older_than: int, limit: int) -> Plan[int]:
        """Forget at most `limit` messages seen before so many microseconds; how many. Never waits for a lock."""
        return (yield from self._purge(self._table, older_than, limit))

    def purge_dead(self, older_than: int, limit: int) -> Plan[int]:
        """`purge` of dead letters."""
        return (yield from self._purge(self._dead, older_than, limit))

    def _purge(self, table: str, older_than: int, limit: int) -> Plan[int]:
        yield from self._ready()
        if self._sqlite:
            sql = f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE seen_at < ? LIMIT ?)"
            rows = yield Statement(f"{sql} RETURNING id", (wall_clock() - older_than, limit))
        else:
            rows = yield Statement(
                f"DELETE FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table} "
                f"WHERE seen_at < {_NOW} - $1::bigint ORDER BY seen_at LIMIT $2::bigint FOR UPDATE SKIP LOCKED)) "
                "RETURNING id",
                (older_than, limit),
            )
        return len(rows)

    def stats(self) -> Plan[tuple[int, float, int, float]]:
        """Messages, the age of the oldest in seconds, dead letters, the age of their oldest."""
        yield from self._ready()
        now = "$1::bigint" if self._sqlite else _NOW
        ages = [f"(SELECT coalesce(({now} - min(seen_at)) / 1e6, 0) FROM {table})" for table in self._tables]
        counts = [f"(SELECT count(*) FROM {table})" for table in self._tables]
        sql = f"SELECT {counts[0]}, {ages[0]}, {counts[1]}, {ages[1]}"
        given = (wall_clock(), wall_clock()) if self._sqlite else ()
        ((messages, oldest, dead, oldest_dead),) = yield Statement(self._styled(sql), given)
        return messages, max(0.0, float(oldest)), dead, max(0.0, float(oldest_dead))

    @property
    def _tables(self) -> tuple[str, str]:
        return self._table, self._dead

    def _ready(self) -> Plan[None]:
        if self._sqlite:
            yield from ready(SQLITE_INBOX)

    def _styled(self, sql: str) -> str:
        """PostgreSQL's spelling, or SQLite's, whose parameters are in the same order."""
        return _PARAMETER.sub("?", sql) if self._sqlite else sql
