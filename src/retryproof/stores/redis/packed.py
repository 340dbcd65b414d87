"""A record as one string, as scripts/record.lua describes it: what is sent of it, and what is read from it."""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Mapping, Sequence
from struct import Struct, error

from retryproof.core.commands import NOTHING, Acquired, Checkpoint, Claim, Complete, Finished, Release, Renew
from retryproof.core.record import MICROSECONDS, Record, State, microseconds
from retryproof.stores.redis.resp import HEADS, Packed

FORMAT = 1
"""The first byte of a record. A release that changes the form takes another number, and still reads this one."""

_HEAD = Struct("<BBddBIIddd16sBBBI")
_LENGTHS = Struct("<BBBI")
_TOKEN = Struct("<d")
_LEASE = Struct("<dB")
_CHECKPOINT = Struct("<II")
_ID_BYTES, _NONCE_BYTES = 32, 16
_NAMES_AT = _NONCE_BYTES + _LENGTHS.size  # of what a new record is from its nonce on
_ODD = "surrogatepass"  # one odd name must not fail its neighbours


class NotReadable(Exception):
    """It is not a record, or has a format that this version does not know."""


# What is sent of it: for a whole batch in one loop, since a call an item would cost as much as its work.


def keys(prefix: bytes, ids: Sequence[bytes]) -> Packed:
    """How many they are, and the names of records."""
    if list(map(len, ids)).count(_ID_BYTES) != len(ids):
        raise ValueError(f"an id has {_ID_BYTES} bytes")
    count = b"%d" % len(ids)
    before = HEADS[len(prefix) + 2 * _ID_BYTES] + prefix
    names = hexlify(b"".join(ids), b"|", _ID_BYTES).replace(b"|", before)
    return Packed(1 + len(ids), [HEADS[len(count)], count, before, names])


def new_records(claims: Sequence[Claim]) -> Packed:
    """What each new record is from its nonce on; the script writes what stands before."""
    parts: list[bytes] = []
    for claim in claims:
        nonce, fingerprint, tenant = claim.nonce, claim.fingerprint, claim.tenant
        if len(nonce) != _NONCE_BYTES:
            raise ValueError(f"a nonce has {_NONCE_BYTES} bytes, not {len(nonce)}")
        trace = claim.trace.encode("utf-8", _ODD) if claim.trace else b""
        of_fingerprint, of_tenant, of_trace = len(fingerprint), len(tenant), len(trace)
        lengths = _LENGTHS.pack(of_fingerprint, 0, of_tenant, of_trace)
        before = HEADS[_NAMES_AT + of_fingerprint + of_tenant + of_trace]
        parts += (before, nonce, lengths, fingerprint, tenant, trace)
    return Packed(len(claims), parts)


def completions(commands: Sequence[Complete]) -> Packed:
    """Fence and result of each, and then the states in which they settle."""
    parts: list[bytes] = []
    for command in commands:
        result = command.result or b""  # the state says what an empty one is
        nonce = command.nonce
        before = HEADS[_TOKEN.size + len(nonce)]
        parts += (before, _TOKEN.pack(command.token), nonce, HEADS[len(result)], result)
    states = bytes([State.TOMBSTONE if command.result is None else State.COMPLETED for command in commands])
    parts += (HEADS[len(states)], states)
    return Packed(2 * len(commands) + 1, parts)


def releases(commands: Sequence[Release]) -> list[bytes]:
    """Fence of each, and whether an operator settles; and then the states."""
    items: list[bytes] = []
    for command in commands:
        items += (fence(command), b"1" if command.settles else b"")
    items.append(bytes([State.RELEASED] * len(commands)))
    return items


def fence(command: Release | Renew | Checkpoint | Record) -> bytes:
    """Token and nonce as they stand in a record."""
    return _TOKEN.pack(command.token) + command.nonce


def renewals(commands: Sequence[Renew]) -> list[bytes]:
    """Fence of each, and lease, and whether it is alone."""
    items: list[bytes] = []
    for command in commands:
        items += (fence(command), _LEASE.pack(microseconds(command.lease), command.alone))
    return items


def checkpoints(commands: Sequence[Checkpoint]) -> list[bytes]:
    """Fence of each, and the checkpoint as it stands in a record."""
    items: list[bytes] = []
    for command in commands:
        name = command.name.encode("utf-8", _ODD)
        items += (fence(command), _CHECKPOINT.pack(len(name), len(command.value)) + name + command.value)
    return items


# What is read from it


def claim_reply(record: bytes) -> Acquired | Finished:
    """What a claim is told by the record that it acquired, or found finished; raises NotReadable."""
    try:
        return _claim_reply(record)
    except (error, ValueError) as cause:
        raise NotReadable from cause


def _claim_reply(record: bytes) -> Acquired | Finished:
    head = _HEAD.unpack_from(record)
    format, state, _, _, _, attempt, _, _, first_seen, token, nonce, fingerprint, birth, tenant, trace = head
    birth_at = _HEAD.size + fingerprint
    trace_at = birth_at + birth + tenant
    tail = trace_at + trace
    if format != FORMAT or tail > len(record):
        raise NotReadable
    traced = record[trace_at:tail].decode("utf-8", _ODD) if trace else ""
    if state == State.COMPLETED:
        return Finished(record[tail:], attempt, int(first_seen), traced)
    if state == State.TOMBSTONE:
        return Finished(None, attempt, int(first_seen), traced)
    if state != State.IN_PROGRESS:
        raise NotReadable
    born = record[birth_at : birth_at + birth] if birth else nonce
    return Acquired(int(token), attempt, int(first_seen), born, _checkpoints(record, tail), traced)


def unpack(id: bytes, record: bytes, now: int, *, results: bool = True) -> Record:
    """The record; raises NotReadable. results False: a completed one was read without its result."""
    try:
        return _unpack(id, record, now, results=results)
    except (error, ValueError) as cause:
        raise NotReadable from cause


def _unpack(id: bytes, record: bytes, now: int, *, results: bool) -> Record:
    head = _HEAD.unpack_from(record)
    format, number, expires_at, lease_until, counts, attempt, deaths, retention, first_seen, token, nonce = head[:11]
    ends, at = [], _HEAD.size
    for length in head[11:]:
        at += length
        ends.append(at)
    after_fingerprint, after_birth, after_tenant, tail = ends
    state = State(number)
    if format != FORMAT or tail > len(record):
        raise NotReadable
    return Record(
        id=id,
        state=state,
        fingerprint=record[_HEAD.size : after_fingerprint],
        birth=record[after_fingerprint:after_birth] or nonce,
        nonce=nonce,
        token=int(token),
        attempt=attempt,
        deaths=deaths,
        counts=bool(counts),
        first_seen=int(first_seen),
        lease_until=int(lease_until),
        expires_at=int(expires_at),
        retention=retention / MICROSECONDS,
        result=record[tail:] if results and state is State.COMPLETED else None,
        tenant=record[after_birth:after_tenant],
        trace=record[after_tenant:tail].decode("utf-8", _ODD),
        checkpoints=NOTHING if state >= State.COMPLETED else _checkpoints(record, tail),
        read_at=now,
    )


def _checkpoints(record: bytes, at: int) -> Mapping[str, bytes]:
    """Those that begin at `at`; the last one under a name counts."""
    if at == len(record):
        return NOTHING
    found: dict[str, bytes] = {}
    while at < len(record):
        name_length, value_length = _CHECKPOINT.unpack_from(record, at)
        at += _CHECKPOINT.size
        value_at = at + name_length
        end = value_at + value_length
        if end > len(record):
            raise NotReadable
        found[record[at:value_at].decode("utf-8", _ODD)] = record[value_at:end]
        at = end
    return found
