"""What is sent to the server and what its answers mean; pure, the same for both colours.

Each method of the store is a plan: a generator that yields requests, is sent their answers and returns the method's
own answer. A request that failed is raised inside the plan.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias, TypeVar

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
    Finished,
    Mismatch,
    Release,
    Renew,
    Running,
)
from retryproof.core.errors import StoreUnavailable, Unreadable
from retryproof.core.record import MICROSECONDS, Record, State, microseconds
from retryproof.stores.base import Batch, Capabilities, Reaped

CAPABILITIES = Capabilities(name="redis", native_ttl=True, concurrent=True)

SCAN_COUNT = 1_000
"""Keys that one SCAN looks at: some 0.3 ms of the server's time."""

REAP_LOOKS_AT_MOST = 20
"""SCANs of one pass of reaping; the next pass goes on where this one ended."""

LARGEST_CALL = 8 * 2**20
"""Bytes of results that one call carries; more of them take several, so that the server is not held for long."""

T = TypeVar("T")
Argument: TypeAlias = bytes | str | int
Reply: TypeAlias = Any
"""What the server answered, as the driver gives it: bytes, int, None or a list of these."""


class Script:
    """A script and its digest, by which the server knows it after its first use."""

    __slots__ = ("digest", "source")

    def __init__(self, *names: str) -> None:
        folder = files("retryproof.stores.redis") / "scripts"
        self.source = "\n".join((folder / f"{name}.lua").read_text("utf-8") for name in ("record", *names))
        self.digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Request:
    """A command to send: by digest first, then by source where the server does not know the script.

    repeatable: done twice it has the effect and the answer of once.
    """

    arguments: Sequence[Argument]
    script: Script | None = None
    repeatable: bool = True

    def forms(self) -> Iterator[Sequence[Argument]]:
        """What to send, in turn, until the server knows it."""
        if self.script is None:
            yield self.arguments
        else:
            yield ("EVALSHA", self.script.digest, *self.arguments)
            yield ("EVAL", self.script.source, *self.arguments)


Plan: TypeAlias = Generator[Request, Reply, T]


class Protocol:
    """The plans of one store's methods.

    Only the place where reaping goes on is kept; it is a hint, and two that reap at once do no harm.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}:"
        self._reap_cursor = 0
        self._claim = Script("claim")
        self._settle = Script("fence", "settle")
        self._renew = Script("fence", "renew")
        self._checkpoint = Script("fence", "checkpoint")
        self._read = Script("read")
        self._remove = Script("remove")

    def key(self, id: bytes) -> str:
        """The name of a record's hash."""
        return self._prefix + id.hex()

    def claim(self, claims: Sequence[Claim]) -> Plan[Batch[ClaimReply]]:
        """One script call; terms that claims have in common are sent once."""
        if not claims:
            return []
        numbers: dict[_Terms, int] = {}
        items: list[Argument] = []
        for claim in claims:
            number = numbers.setdefault(_terms(claim), len(numbers) + 1)
            items += (claim.fingerprint, claim.nonce, claim.tenant, claim.trace, number)
        arguments = self._keys(claims)
        arguments.append(len(numbers))
        for terms in numbers:
            arguments += _terms_arguments(terms)
        replies = yield Request(arguments + items, self._claim)
        return list(map(_claim_reply, claims, replies))

    def settle(self, commands: Sequence[Complete] | Sequence[Release]) -> Plan[Batch[FenceReply]]:
        """One script call completes or releases, or a few where the results are large."""
        replies: list[FenceReply | StoreUnavailable] = []
        for portion in _portions(commands):
            arguments = self._keys(portion)
            for command in portion:
                arguments += (command.nonce, command.token, *_outcome(command))
            replies += yield from _fenced(self._settle, arguments)
        return replies

    def renew(self, commands: Sequence[Renew]) -> Plan[Batch[FenceReply]]:
        """One script call."""
        arguments = self._keys(commands)
        for command in commands:
            arguments += (command.nonce, command.token, microseconds(command.lease), int(command.alone))
        return (yield from _fenced(self._renew, arguments))

    def checkpoint(self, commands: Sequence[Checkpoint]) -> Plan[Batch[FenceReply]]:
        """One script call."""
        arguments = self._keys(commands)
        for command in commands:
            arguments += (command.nonce, command.token, command.name, command.value)
        return (yield from _fenced(self._checkpoint, arguments))

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
            answer = yield Request([len(batch), *map(self.key, batch), "any"], self._remove)
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
            for record in batch:
                arguments += (record.nonce, record.token)
            answer = yield Request(arguments, self._remove, repeatable=False)
            gone += (record.id for record, character in zip(batch, answer, strict=True) if character == ord("1"))
        return gone

    def _keys(self, commands: Sequence[Claim | Complete | Release | Renew | Checkpoint]) -> list[Argument]:
        prefix = self._prefix
        return [len(commands), *[prefix + command.id.hex() for command in commands]]

    def _records(
        self, ids: Sequence[bytes], what: str, *, skip_unreadable: bool = False
    ) -> Plan[Sequence[Record | None]]:
        records: list[Record | None] = []
        for batch in _batches(ids):
            now, *answers = yield Request([len(batch), *map(self.key, batch), what], self._read)
            for id, answer in zip(batch, answers, strict=True):
                record = _record(id, answer, int(now), skip_unreadable=skip_unreadable)
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
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", self._prefix) + prefix.hex() + "*"
        next_cursor, keys = yield Request(["SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT])
        start = len(self._prefix.encode())
        return int(next_cursor), [bytes.fromhex(key[start:].decode()) for key in keys if _HEX_ID.fullmatch(key, start)]


_HEX_ID = re.compile(rb"[0-9a-f]{64}")
_FENCE_REPLIES: Mapping[int, FenceReply] = {ord("1"): DONE, ord("0"): LOST}


_Terms: TypeAlias = tuple[float, float, float, str, int, int]


def _terms(claim: Claim) -> _Terms:
    """What policies give, and so most claims of a batch have in common."""
    return (
        claim.lease,
        claim.retention,
        claim.unsettled_retention,
        claim.on_abandoned,
        claim.max_attempts,
        claim.alone,
    )


def _terms_arguments(terms: _Terms) -> tuple[int, ...]:
    lease, retention, unsettled_retention, on_abandoned, max_attempts, alone = terms
    durations = (microseconds(lease), microseconds(retention), microseconds(unsettled_retention))
    return (*durations, int(on_abandoned == "refuse"), max_attempts, alone)


def _outcome(command: Complete | Release) -> tuple[str, bytes]:
    """The state to settle in and the result, which an empty one does not stand for: the state says whether it is."""
    if isinstance(command, Release):
        return "2", b"1" if command.settles else b""
    return ("4", b"") if command.result is None else ("3", command.result)


def _fenced(script: Script, arguments: list[Argument]) -> Plan[Batch[FenceReply]]:
    if arguments[0] == 0:
        return []
    answer = yield Request(arguments, script)
    return [_FENCE_REPLIES.get(character) or _unreadable() for character in answer]


def _claim_reply(claim: Claim, reply: Reply) -> ClaimReply | StoreUnavailable:
    if type(reply) is int:
        return Acquired(reply, 1, reply, claim.nonce, NOTHING, claim.trace)
    match reply:
        case [b"F", result, attempt, first_seen, trace]:
            return Finished(result, attempt, first_seen, trace.decode() if trace else "")
        case [b"R", left]:
            return Running(left / MICROSECONDS)
        case [b"M", fingerprint]:
            return Mismatch(fingerprint)
        case [b"A", token, attempt, first_seen, birth, trace, *steps]:
            checkpoints = {name.decode(): value for name, value in zip(steps[::2], steps[1::2], strict=True)}
            return Acquired(token, attempt, first_seen, birth, checkpoints or NOTHING, trace.decode())
        case [b"X", b"refused", attempt]:
            return Abandoned("refused", attempt)
        case [b"X", _, attempt]:
            return Abandoned("poisoned", attempt)
        case _:
            return _unreadable()


def _unreadable() -> StoreUnavailable:
    return StoreUnavailable("the operation's key in Redis holds something that this version cannot read")


def _record(id: bytes, answer: Reply, now: int, *, skip_unreadable: bool) -> Record | None:
    if answer == []:
        return None
    try:
        record = _decode(id, answer, now)
    except (ValueError, KeyError, TypeError) as error:
        if skip_unreadable:
            return None
        raise Unreadable(
            "the operation's key in Redis holds something that this version cannot read", digest=id.hex()[:16]
        ) from error
    return record


def _decode(id: bytes, answer: Sequence[bytes], now: int) -> Record:
    fields = dict(zip(answer[::2], answer[1::2], strict=True))
    state, token, lease_until, expires_at, retention, _, counts, first_seen, attempt, deaths = map(
        int, fields[b"head"].split(b" ")
    )
    nonce = fields[b"nonce"]
    return Record(
        id=id,
        state=State(state),
        fingerprint=fields[b"fingerprint"],
        birth=fields.get(b"birth", nonce),
        nonce=nonce,
        token=token,
        attempt=attempt,
        deaths=deaths,
        counts=bool(counts),
        first_seen=first_seen,
        lease_until=lease_until,
        expires_at=expires_at,
        retention=retention / MICROSECONDS,
        result=fields.get(b"result"),
        tenant=fields.get(b"tenant", b""),
        trace=fields.get(b"trace", b"").decode(),
        checkpoints={name[5:].decode(): value for name, value in fields.items() if name.startswith(b"step:")},
        read_at=now,
    )


def _portions(commands: Sequence[Complete | Release]) -> Iterator[Sequence[Complete | Release]]:
    """Runs of commands whose results come to no more than LARGEST_CALL, or single ones."""
    start = size = 0
    for index, command in enumerate(commands):
        weight = len(_outcome(command)[1])
        if size + weight > LARGEST_CALL and index > start:
            yield commands[start:index]
            start, size = index, 0
        size += weight
    if start < len(commands):
        yield commands[start:]


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), CAPABILITIES.max_batch):
        yield items[start : start + CAPABILITIES.max_batch]
