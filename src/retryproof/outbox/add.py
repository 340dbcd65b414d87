"""The outbox: messages are written in the caller's own transaction, and a relay sends them afterwards (T5)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import PARTITIONS, Message, partition_of, queue_of, uuid7
from retryproof.sql.callers import FAILED, missing_table, refused, sqlstate_of
from retryproof.sql.callers.performing import InTransaction
from retryproof.sql.dialects import DIALECTS, dialect_of
from retryproof.sql.outbox import AddedRow, OutboxPlans
from retryproof.sql.plan import Plan, Row, Straight

MAX_PAYLOAD = 1 << 20
"""The default limit of a payload in bytes, which most brokers accept."""
MAX_TOPIC = 255
FAILED_STATE = "25P02"  # in_failed_sql_transaction
_BYTES = (bytes, bytearray, memoryview)
_SCHEMA = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Outbox:
    """Writes messages into the caller's transaction.

    topics: the allowed topics, or None for any. max_payload: bytes; give the broker's own limit. partitions: must be
    the number in the database. schema: of the tables on PostgreSQL, unless the search path finds them.
    """

    def __init__(
        self,
        *,
        topics: Collection[str] | None = None,
        max_payload: int = MAX_PAYLOAD,
        partitions: int = PARTITIONS,
        schema: str | None = None,
    ) -> None:
        if schema is not None and not _SCHEMA.fullmatch(schema):
            raise ConfigurationError("schema= must be letters, digits and underscores, not beginning with a digit")
        if partitions < 1 or max_payload < 0:
            raise ConfigurationError("partitions= must be 1 or more, and max_payload= not negative")
        self._topics = None if topics is None else frozenset(topics)
        self._max_payload = max_payload
        self._partitions = partitions
        prefix = f'"{schema}".' if schema else ""
        self._plans_by_dialect = {name: dialect.outbox(prefix) for name, dialect in DIALECTS.items()}

    def message(
        self,
        topic: str,
        payload: bytes,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        trace: str | None = None,
        id: UUID | None = None,
    ) -> Message:
        """Make a message for `add_many`; raises ConfigurationError for a message that could not be sent."""
        self._check(topic, payload, key, headers, content_type, trace)
        id = id or uuid7()
        queue = queue_of(key, id)
        return Message(
            id,
            topic,
            bytes(payload),
            key,
            dict(headers) if headers else {},
            content_type,
            trace,
            partition=partition_of(queue, self._partitions),
            queue=queue,
        )

    def add(
        self,
        connection: Any,
        *,
        topic: str,
        payload: bytes,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        trace: str | None = None,
    ) -> UUID:
        """Write a message in the transaction that is open on a blocking connection; return its id, a UUIDv7.

        key: messages of one key are sent in order: one whose transaction had committed when another was added is sent
            first. So take the lock that orders your transactions before you add. trace: a `traceparent`.
        Raises ConfigurationError, before anything is written, for no open transaction, a failed one, autocommit, a
        payload over the limit, or a topic that is not allowed.
        """
        row = self._row(topic, payload, key, headers, content_type, trace)
        _IN_TRANSACTION.perform(connection, partial(self._adding, (row,)))
        return row[0]

    async def aadd(
        self,
        connection: Any,
        *,
        topic: str,
        payload: bytes,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        trace: str | None = None,
    ) -> UUID:
        """`add` on a connection of the event loop."""
        row = self._row(topic, payload, key, headers, content_type, trace)
        await _IN_TRANSACTION.aperform(connection, partial(self._adding, (row,)))
        return row[0]

    def add_many(self, connection: Any, messages: Sequence[Message]) -> None:
        """Write messages from `message`, in order, with one statement."""
        if messages:
            _IN_TRANSACTION.perform(connection, partial(self._adding, list(map(_row_of, messages))))

    async def aadd_many(self, connection: Any, messages: Sequence[Message]) -> None:
        """`add_many` on a connection of the event loop."""
        if messages:
            await _IN_TRANSACTION.aperform(connection, partial(self._adding, list(map(_row_of, messages))))

    def notify(self, connection: Any) -> None:
        """Wake relays when this transaction commits, so that they do not wait for their next poll.

        PostgreSQL commits transactions that notify one after the other, so do not use it in busy systems.
        """
        _IN_TRANSACTION.perform(connection, lambda dialect: self._plans(dialect).notify(), check=False)

    async def anotify(self, connection: Any) -> None:
        """`notify` on a connection of the event loop."""
        await _IN_TRANSACTION.aperform(connection, lambda dialect: self._plans(dialect).notify(), check=False)

    def _row(
        self,
        topic: str,
        payload: bytes,
        key: str | None,
        headers: Mapping[str, str] | None,
        content_type: str | None,
        trace: str | None,
    ) -> AddedRow:
        """The row of what `message` would give, for which no object is made."""
        self._check(topic, payload, key, headers, content_type, trace)
        id = uuid7()
        queue = queue_of(key, id)
        partition, text = partition_of(queue, self._partitions), _as_text(headers) if headers else None
        return id, partition, queue, topic, bytes(payload), key, text, content_type, trace

    def _check(
        self,
        topic: str,
        payload: object,
        key: str | None,
        headers: Mapping[str, str] | None,
        content_type: str | None,
        trace: str | None,
    ) -> None:
        if not isinstance(payload, _BYTES):
            raise ConfigurationError(f"payload= must be bytes, and is {type(payload).__name__}; encode it first")
        if len(payload) > self._max_payload:
            raise ConfigurationError(
                f"The payload has {len(payload)} bytes, and at most {self._max_payload} can be sent. "
                "Store it elsewhere and send where it is, or raise max_payload= to the broker's limit."
            )
        if not topic or len(topic) > MAX_TOPIC:
            raise ConfigurationError(f"topic= must have 1 to {MAX_TOPIC} characters")
        if self._topics is not None and topic not in self._topics:
            known = ", ".join(sorted(self._topics))
            raise ConfigurationError(f"The topic {topic!r} is unknown. Declared are: {known}.")
        texts: tuple[object, ...] = (topic, key, content_type, trace)
        for text in (*texts, *headers, *headers.values()) if headers else texts:
            if text is not None and (not isinstance(text, str) or "\0" in text):
                raise ConfigurationError("topic, key, content type, trace and headers are text without NUL")

    def _adding(self, rows: Sequence[AddedRow], dialect: str) -> Plan[Sequence[Row]] | Straight:
        return (self._plans_by_dialect.get(dialect) or self._plans(dialect)).add(rows, self._partitions)

    def _plans(self, dialect: str) -> OutboxPlans:
        return self._plans_by_dialect[dialect_of(dialect, subject="The outbox is for", found="this connection").name]


def _row_of(message: Message) -> AddedRow:
    return (
        message.id,
        message.partition,
        message.queue,
        message.topic,
        message.payload,
        message.key,
        _as_text(message.headers) if message.headers else None,
        message.content_type,
        message.trace,
    )


def _as_text(headers: Mapping[str, str]) -> str:
    return json.dumps(dict(headers))


def _explain(error: Exception) -> ConfigurationError | None:
    """The driver's errors that mean a wrong use; nothing was written then."""
    if missing_table(error):
        return ConfigurationError(
            "The database has no outbox; run `retryproof migrate URL`, and give Outbox(schema=…) where its tables "
            "are in a schema of their own."
        )
    return refused(FAILED, "Nothing was written.") if sqlstate_of(error) == FAILED_STATE else None


_IN_TRANSACTION = InTransaction(
    awaited="This connection belongs to an event loop: await outbox.aadd(…), aadd_many or anotify.",
    blocking="This connection blocks: use outbox.add(…), add_many or notify.",
    explain=_explain,
)
