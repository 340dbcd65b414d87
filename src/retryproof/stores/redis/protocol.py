"""The requests to the server, and the meaning of its answers; pure, for blocking and async stores.

Each method of the store is a plan: a generator that yields requests, receives their answers, and returns the method's
answer. If a request fails, its error is raised inside the plan.
"""

from __future__ import annotations

import hashlib
import re
from binascii import hexlify
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

from retryproof.core.batch import Batch, ItemError, Reaped
from retryproof.core.commands import (
    DONE,
    LOST,
    NOTHING,
    Abandoned,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    FenceReply,
    Mismatch,
    Release,
    Renew,
    Running,
)
from retryproof.core.errors import Unreadable
from retryproof.core.record import MICROSECONDS, Record, State, microseconds
from retryproof.stores.base import Capabilities
from retryproof.stores.redis import packed, resp
from retryproof.stores.redis.resp import Argument, Packed, pack

CAPABILITIES = Capabilities(name="redis", native_ttl=True, concurrent=True)

SCAN_COUNT = 1_000
"""Keys that one SCAN looks at: some 0.3 ms of the server's time."""

REAP_LOOKS_AT_MOST = 20
"""SCANs of one pass of reaping; the next pass goes on where this one ended."""

LARGEST_CALL = 8 * 2**20
"""Bytes of results that one call carries; more of them take several, so that the server is not held for long."""

T = TypeVar("T")
RedisReply: TypeAlias = Any
"""What the server answered, as the driver gives it: bytes, int, None or a list of these."""


class Script:
    """A script and its digest, by which the server knows it after its first use."""

    __slots__ = ("by_digest", "source")

    def __init__(self, *names: str) -> None:
        folder = files("retryproof.stores.redis") / "scripts"
        self.source = "\n".join((folder / f"{name}.lua").read_text("utf-8") for name in ("record", *names))
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        self.by_digest = resp.packed("EVALSHA", digest)


@dataclass(frozen=True, slots=True)
class RedisRequest:
    """A command to send: by digest first, then by source where the server does not know the script.

    repeatable: done twice it has the effect and the answer of once.
    """

    arguments: Sequence[Argument]
    script: Script | None = None
    repeatable: bool = True

    def forms(self) -> Iterator[bytes]:
        """What to send, in turn, until the server knows it."""
        if self.script is None:
            yield pack(self.arguments)
        else:
            yield pack([self.script.by_digest, *self.arguments])
            yield pack(["EVAL", self.script.source, *self.arguments])


Plan: TypeAlias = Generator[RedisRequest, RedisReply, T]


class Protocol:
    """The plans of one store's methods.

    Only the place where reaping goes on is kept; it is a hint, and two that reap at once do no harm.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}:".encode()
        self._reap_cursor = 0
        self._claim = Script("claim")
        self._settle = Script("fence", "settle")
        self._renew = Script("fence", "renew")
        self._checkpoint = Script("fence", "checkpoint")
        self._read = Script("read")
        self._remove = Script("remove")

    def key(self, id: bytes) -> bytes:
        """The name of a record."""
        return self._prefix + hexlify(id)

    def claim(self, claims: Sequence[Claim]) -> Plan[Batch[ClaimReply]]:
        """One script call; terms that claims have in common are sent once."""
        if not claims:
            return []
        terms, of_keys = _terms(claims)
        arguments: list[Argument] = [
            self._keys(claims),
            _terms_arguments(terms),
            of_keys,
            packed.new_records(claims),
        ]
        replies = yield RedisRequest(arguments, self._claim)
        return [
            Acquired(reply, 1, reply, claim.nonce, NOTHING, claim.trace)
            if type(reply) is int
            else _claim_reply(claim, reply)
            for claim, reply in zip(claims, replies, strict=True)
        ]

    def complete(self, commands: Sequence[Complete]) -> Plan[Batch[FenceReply]]:
        """One script call, or a few where the results are large."""
        replies: list[FenceReply | ItemError] = []
        for portion in _portions(commands):
            replies += yield from self._fenced(self._settle, portion, [packed.completions(portion)])
        return replies

    def release(self, commands: Sequence[Release]) -> Plan[Batch[FenceReply]]:
        """One script call."""
        return (yield from self._fenced(self._settle, commands, packed.releases(commands)))

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """One script call."""
        return (yield from self._fenced(self._renew, commands, packed.renewals(commands)))

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Plan[Batch[FenceReply]]:
        """One script call."""
        return (yield from self._fenced(self._checkpoint, commands, packed.checkpoints(commands)))

    def get(self, ids: Sequence[bytes]) -> Plan[Sequence[Record | None]]:
        """One script call for each full batch."""
        return (yield from self._records(ids, "all"))

    def scan(
        self, *, prefix: bytes, state: State | None, tenant: bytes | None, after: bytes, limit: int
    ) -> Plan[Sequence[Record]]:
        """A page costs a pass over all keys of the database, and reads no results or checkpoints."""
        found = yield from self._ids(prefix)
        page: list[Record] = []
        for ids in _batches(sorted(id for id in found if id > after)):
            records = yield from self._records(ids, "heads", skip_unreadable=True)
            page += (
                record
                for record in records
                if record is not None and state in (None, record.state) and tenant in (None, record.tenant)
            )
            if len(page) >= limit:
                break
        return page[:limit]

    def evict(self, ids: Sequence[bytes]) -> Plan[Sequence[bool]]:
        """One script call for each full batch."""
        gone: list[bool] = []
        for batch in _batches(ids):
            answer = yield RedisRequest([len(batch), *map(self.key, batch), "any"], self._remove)
            gone += (character == ord("1") for character in answer)
        return gone

    def reap(self, limit: int, told: Sequence[Record] = ()) -> Plan[Reaped]:
        """Looks at some keys from where the last pass ended; the server removes what is settled by itself."""
        ended = yield from self._remove_over(told)
        settled: list[bytes] = []
        unsettled: dict[bytes, Record] = {}  # SCAN may give a key twice
        more = yield from self._reap(limit, settled, unsettled)
        return Reaped(len(settled), list(unsettled.values()), more, ended)

    def _reap(self, limit: int, settled: list[bytes], unsettled: dict[bytes, Record]) -> Plan[bool]:
        for _ in range(REAP_LOOKS_AT_MOST if limit else 0):
            cursor, ids = yield from self._look(self._reap_cursor)
            for batch in _batches(ids):
                records = yield from self._records(batch, "over", skip_unreadable=True)
                over = [record for record in records if record is not None and record.id not in unsettled]
                room = limit - len(settled) - len(unsettled)
                unsettled.update((record.id, record) for record in over[:room] if not record.settled)
                settled += yield from self._remove_over([record for record in over[:room] if record.settled])
                if len(over) > room:
                    return True  # the rest is found again from the same cursor
            self._reap_cursor = cursor
            if cursor == 0:
                return False
        return True

    def _remove_over(self, over: Sequence[Record]) -> Plan[list[bytes]]:
        """Removes those that are unchanged and whose time is still over; their ids."""
        gone: list[bytes] = []
        for batch in _batches(over):
            arguments: list[Argument] = [len(batch), *(self.key(record.id) for record in batch), "over"]
            arguments += map(packed.fence, batch)
            answer = yield RedisRequest(arguments, self._remove, repeatable=False)
            gone += (record.id for record, character in zip(batch, answer, strict=True) if character == ord("1"))
        return gone

    def _keys(self, commands: Sequence[Claim] | Sequence[_Fenced]) -> Packed:
        return packed.keys(self._prefix, [command.id for command in commands])

    def _fenced(
        self, script: Script, commands: Sequence[_Fenced], items: Sequence[Argument]
    ) -> Plan[Batch[FenceReply]]:
        if not commands:
            return []
        answer = yield RedisRequest([self._keys(commands), *items], script)
        if answer.count(b"1") == len(commands):
            return [DONE] * len(commands)
        return [
            _FENCE_REPLIES.get(character) or _unreadable(command.id)
            for command, character in zip(commands, answer, strict=True)
        ]

    def _records(
        self, ids: Sequence[bytes], what: str, *, skip_unreadable: bool = False
    ) -> Plan[Sequence[Record | None]]:
        records: list[Record | None] = []
        for batch in _batches(ids):
            now, *answers = yield RedisRequest([len(batch), *map(self.key, batch), what], self._read)
            for id, answer in zip(batch, answers, strict=True):
                record = _record(id, answer, int(now), results=what == "all", skip_unreadable=skip_unreadable)
                absent = record is not None and what != "over" and record.expired(record.read_at)
                records.append(None if absent else record)
        return records

    def _ids(self, prefix: bytes) -> Plan[set[bytes]]:
        found: set[bytes] = set()
        cursor = 0
        while True:
            cursor, ids = yield from self._look(cursor, prefix)
            found.update(ids)
            if cursor == 0:
                return found

    def _look(self, cursor: int, prefix: bytes = b"") -> Plan[tuple[int, Sequence[bytes]]]:
        """One SCAN: where to go on, and ids; keys that are not a record's are passed over."""
        pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", self._prefix) + hexlify(prefix) + b"*"
        next_cursor, keys = yield RedisRequest(["SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT])
        start = len(self._prefix)
        return int(next_cursor), [bytes.fromhex(key[start:].decode()) for key in keys if _HEX_ID.fullmatch(key, start)]


_HEX_ID = re.compile(rb"[0-9a-f]{64}")
_FENCE_REPLIES: Mapping[int, FenceReply] = {ord("1"): DONE, ord("0"): LOST}


_Fenced: TypeAlias = Complete | Release | Renew | Checkpoint
_Terms: TypeAlias = tuple[float, float, float, str, int, int]


_terms_of: Callable[[Claim], _Terms] = attrgetter(
    "lease", "retention", "unsettled_retention", "on_abandoned", "max_attempts", "alone"
)
"""What policies give, and so most claims of a batch have in common."""


def _terms(claims: Sequence[Claim]) -> tuple[tuple[_Terms, ...], bytes]:
    """Those that occur, and which of them each claim has, a byte each."""
    all_terms = list(map(_terms_of, claims))
    if all_terms.count(all_terms[0]) == len(all_terms):
        return (all_terms[0],), bytes(len(all_terms))
    places: dict[_Terms, int] = {}
    of_claims = bytes([places.setdefault(terms, len(places)) for terms in all_terms])
    return tuple(places), of_claims


@lru_cache(maxsize=64)
def _terms_arguments(all_terms: tuple[_Terms, ...]) -> Packed:
    arguments = [len(all_terms)]
    for lease, retention, unsettled_retention, on_abandoned, max_attempts, alone in all_terms:
        arguments += (microseconds(lease), microseconds(retention), microseconds(unsettled_retention))
        arguments += (int(on_abandoned == "refuse"), max_attempts, alone)
    return resp.packed(*arguments)


def _claim_reply(claim: Claim, reply: RedisReply) -> ClaimReply | ItemError:
    """What a claim is told that has not made a new record."""
    match reply:
        case bytes():
            try:
                return packed.claim_reply(reply)
            except packed.NotReadable:
                return _unreadable(claim.id)
        case [b"R", left]:
            return Running(left / MICROSECONDS)
        case [b"M", fingerprint]:
            return Mismatch(fingerprint)
        case [b"X", b"refused", attempt]:
            return Abandoned("refused", attempt)
        case [b"X", _, attempt]:
            return Abandoned("poisoned", attempt)
        case _:
            return _unreadable(claim.id)


def _unreadable(id: bytes) -> Unreadable:
    return Unreadable(
        "the operation's key in Redis holds something that this version cannot read", digest=id.hex()[:16]
    )


def _record(id: bytes, answer: bytes | None, now: int, *, results: bool, skip_unreadable: bool) -> Record | None:
    if answer is None:
        return None
    try:
        return packed.unpack(id, answer, now, results=results)
    except packed.NotReadable as error:
        if skip_unreadable:
            return None
        raise _unreadable(id) from error


def _portions(commands: Sequence[Complete]) -> Iterator[Sequence[Complete]]:
    """Runs of commands whose results come to no more than LARGEST_CALL, or single ones."""
    sizes = [len(command.result or b"") for command in commands]
    if sum(sizes) <= LARGEST_CALL:
        yield commands
        return
    start = size = 0
    for index, weight in enumerate(sizes):
        if size + weight > LARGEST_CALL and index > start:
            yield commands[start:index]
            start, size = index, 0
        size += weight
    yield commands[start:]


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CAPABILITIES.max_batch):
        yield items[start : start + CAPABILITIES.max_batch]
