"""An outgoing message, which an outbox stores and a relay gives to a publisher (T5).

The messages of one key are a **queue**: they are published in order, and a failed message holds back the later ones. A
message without a key has a queue of its own. A queue belongs to one partition, and a partition to one relay at a time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

PARTITIONS = 64
"""The number of partitions of a new outbox; it is stored in the database."""
QUEUE_BYTES = 16
_VERSION_7 = 0x7 << 76 | 0b10 << 62
_RANDOM = (1 << 76) - 1 & ~(0b11 << 62)
"""The random bits among the lower 80 of a UUIDv7: all but version and variant."""
UNCOUNTED = -1
"""In place of a number of answers: the message waits, and keeps its age, its counts, and whether it goes alone."""


@dataclass(slots=True)  # not frozen: a frozen one takes four times as long to make, and a relay makes thousands
class Message:
    """One message. Its `id` stays the same on every resend. Do not change its fields.

    attempts: how often publishing it failed before. failed_at: when it failed first, or None; the death of its relay
        counts too. answers: failures in which the receiver answered about the message itself. deaths: relays that died
        while they sent it alone. created_at: µs since the epoch, by the database's clock.
    sequence: the number for the order, drawn when the message was added. A transaction that saw another's commit before
        that has a higher one.
    """

    id: UUID
    topic: str
    payload: bytes
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str | None = None
    trace: str | None = None
    attempts: int = 0
    created_at: int = 0
    sequence: int = 0
    partition: int = 0
    queue: bytes = b""
    failed_at: int | None = None
    answers: int = 0
    deaths: int = 0
    parked: bool = False

    @property
    def queue_id(self) -> tuple[int, bytes]:
        """Its partition and queue, which are held back together."""
        return self.partition, self.queue


def queue_of(key: str | None, id: UUID) -> bytes:
    """The queue of a key, or of a message without one."""
    if key is None:
        return id.bytes
    return hashlib.blake2b(key.encode(), digest_size=QUEUE_BYTES).digest()


def partition_of(queue: bytes, partitions: int) -> int:
    """The partition of a queue, by its last bytes, which are random in a UUIDv7 too."""
    return int.from_bytes(queue[-4:]) % partitions


def uuid7() -> UUID:
    """A UUIDv7 (RFC 9562): milliseconds since the epoch, and 74 random bits."""
    return UUID(int=time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10)) & _RANDOM | _VERSION_7)


@dataclass(frozen=True, slots=True)
class Failure:
    """A message that could not be published; delay: µs until it is tried again.

    answers: the receiver's answers about it so far, or UNCOUNTED if it was not sent and nothing counts.
    """

    message: Message
    attempts: int
    reason: str
    delay: int
    answers: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How a batch ended. A message that is in none of the three fields was not tried, and stays unchanged.

    dead: messages that become dead letters, each with its reason. freed: queues that were held back and may continue,
    since their messages of this batch have ended. slow: messages of this or earlier batches that are still being sent:
    they stay in flight, and their queues are held back until they end.
    """

    done: Sequence[Message] = ()
    dead: Sequence[tuple[Message, int, str]] = ()
    failed: Sequence[Failure] = ()
    freed: Sequence[tuple[int, bytes]] = ()
    slow: Sequence[Message] = ()

    @property
    def plain(self) -> bool:
        """Everything is done, and nothing was or is held back."""
        return not (self.dead or self.failed or self.freed or self.slow)
