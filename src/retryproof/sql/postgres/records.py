"""PostgreSQL as plans: what each call of the store says to the server, without a driver.

Theory. A claim's batch is one statement, so one round trip and one commit. It reads every row without locking; most
answers (running, finished, mismatch) come from that snapshot alone, and a completed record never changes. What is to be
written is found in the snapshot and checked again under a lock:

    seen      each item with its row, and what the table of `core.record` says about it
    taken     rows to take over, take again or bear again: locked, unless a rival holds them (SKIP LOCKED), and only as
              long as they are what was seen: token, state and lease
    inserted  absent ids, each behind an advisory lock that is tried, never waited for: ON CONFLICT DO NOTHING alone
              would wait for a rival that has not committed

`taken` is left out at first, since a server prepares it at every execution (an eighth of what a lone claim costs it)
and few need it. An item without an answer is to be taken, lost a race, or its row is locked. A second statement has
`taken` and a new snapshot; who has no answer then is told `Running` for a short time. So no batch waits for anybody's
lock (T2), and none can deadlock.

The fenced commands work alike: one statement that updates what is current and not locked. Only when an item is missing
from its answer does a second one look why: done before (C3), lost, or locked, which is tried again after a nap.
In a caller's own transaction that is otherwise: `joined` has those plans.

Every subquery for one row is a LATERAL one with LIMIT or FOR UPDATE, which the planner cannot turn into a scan of the
whole table. `clock` is read once a statement (C9). Parameters are in the server's own style ($1), for both drivers; how
items are given is `statements.Items`.

A batch costs the server a fifth of what its items cost one by one; the advisory lock is a tenth of a claim. Without the
index on expires_at an operation costs the server 2 to 6 % less, and 13 % less where the table has room for HOT updates
as well. A BRIN or a partial index in its place saves 1 to 4 %. So it stays: reaping goes by it, whatever is stored.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from struct import Struct
from typing import Any, TypeVar

from retryproof.core.batch import Batch, Reaped
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
from retryproof.core.errors import StoreUnavailable
from retryproof.core.record import MICROSECONDS, Record, State, microseconds
from retryproof.sql.plan import Plan, Row, Statement
from retryproof.sql.postgres import statements
from retryproof.sql.postgres.statements import TABLE, ClaimCase, Items

LOCKED_LEASE = 1.0
"""Seconds that the holder of a locked row is said to run; who waits asks again long before."""
NAPS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.0)
"""Seconds before each look at what a try left over; a new try follows each look but the last. A rival batch is gone
after its commit, some milliseconds; a caller's transaction may stay, and after these 75 ms its row's item alone is
answered with an error. Others wait for the naps, on psycopg those of other kinds as well, so they are short: who sent
the item asks again (T2)."""
REAP_BATCH = 500
"""Records a statement removes at most: some 10 ms, so that a reaper never holds many locks for long."""

ID_SIZE = 32
_LOCK_KEY = Struct(">q24x")  # the first bytes of an id
_ABSENT = ClaimCase.ABSENT.value
ABANDONED = {"rerun": 0, "refuse": 1, "settle": 2}

Fenced = Complete | Release | Renew | Checkpoint
F = TypeVar("F", bound=Fenced)


class RecordPlans:
    """Each call of a store as a plan, over one table of operations."""

    def __init__(self, table: str) -> None:
        self.claim = partial(claim_plan, table=table)
        self.complete = partial(settle_plan, table=table)
        self.release = partial(release_plan, table=table)
        self.renew = partial(renew_plan, table=table)
        self.checkpoint = partial(checkpoint_plan, table=table)
        self.get = partial(get_plan, table=table)
        self.scan = partial(scan_plan, table=table)
        self.evict = partial(evict_plan, table=table)
        self.reap = partial(reap_plan, table=table)
        self.unmark = partial(unmark_plan, table=table)


def claim_plan(claims: Sequence[Claim], table: str = TABLE) -> Plan[Sequence[ClaimReply]]:
    """Take each operation or say why not: one statement, two to take what is there or after a lost race."""
    replies: dict[bytes, ClaimReply] = {}
    for taking in (False, True):
        asked = [claim for claim in claims if claim.id not in replies] if replies else claims
        for row in (yield _claim(asked, table, taking=taking)):
            if row[1] == _ABSENT:
                replies.update(_new(row, asked))
            else:
                replies[row[0]] = _claim_reply(row)
        if len(replies) == len(claims):
            break
    return [replies.get(claim.id) or Running(min(claim.lease, LOCKED_LEASE)) for claim in claims]


def _new(row: Row, asked: Sequence[Claim]) -> dict[bytes, ClaimReply]:
    """The replies to those that were absent, which one row tells: their ids one after the other, and their token."""
    ids, token = row[0], row[2]
    if len(ids) < len(asked) * ID_SIZE:
        new = {ids[start : start + ID_SIZE] for start in range(0, len(ids), ID_SIZE)}
        asked = [claim for claim in asked if claim.id in new]
    return {claim.id: Acquired(token, 1, token, claim.nonce, NOTHING, claim.trace) for claim in asked}


def _claim(claims: Sequence[Claim], table: str, *, taking: bool) -> Statement:
    """A claim by plain values; many by an array a column, and more cheaply where they are alike, as nearly always."""
    first = claims[0]
    if len(claims) == 1:
        trace = _bytes(first.trace) if first.trace else b""
        (key,) = _LOCK_KEY.unpack(first.id)
        own = (first.id, first.fingerprint, first.nonce, first.tenant, trace, first.alone, key)
        return Statement(statements.claim(table, Items.ONE, taking=taking), (*own, *_terms(first)))
    ids = [claim.id for claim in claims]
    strings = (
        ids,
        [claim.fingerprint for claim in claims],
        [claim.nonce for claim in claims],
        [claim.tenant for claim in claims],
        [_bytes(claim.trace) if claim.trace else b"" for claim in claims],
    )
    alone = [claim.alone for claim in claims]
    keys = lock_keys(ids)
    if all(map(_of_one_length, strings)) and all(_has_terms(claim, first) for claim in claims):
        values = (*map(b"".join, strings), bytes(alone), keys, *_terms(first))
        return Statement(statements.claim(table, Items.ALIKE, taking=taking), values)
    terms = map(list, zip(*map(_terms, claims), strict=True))
    return Statement(statements.claim(table, Items.MANY, taking=taking), (*strings, alone, keys, *terms))


def _terms(claim: Claim) -> tuple[int, ...]:
    """What a policy says, in the order of the statement."""
    return (
        microseconds(claim.lease),
        microseconds(claim.retention),
        microseconds(claim.unsettled_retention),
        ABANDONED[claim.on_abandoned],
        claim.max_attempts,
    )


def _has_terms(claim: Claim, first: Claim) -> bool:
    return (
        claim.lease == first.lease
        and claim.retention == first.retention
        and claim.unsettled_retention == first.unsettled_retention
        and claim.on_abandoned == first.on_abandoned
        and claim.max_attempts == first.max_attempts
    )


def _of_one_length(strings: Sequence[bytes]) -> bool:
    return len(set(map(len, strings))) == 1


def _batch(sql: Callable[[bool], str], columns: Sequence[list[Any]]) -> Statement:
    """A statement over columns of parameters: arrays, or plain values where there is one item."""
    if len(columns[0]) == 1:
        return Statement(sql(True), [column[0] for column in columns])
    return Statement(sql(False), columns)


def _claim_reply(row: Row) -> ClaimReply:
    _, case, token, attempt, first_seen, birth, trace, checkpoints, payload = row
    match case:
        case ClaimCase.FINISHED:  # nearly always, and each comparison costs as much as the reply
            return Finished(payload, attempt, first_seen, _text(trace))
        case ClaimCase.EXPIRED | ClaimCase.RELEASED | ClaimCase.TAKEN_OVER | ClaimCase.REPEATED:
            return Acquired(token, attempt, first_seen, birth, _checkpoints(checkpoints), _text(trace))
        case ClaimCase.RUNNING:
            return Running(token / MICROSECONDS)
        case ClaimCase.MISMATCH:
            return Mismatch(payload)
        case ClaimCase.REFUSED:
            return Abandoned("refused", attempt)
        case ClaimCase.COMMITTED:
            return Abandoned("committed", attempt)
        case _:
            return Abandoned("poisoned", attempt)


def unmark_plan(ids: Sequence[bytes], table: str = TABLE) -> Plan[None]:
    """Remove the markers of operations that somebody settled."""
    yield Statement(statements.unmark(table), (list(ids),))


def checkpoint_values(command: Checkpoint) -> tuple[Any, ...]:
    """The parameters of one checkpoint."""
    name, value = b64encode(_bytes(command.name)).decode(), b64encode(command.value).decode()
    return command.id, command.nonce, command.token, name, value


def settle_plan(commands: Sequence[Complete], table: str = TABLE) -> Plan[Batch[FenceReply]]:
    """Settle each operation in a commit of the batch's own, never waiting for a lock."""
    return _fenced_plan(commands, lambda some: _complete(some, table), table)


def release_plan(commands: Sequence[Release], table: str = TABLE) -> Plan[Batch[FenceReply]]:
    """Give each operation back, never waiting for a lock."""
    return _fenced_plan(commands, lambda some: _release(some, table), table)


def renew_plan(commands: Sequence[Renew], table: str = TABLE) -> Plan[Batch[FenceReply]]:
    """Extend each lease, never waiting for a lock."""
    return _fenced_plan(commands, lambda some: _renew(some, table), table)


def checkpoint_plan(commands: Sequence[Checkpoint], table: str = TABLE) -> Plan[Batch[FenceReply]]:
    """Keep each value under its name, never waiting for a lock."""
    return _fenced_plan(commands, lambda some: _checkpoint(some, table), table)


def _fenced_plan(
    commands: Sequence[F], statement: Callable[[Sequence[F]], Statement], table: str
) -> Plan[Batch[FenceReply]]:
    """Try; look why items are missing; try those again that are locked; say `StoreUnavailable` for what stays so."""
    replies: dict[bytes, FenceReply] = {}
    pending = commands
    for nap in NAPS:
        done = yield statement(pending)
        if len(done) == len(commands):
            return [DONE] * len(commands)  # nearly always
        replies.update({row[0]: DONE for row in done if row})
        pending = [command for command in pending if command.id not in replies]
        if not pending:
            break
        states: dict[bytes, int] = {row[0]: row[1] for row in (yield _look(pending, table, nap))}
        over = [command for command in pending if states.get(command.id) != State.IN_PROGRESS]
        replies.update({command.id: DONE if _repeated(command, states.get(command.id)) else LOST for command in over})
        pending = [command for command in pending if command.id not in replies]
        if not pending:
            break
    return [replies.get(command.id) or _locked(command) for command in commands]


def _locked(command: Fenced) -> StoreUnavailable:
    return StoreUnavailable(
        "another transaction holds the record's row; nothing was changed, try again", digest=command.id.hex()[:16]
    )


def _repeated(command: Fenced, state: int | None) -> bool:
    """Whether a record in this state, with the command's nonce and token, was settled by the same command (C3)."""
    match command:
        case Complete():
            return state in (State.COMPLETED, State.TOMBSTONE)
        case Release():
            return state == State.RELEASED
        case _:
            return False


def _fence(commands: Sequence[Fenced]) -> tuple[list[Any], ...]:
    return (
        [command.id for command in commands],
        [command.nonce for command in commands],
        [command.token for command in commands],
    )


def _complete(commands: Sequence[Complete], table: str) -> Statement:
    """Counted, not answered by ids: where some are missing, a look tells which are done (C3)."""
    ids, nonces, tokens = _fence(commands)
    results = [command.result for command in commands]
    listed = any(command.listed for command in commands)
    if len(commands) > 1 and _of_one_length(ids) and _of_one_length(nonces):
        values = (b"".join(ids), b"".join(nonces), tokens, results)
        return Statement(statements.complete(table, Items.ALIKE, listed=listed), values, counted=True)
    statement = _batch(
        lambda one: statements.complete(table, Items.ONE if one else Items.MANY, listed=listed),
        (ids, nonces, tokens, results),
    )
    statement.counted = True
    return statement


def _release(commands: Sequence[Release], table: str) -> Statement:
    settles = [command.settles for command in commands]
    return _batch(lambda one: statements.release(table, one=one), (*_fence(commands), settles))


def _renew(commands: Sequence[Renew], table: str) -> Statement:
    leases = [microseconds(command.lease) for command in commands]
    alone = [command.alone for command in commands]
    return _batch(lambda one: statements.renew(table, one=one), (*_fence(commands), leases, alone))


def _checkpoint(commands: Sequence[Checkpoint], table: str) -> Statement:
    return _batch(lambda one: statements.checkpoint(table, one=one), _checkpoint_columns(commands))


def _checkpoint_columns(commands: Sequence[Checkpoint]) -> tuple[list[Any], ...]:
    names = [b64encode(_bytes(command.name)).decode() for command in commands]
    values = [b64encode(command.value).decode() for command in commands]
    return (*_fence(commands), names, values)


def _look(commands: Sequence[Fenced], table: str, nap: float) -> Statement:
    return Statement(statements.look(table), (*_fence(commands), nap))


def get_plan(ids: Sequence[bytes], table: str = TABLE) -> Plan[Sequence[Record | None]]:
    """Each unexpired record."""
    rows = yield Statement(statements.get(table), (list(ids),))
    found = {row[0]: read_record(row) for row in rows}
    return [found.get(id) for id in ids]


def scan_plan(
    *,
    prefix: bytes = b"",
    state: State | None = None,
    tenant: bytes | None = None,
    after: bytes = b"",
    limit: int = 100,
    table: str = TABLE,
) -> Plan[Sequence[Record]]:
    """A page of unexpired records, without results."""
    parameters = [prefix, _behind(prefix), after, None if state is None else int(state), limit]
    by_tenant = bool(tenant)  # an empty one names the records without a tenant, which the index leaves out
    if tenant is not None:
        parameters.append(tenant)
    rows = yield Statement(statements.scan(table, tenant=tenant is not None, indexed=by_tenant), parameters)
    return [read_record(row) for row in rows]


def _behind(prefix: bytes) -> bytes | None:
    """The first id behind all that start with the prefix, None when there is none."""
    cut = prefix.rstrip(b"\xff")
    return cut[:-1] + bytes([cut[-1] + 1]) if cut else None


def evict_plan(ids: Sequence[bytes], table: str = TABLE) -> Plan[Sequence[bool]]:
    """Forget each record that is not live nor locked; whether it is gone."""
    kept = {row[0] for row in (yield Statement(statements.evict(table), (list(ids),)))}
    return [id not in kept for id in ids]


def reap_plan(limit: int, told: Sequence[Record] = (), table: str = TABLE) -> Plan[Reaped]:
    """End what was told, then remove what is settled and find what is not, a bounded number a statement.

    Each statement commits by itself, and none removes what nobody has been told of.
    """
    ended: list[bytes] = []
    for start in range(0, len(told), REAP_BATCH):
        batch = told[start : start + REAP_BATCH]
        columns = [[record.id for record in batch], [record.nonce for record in batch]]
        ended += [row[0] for row in (yield Statement(statements.end(table), (*columns, [r.token for r in batch])))]
    settled, more = 0, True
    unsettled: list[Record] = []
    while more and (room := limit - settled - len(unsettled)) > 0:
        seen = [record.id for record in unsettled]
        rows = yield Statement(statements.reap(table), (min(REAP_BATCH, room), seen))
        within = [row for row in rows if row[-2]]
        found = [read_record(row) for row in within if row[-1]]
        settled += len(within) - len(found)
        unsettled += found
        more = len(within) < len(rows)
    return Reaped(settled, unsettled, more=more, ended=ended)


def read_record(row: Row) -> Record:
    """A record from a row in the order of `postgres_statements.RECORD`."""
    return Record(
        id=row[0],
        state=State(row[1]),
        fingerprint=row[2],
        birth=row[3],
        nonce=row[4],
        token=row[5],
        attempt=row[6],
        deaths=row[7],
        counts=row[8],
        first_seen=row[9],
        lease_until=row[10],
        expires_at=row[11],
        retention=row[12] / MICROSECONDS,
        tenant=row[13],
        trace=_text(row[14]),
        result=row[15],
        checkpoints=_checkpoints(row[16]),
        read_at=row[17],
        committed=row[18],
    )


def _checkpoints(kept: str | None) -> Mapping[str, bytes]:
    if kept is None:
        return NOTHING
    pairs: dict[str, Any] = json.loads(kept)
    return {_text(b64decode(name)): b64decode(value) for name, value in pairs.items()}


def _bytes(text: str) -> bytes:
    """Any text, with lone surrogates: one odd name must not fail its neighbours."""
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def lock_keys(ids: Sequence[bytes]) -> list[int]:
    """The advisory locks of ids that are not there yet."""
    return [key for (key,) in _LOCK_KEY.iter_unpack(b"".join(ids))]
