"""An outgoing message: what an outbox keeps and a relay hands to a publisher (T5).

Messages of one ordering key are a **queue**: they are published in order, and one that fails holds the others back.
A message without a key is a queue of its own. A queue belongs to one partition, and a partition to one relay at a time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

PARTITIONS = 64
"""Partitions of a new outbox; the number is kept in the database."""
QUEUE_BYTES = 16
_VERSION_7 = 0x7 << 76 | 0b10 << 62
_RANDOM = (1 << 76) - 1 & ~(0b11 << 62)
"""The bits of a UUIDv7's lower 80 that are random: all but version and variant."""
UNCOUNTED = -1
"""In place of a number of answers: the message waits, and keeps its age, its counts and its being tried alone."""


@dataclass(slots=True)  # not frozen, which makes it four times as slow to make: a relay makes them by the thousand
class Message:
    """One message; `id` is the same however often it is sent. Not to be changed.

    attempts: how often publishing it failed before. failed_at: when it failed first, or None; a relay that died over it
    counts as well. answers: failures in which its receiver answered about the message itself. deaths: relays that died
    while they sent it alone. created_at: µs since the epoch, by the database's clock.
    sequence: the number that orders it, drawn when it was added: who saw another's commit before has a higher one.
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
        """Its partition and queue: what is held back as one."""
        return self.partition, self.queue


def queue_of(key: str | None, id: UUID) -> bytes:
    """The queue of a key, or of a message without one."""
    if key is None:
        return id.bytes
    return hashlib.blake2b(key.encode(), digest_size=QUEUE_BYTES).digest()


def partition_of(queue: bytes, partitions: int) -> int:
    """The partition of a queue; by its last bytes, which are random in a UUIDv7 too."""
    return int.from_bytes(queue[-4:]) % partitions


def uuid7() -> UUID:
    """A UUIDv7 (RFC 9562): milliseconds since the epoch, and 74 random bits."""
    return UUID(int=time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10)) & _RANDOM | _VERSION_7)


@dataclass(frozen=True, slots=True)
class Failure:
    """A message that could not be published; delay: µs until it is tried again.

    answers: its receiver's answers about it so far, or UNCOUNTED where it was not sent and nothing counts.
    """

    message: Message
    attempts: int
    reason: str
    delay: int
    answers: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How a batch ended; what is in none of the three was not tried, and stays as it was.

    dead: to dead letters, each with its reason. freed: queues that were held back and whose messages of this batch
    ended, so that they may go on. slow: messages that are being sent still, of this batch or of earlier ones: they stay
    in flight, and their queues are held back until they end.
    """

    done: Sequence[Message] = ()
    dead: Sequence[tuple[Message, int, str]] = ()
    failed: Sequence[Failure] = ()
    freed: Sequence[tuple[int, bytes]] = ()
    slow: Sequence[Message] = ()

    @property
    def plain(self) -> bool:
        """All is done, and nothing was or is held back."""
        return not (self.dead or self.failed or self.freed or self.slow)
