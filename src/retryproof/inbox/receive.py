"""The inbox: a message takes effect once, in the consumer's own transaction (T4).

    inbox = Inbox("billing")
    with connection.transaction():
        received = inbox.receive(connection, source="orders", message_id=message.id, payload=message.body)
        if received.fresh:
            ...
            inbox.keep(connection, received, result=b"invoice 7")
    # commit first, acknowledge afterwards

A message is identified by consumer, source and its own id. The first transaction that commits takes it; one that rolls
back takes nothing. The same id with another payload is a dead letter, with its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal
from uuid import UUID

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.core.record import microseconds
from retryproof.drive import apump, pump
from retryproof.sql.callers import missing_table
from retryproof.sql.callers.performing import InTransaction
from retryproof.sql.dialects import DIALECTS, dialect_of
from retryproof.sql.inbox import InboxPlans, KnownMessage
from retryproof.sql.plan import Plan

REUSED = "the message's id was used before, with another payload"
START = 8
"""How many bytes of an id, and of a fingerprint, name a dead letter."""
_SCHEMA = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Received:
    """The inbox's answer about a message.

    status: `fresh`: run the message; `duplicate`: it is done, and `result` and `outgoing` are those of its first run;
        `dead`: the id was used with another payload. The message is a dead letter: acknowledge it and do not run it.
    """

    status: Literal["fresh", "duplicate", "dead"]
    id: bytes
    result: bytes | None = None
    outgoing: Sequence[Message] = ()

    @property
    def fresh(self) -> bool:
        """Whether to run the message."""
        return self.status == "fresh"


@dataclass(frozen=True, slots=True)
class InboxDeadLetter:
    """A message that could not be taken."""

    id: bytes
    fingerprint: bytes
    consumer: str
    source: str
    message_id: str
    reason: str
    payload: bytes
    seen_at: datetime

    @property
    def name(self) -> str:
        """Its name on the command line: the beginnings of its id and fingerprint."""
        return (self.id[:START] + self.fingerprint[:START]).hex()


Incoming = tuple[str, bytes]
"""A message's id and payload."""


class Inbox:
    """The messages that one consumer has taken.

    consumer: its name; each consumer takes a message once. schema: of the tables on PostgreSQL, unless the search path
    finds them. On SQLite, the first use creates the tables, in the caller's transaction.
    """

    def __init__(self, consumer: str, *, schema: str | None = None) -> None:
        if not consumer:
            raise ConfigurationError("consumer= names who takes the messages, and must not be empty")
        if schema is not None and not _SCHEMA.fullmatch(schema):
            raise ConfigurationError("schema= must be letters, digits and underscores, not beginning with a digit")
        self.consumer = consumer
        prefix = f'"{schema}".' if schema else ""
        self._plans_by_dialect = {name: dialect.inbox(prefix) for name, dialect in DIALECTS.items()}

    def receive(self, connection: Any, *, source: str, message_id: str, payload: bytes) -> Received:
        """Take a message, before other work, in the transaction that is open on a blocking connection.

        It waits while another open transaction has taken the message. Raises ConfigurationError without an open
        transaction.
        """
        return self.receive_many(connection, source, [(message_id, payload)])[0]

    async def areceive(self, connection: Any, *, source: str, message_id: str, payload: bytes) -> Received:
        """`receive` on a connection of the event loop."""
        return (await self.areceive_many(connection, source, [(message_id, payload)]))[0]

    def receive_many(self, connection: Any, source: str, messages: Sequence[Incoming]) -> list[Received]:
        """Take a batch with one statement, in the order of the ids; return an answer for each, in the given order.

        A message that comes twice in the batch is fresh once.
        """
        return _IN_TRANSACTION.perform(connection, partial(self._receiving, source, messages))

    async def areceive_many(self, connection: Any, source: str, messages: Sequence[Incoming]) -> list[Received]:
        """`receive_many` on a connection of the event loop."""
        return await _IN_TRANSACTION.aperform(connection, partial(self._receiving, source, messages))

    def keep(
        self, connection: Any, received: Received, *, result: bytes | None = None, outgoing: Sequence[Message] = ()
    ) -> None:
        """Store the result of a fresh message, and the messages that it sent, for its duplicates."""
        _IN_TRANSACTION.perform(connection, partial(self._keeping, received, result, outgoing), check=False)

    async def akeep(
        self, connection: Any, received: Received, *, result: bytes | None = None, outgoing: Sequence[Message] = ()
    ) -> None:
        """`keep` on a connection of the event loop."""
        await _IN_TRANSACTION.aperform(connection, partial(self._keeping, received, result, outgoing), check=False)

    def process(
        self,
        transaction: Callable[[], AbstractContextManager[Any]],
        source: str,
        messages: Sequence[Incoming],
        handle: Callable[[Any, Incoming], object],
    ) -> list[Received | Exception]:
        """Handle a batch in one transaction; if a message fails, handle each in a transaction of its own.

        transaction: a context manager that gives a connection and commits at its end. handle: called with the
            connection and each fresh message. Returns an answer, or the exception, for each message. Acknowledge the
            messages without an exception.
        """

        def in_one(batch: Sequence[Incoming]) -> list[Received]:
            with transaction() as connection:
                answers = self.receive_many(connection, source, batch)
                for message, received in zip(batch, answers, strict=True):
                    if received.fresh:
                        handle(connection, message)
                return answers

        return pump(_together_or_singly(messages), in_one)

    async def aprocess(
        self,
        transaction: Callable[[], AbstractAsyncContextManager[Any]],
        source: str,
        messages: Sequence[Incoming],
        handle: Callable[[Any, Incoming], Any],
    ) -> list[Received | Exception]:
        """`process` on the event loop; `handle` is awaited."""

        async def in_one(batch: Sequence[Incoming]) -> list[Received]:
            async with transaction() as connection:
                answers = await self.areceive_many(connection, source, batch)
                for message, received in zip(batch, answers, strict=True):
                    if received.fresh:
                        await handle(connection, message)
                return answers

        return await apump(_together_or_singly(messages), in_one)

    def dead(self, connection: Any, *, limit: int = 100) -> list[InboxDeadLetter]:
        """The oldest dead letters, of all consumers."""
        return _IN_TRANSACTION.perform(connection, partial(self._dead, limit), check=False)

    async def adead(self, connection: Any, *, limit: int = 100) -> list[InboxDeadLetter]:
        """`dead` on a connection of the event loop."""
        return await _IN_TRANSACTION.aperform(connection, partial(self._dead, limit), check=False)

    def drop(self, connection: Any, letter: InboxDeadLetter) -> bool:
        """Delete a dead letter; return whether it existed."""
        return _IN_TRANSACTION.perform(connection, partial(self._dropping, letter), check=False)

    async def adrop(self, connection: Any, letter: InboxDeadLetter) -> bool:
        """`drop` on a connection of the event loop."""
        return await _IN_TRANSACTION.aperform(connection, partial(self._dropping, letter), check=False)

    def purge(self, connection: Any, *, older_than: float, limit: int = 1_000) -> int:
        """Delete at most `limit` messages that came more than `older_than` seconds ago; return how many.

        `older_than` must be longer than the time in which the broker may deliver a message again.
        """
        return _IN_TRANSACTION.perform(connection, partial(self._purging, older_than, limit), check=False)

    async def apurge(self, connection: Any, *, older_than: float, limit: int = 1_000) -> int:
        """`purge` on a connection of the event loop."""
        return await _IN_TRANSACTION.aperform(connection, partial(self._purging, older_than, limit), check=False)

    def purge_dead(self, connection: Any, *, older_than: float, limit: int = 1_000) -> int:
        """Delete at most `limit` dead letters of all consumers that are older than so many seconds; return how many."""
        return _IN_TRANSACTION.perform(connection, partial(self._purging_dead, older_than, limit), check=False)

    async def apurge_dead(self, connection: Any, *, older_than: float, limit: int = 1_000) -> int:
        """`purge_dead` on a connection of the event loop."""
        return await _IN_TRANSACTION.aperform(connection, partial(self._purging_dead, older_than, limit), check=False)

    # The plans, for blocking and awaited connections

    def _plans(self, dialect: str) -> InboxPlans:
        return self._plans_by_dialect[dialect_of(dialect, subject="The inbox is for", found="this connection").name]

    def _receiving(self, source: str, messages: Sequence[Incoming], dialect: str) -> Plan[list[Received]]:
        plans = self._plans(dialect)
        if not messages:
            return []
        ids = [_identity(self.consumer, source, message_id) for message_id, _ in messages]
        prints = [hashlib.sha256(payload).digest() for _, payload in messages]
        first: dict[bytes, bytes] = {}
        for id, fingerprint in zip(ids, prints, strict=True):
            first.setdefault(id, fingerprint)
        found = yield from plans.take(first)
        answers = []
        for (message_id, payload), id, fingerprint in zip(messages, ids, prints, strict=True):
            entry = found[id]
            if entry is None:
                answers.append(Received("fresh", id))
                found[id] = KnownMessage(fingerprint, None, None)
            elif entry.fingerprint == fingerprint:
                answers.append(Received("duplicate", id, entry.result, _decoded(entry.outgoing)))
            else:
                yield from plans.refuse(id, fingerprint, (self.consumer, source, message_id, REUSED), payload)
                answers.append(Received("dead", id))
        return answers

    def _keeping(
        self, received: Received, result: bytes | None, outgoing: Sequence[Message], dialect: str
    ) -> Plan[None]:
        if not (yield from self._plans(dialect).keep(received.id, result, _encoded(outgoing))):
            raise ConfigurationError(
                "The message was not taken in this database; receive it first, in this transaction."
            )

    def _dead(self, limit: int, dialect: str) -> Plan[list[InboxDeadLetter]]:
        rows = yield from self._plans(dialect).dead(limit)
        return [letter_of(row) for row in rows]

    def _dropping(self, letter: InboxDeadLetter, dialect: str) -> Plan[bool]:
        return self._plans(dialect).drop(letter.id, letter.fingerprint)

    def _purging(self, older_than: float, limit: int, dialect: str) -> Plan[int]:
        return self._plans(dialect).purge(microseconds(older_than), limit)

    def _purging_dead(self, older_than: float, limit: int, dialect: str) -> Plan[int]:
        return self._plans(dialect).purge_dead(microseconds(older_than), limit)


def _together_or_singly(
    messages: Sequence[Incoming],
) -> Generator[Sequence[Incoming], list[Received], list[Received | Exception]]:
    """Yield batches, each for one transaction: all messages, and if one of them fails, each message alone."""
    try:
        return list((yield messages))
    except Exception:
        if len(messages) == 1:
            raise
    answers: list[Received | Exception] = []
    for message in messages:
        try:
            answers += yield [message]
        except Exception as error:  # noqa: BLE001  # handed back, one message's own
            answers.append(error)
    return answers


def _explain(error: Exception) -> ConfigurationError | None:
    if missing_table(error):
        return ConfigurationError("The database has no inbox yet: run `retryproof migrate URL`. Nothing was written.")
    return None


_IN_TRANSACTION = InTransaction(
    awaited="This connection is awaited: use the inbox's methods that begin with `a`.",
    blocking="This connection blocks: use the inbox's methods without the `a` before them.",
    explain=_explain,
)


def _identity(*parts: str) -> bytes:
    digest = hashlib.sha256(b"retryproof inbox 1\0")
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def letter_of(row: Sequence[Any]) -> InboxDeadLetter:
    """A dead letter as the plans give it."""
    return InboxDeadLetter(
        bytes(row[0]),
        bytes(row[1]),
        row[2],
        row[3],
        row[4],
        row[5],
        bytes(row[6]),
        _EPOCH + timedelta(microseconds=row[7]),
    )


def _encoded(messages: Sequence[Message]) -> bytes | None:
    if not messages:
        return None
    kept = [
        {
            "id": str(message.id),
            "topic": message.topic,
            "payload": b64encode(message.payload).decode(),
            "key": message.key,
            "headers": dict(message.headers),
            "content_type": message.content_type,
            "trace": message.trace,
            "partition": message.partition,
            "chain": b64encode(message.queue).decode(),
        }
        for message in messages
    ]
    return json.dumps(kept).encode()


def _decoded(data: bytes | None) -> list[Message]:
    return [] if data is None else [_message(kept) for kept in json.loads(data)]


def _message(kept: Mapping[str, Any]) -> Message:
    return Message(
        id=UUID(kept["id"]),
        topic=kept["topic"],
        payload=b64decode(kept["payload"]),
        key=kept["key"],
        headers=kept["headers"],
        content_type=kept["content_type"],
        trace=kept["trace"],
        partition=kept["partition"],
        queue=b64decode(kept["chain"]),
    )
