"""The form of a record in Redis: packed; a hash, as it was before; and forms that this version does not know (C21).

During a rolling deployment processes of both forms work on the same records. What one of them cannot read is an error
for it, never an operation that it runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
from redis import Redis

from retryproof import Idempotency
from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Checkpoint,
    Claim,
    Complete,
    Finished,
    Mismatch,
    Release,
    Renew,
    Running,
)
from retryproof.core.errors import StoreUnavailable, Unreadable
from retryproof.core.record import Record, State
from retryproof.stores.redis import RedisStore
from servers import Instance
from tests.stores.hashes import HashStore
from tests.stores.support import again, new_claim

UNREADABLE = [b"E"]


@pytest.fixture(params=["redis", "valkey"])
def client(request: pytest.FixtureRequest) -> Iterator[Redis]:
    with Redis.from_url(cast("str", request.getfixturevalue(f"{request.param}_url"))) as client:
        yield client


@pytest.fixture
def store(client: Redis, unique: str) -> Iterator[RedisStore]:
    store = RedisStore(client, prefix=unique)
    yield store
    store.close()


@pytest.fixture
def before(client: Redis, unique: str) -> HashStore:
    """The store of the release before, over the same records."""
    return HashStore(client, unique)


def taken(reply: object) -> Acquired:
    assert isinstance(reply, Acquired), reply
    return reply


def take(store: RedisStore, claim: Claim) -> Acquired:
    return taken(store.claim([claim])[0])


def read(store: RedisStore, id: bytes) -> Record:
    (record,) = store.get([id])
    assert record is not None
    return record


def a_full_claim(**changes: Any) -> Claim:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    return new_claim(fingerprint=bytes(range(64)), tenant=b"t" * 16, trace=trace, **changes)


# Packed


def test_a_record_is_one_string_of_at_most_400_bytes_of_memory(
    store: RedisStore, client: Redis, before: HashStore
) -> None:
    claim = new_claim(fingerprint=bytes(32), tenant=b"t" * 16)
    held = take(store, claim)
    assert store.complete([Complete(claim.id, claim.nonce, held.token, b"r" * 120)]) == [DONE]
    key = before.key(claim.id)
    assert client.type(key) == b"string"
    assert client.strlen(key) == 242
    assert cast("int", client.memory_usage(key, samples=0)) <= 400


def test_a_checkpoint_and_a_renewal_touch_only_what_they_change(
    private_redis: Callable[..., Instance], unique: str
) -> None:
    server = private_redis()
    store = RedisStore(server.url, prefix=unique)
    claim = new_claim()
    held = take(store, claim)
    large = Checkpoint(claim.id, claim.nonce, held.token, "large", bytes(2**20))
    assert store.checkpoint([large]) == [DONE]
    with Redis.from_url(server.url) as client:
        client.config_resetstat()
        assert store.checkpoint([replace(large, name="small", value=b"kept")]) == [DONE]
        assert store.renew([Renew(claim.id, claim.nonce, held.token, 60.0)]) == [DONE]
        arrived = set(cast("dict[str, Any]", client.info("commandstats")))
    assert arrived & {f"cmdstat_{name}" for name in ("get", "set", "getrange", "append", "setrange")} == {
        "cmdstat_getrange",
        "cmdstat_append",
        "cmdstat_setrange",
    }
    assert read(store, claim.id).checkpoints == {"large": bytes(2**20), "small": b"kept"}
    store.close()


@pytest.mark.parametrize("trace", ["", "t" * 10_000], ids=["as usual", "a long trace"])
@pytest.mark.parametrize("size", [3_900, 4_096, 100_000], ids=str)
def test_what_is_longer_than_what_is_read_at_first_is_kept_whole(store: RedisStore, size: int, trace: str) -> None:
    kept = {f"step {number}": secrets.token_bytes(size) for number in range(3)}
    dead = new_claim(lease=0.0, trace=trace)
    held = take(store, dead)
    for name, value in kept.items():
        store.checkpoint([Checkpoint(dead.id, dead.nonce, held.token, name, value)])
    second = again(dead, lease=60.0)
    held = take(store, second)
    assert (dict(held.checkpoints), held.trace) == (kept, trace)
    assert take(store, second) == held  # after a lost reply
    assert isinstance(store.claim([again(dead)])[0], Running)
    assert isinstance(store.claim([replace(again(dead), fingerprint=b"other")])[0], Mismatch)
    assert store.release([Release(dead.id, second.nonce, held.token)]) == [DONE]
    assert (read(store, dead.id).checkpoints, read(store, dead.id).settled) == (kept, False)
    third = again(dead)
    held = take(store, third)
    assert dict(held.checkpoints) == kept
    result = secrets.token_bytes(size)
    assert store.complete([Complete(dead.id, third.nonce, held.token, result)]) == [DONE]
    (reply,) = store.claim([again(dead)])
    assert isinstance(reply, Finished)
    assert (reply.result, reply.trace) == (result, trace)
    assert store.complete([Complete(dead.id, third.nonce, held.token, result)]) == [DONE]


@pytest.mark.crash
@pytest.mark.parametrize("server", ["redis", "valkey"])
def test_c1_what_was_changed_in_place_outlives_kill_minus_9_with_appendfsync_always(
    request: pytest.FixtureRequest, server: str, unique: str
) -> None:
    private = request.getfixturevalue(f"private_{server}")("--appendonly", "yes", "--appendfsync", "always")
    store = RedisStore(private.url, prefix=unique)
    claims = [new_claim(lease=60.0) for _ in range(3)]
    with Redis.from_url(private.url) as client:
        was_hash = new_claim(lease=60.0)
        tokens = [taken(reply).token for reply in store.claim(claims)]
        tokens.append(taken_before(HashStore(client, unique), was_hash))
    claims.append(was_hash)
    for claim, token in zip(claims, tokens, strict=True):
        for name in ("one", "two"):
            assert store.checkpoint([Checkpoint(claim.id, claim.nonce, token, name, name.encode())]) == [DONE]
        assert store.renew([Renew(claim.id, claim.nonce, token, 600.0, alone=False)]) == [DONE]
    assert store.complete([Complete(claims[0].id, claims[0].nonce, tokens[0], b"done")]) == [DONE]
    found = [replace(record, read_at=0) for record in store.get([claim.id for claim in claims]) if record is not None]
    private.kill()
    private.restart()
    kept = [replace(record, read_at=0) for record in store.get([claim.id for claim in claims]) if record is not None]
    assert kept == found
    assert (len(kept), dict(kept[3].checkpoints), kept[3].counts) == (4, {"one": b"one", "two": b"two"}, False)
    with Redis.from_url(private.url) as client:
        assert [client.ttl(HashStore(client, unique).key(claim.id)) > 0 for claim in claims] == [True] + [False] * 3
    store.close()


def test_a_checkpoint_under_a_name_kept_before_replaces_it(store: RedisStore) -> None:
    claim = new_claim(lease=0.0)
    held = take(store, claim)
    for value in (b"first", b"", b"third"):
        assert store.checkpoint([Checkpoint(claim.id, claim.nonce, held.token, "step", value)]) == [DONE]
    assert dict(take(store, again(claim)).checkpoints) == {"step": b"third"}


def test_c13_the_birth_stays_over_many_attempts(store: RedisStore) -> None:
    first = a_full_claim(lease=0.0)
    take(store, first)
    for attempt in range(2, 5):
        later = replace(first, nonce=secrets.token_bytes(16), tenant=b"o" * 16, trace="another")
        held = take(store, later)
        assert (held.birth, held.attempt, held.trace) == (first.nonce, attempt, first.trace)
    record = read(store, first.id)
    assert (record.birth, record.fingerprint, record.tenant) == (first.nonce, first.fingerprint, first.tenant)


def test_a_nonce_of_another_length_is_refused_before_it_is_sent(store: RedisStore) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        store.claim([replace(new_claim(), nonce=b"short")])


# Hashes, as the release before wrote them


@pytest.mark.parametrize("result", [b"", b"charged", None], ids=["empty", "some", "tombstone"])
def test_what_was_done_before_the_upgrade_is_replayed_after_it(
    store: RedisStore, before: HashStore, client: Redis, result: bytes | None
) -> None:
    claim = a_full_claim()
    token = taken_before(before, claim)
    assert before.complete(Complete(claim.id, claim.nonce, token, result)) == b"1"

    (reply,) = store.claim([replace(claim, nonce=secrets.token_bytes(16), trace="another")])
    assert isinstance(reply, Finished)
    assert (reply.result, reply.attempt, reply.first_seen, reply.trace) == (result, 1, token, claim.trace)
    (reply,) = store.claim([replace(again(claim), fingerprint=b"other")])
    assert reply == Mismatch(claim.fingerprint)
    record = read(store, claim.id)
    assert (record.state, record.tenant) == (State.TOMBSTONE if result is None else State.COMPLETED, claim.tenant)
    assert client.type(before.key(claim.id)) == b"hash"  # reading changes nothing
    assert client.ttl(before.key(claim.id)) > 0


def test_c1_what_runs_in_a_process_of_the_release_before_is_respected_and_completed_by_it(
    store: RedisStore, before: HashStore
) -> None:
    claim = new_claim()
    token = taken_before(before, claim)
    (reply,) = store.claim([again(claim)])
    assert isinstance(reply, Running)
    assert before.complete(Complete(claim.id, claim.nonce, token, b"done")) == b"1"
    assert store.claim([again(claim)]) == [Finished(b"done", 1, token)]


def test_c2_what_was_begun_before_the_upgrade_is_renewed_kept_and_completed_after_it(
    store: RedisStore, before: HashStore, client: Redis
) -> None:
    """A process that restarts with the same hold has none; a keeper or an operator may have."""
    claim = new_claim()
    token = taken_before(before, claim)
    before.checkpoint(Checkpoint(claim.id, claim.nonce, token, "one", b"1"))
    assert store.renew([Renew(claim.id, claim.nonce, token + 1, 100.0)]) == [LOST]
    assert client.type(before.key(claim.id)) == b"hash"
    assert store.renew([Renew(claim.id, claim.nonce, token, 100.0)]) == [DONE]
    assert client.type(before.key(claim.id)) == b"string"
    assert store.checkpoint([Checkpoint(claim.id, claim.nonce, token, "two", b"2")]) == [DONE]
    assert dict(read(store, claim.id).checkpoints) == {"one": b"1", "two": b"2"}
    assert store.complete([Complete(claim.id, claim.nonce, token, b"done")]) == [DONE]
    assert client.ttl(before.key(claim.id)) > 0


def test_c13_a_take_over_across_the_upgrade_goes_on_from_what_was_kept(store: RedisStore, before: HashStore) -> None:
    claim = a_full_claim(lease=0.0)
    token = taken_before(before, claim)
    before.checkpoint(Checkpoint(claim.id, claim.nonce, token, "charge ü", b"ch_1"))
    held = take(store, replace(claim, nonce=secrets.token_bytes(16), lease=60.0))
    assert held.token > token
    assert (held.attempt, held.first_seen, held.birth, held.trace) == (2, token, claim.nonce, claim.trace)
    assert dict(held.checkpoints) == {"charge ü": b"ch_1"}


def test_i2_who_was_overtaken_across_the_upgrade_changes_nothing_and_is_told_no_success(
    store: RedisStore, before: HashStore
) -> None:
    claim = new_claim(lease=0.0)
    token = taken_before(before, claim)
    winner = again(claim)
    held = take(store, winner)
    late = Complete(claim.id, claim.nonce, token, b"late")
    assert before.complete(late) == b"E"
    assert before.renew(Renew(claim.id, claim.nonce, token, 60.0)) == b"E"
    assert before.checkpoint(Checkpoint(claim.id, claim.nonce, token, "late", b"")) == b"E"
    assert before.evict(claim.id) == b"0"
    assert store.complete([Complete(claim.id, winner.nonce, held.token, b"won")]) == [DONE]
    assert store.claim([again(claim)]) == [Finished(b"won", 2, token)]


@pytest.mark.parametrize("state", ["running", "dead", "released", "done"])
def test_c21_the_release_before_runs_nothing_that_it_cannot_read(
    store: RedisStore, before: HashStore, state: str
) -> None:
    claim = new_claim(lease=0.0 if state == "dead" else 60.0)
    held = take(store, claim)
    if state == "released":
        store.release([Release(claim.id, claim.nonce, held.token)])
    elif state == "done":
        store.complete([Complete(claim.id, claim.nonce, held.token, b"done")])
    found = read(store, claim.id)
    assert before.claim(again(claim)) == UNREADABLE
    assert b"WRONGTYPE" in before.read(claim.id)
    assert replace(read(store, claim.id), read_at=0) == replace(found, read_at=0)


def test_i7_what_the_release_before_left_unsettled_stays_unsettled(store: RedisStore, before: HashStore) -> None:
    dead, kept, failed = new_claim(lease=0.0), new_claim(), new_claim()
    taken_before(before, dead)
    token = taken_before(before, kept)
    before.checkpoint(Checkpoint(kept.id, kept.nonce, token, "step", b""))
    before.release(Release(kept.id, kept.nonce, token))
    before.release(Release(failed.id, failed.nonce, taken_before(before, failed)))
    later = again(dead)
    held = take(store, later)
    assert store.release([Release(dead.id, later.nonce, held.token)]) == [DONE]
    settled = {record.id: record.settled for record in store.scan()}
    assert settled == {dead.id: False, kept.id: False, failed.id: True}


def test_c19_reaping_ends_hashes_as_it_ends_strings(store: RedisStore, before: HashStore, client: Redis) -> None:
    unsettled = new_claim(lease=0.0, unsettled_retention=0.0)
    live = new_claim(unsettled_retention=0.0)
    settled = new_claim()
    for claim in (unsettled, live):
        taken_before(before, claim)
    record = read_after(before, store, settled)
    before.write(replace(record, state=State.RELEASED, expires_at=record.first_seen))  # and is gone at once
    found = store.reap(10)
    assert [record.id for record in found.unsettled] == [unsettled.id]
    assert store.reap(0, found.unsettled).ended == [unsettled.id]
    assert [record.id for record in store.scan()] == [live.id]
    assert store.evict([live.id]) == [False]


def test_a_user_who_may_not_read_strings_yet_is_refused(private_redis: Callable[..., Instance], unique: str) -> None:
    server = private_redis()
    with Redis.from_url(server.url) as client:
        commands = ["+@hash", "+@scripting", "+pexpireat", "+persist", "+del", "+time", "+scan", "+select"]
        client.acl_setuser("app", enabled=True, passwords=["+word"], commands=commands, keys=["*"])
        claim = new_claim()
        taken_before(HashStore(client, unique), claim)
    store = RedisStore(server.url.replace("redis://", "redis://app:word@"), prefix=unique)
    with pytest.raises(StoreUnavailable, match=r"refused"):
        store.claim([again(claim)])
    store.close()


def test_an_engine_replays_what_an_engine_of_the_release_before_did(
    store: RedisStore, before: HashStore, client: Redis
) -> None:
    with Idempotency(store) as engine:
        first = engine.run("key", lambda: {"charged": 100}, scope="charges")
        (record,) = store.scan()
        before.write(read(store, record.id))
        assert client.type(before.key(record.id)) == b"hash"
        again = engine.run("key", lambda: pytest.fail("it ran twice"), scope="charges")
    assert (again.value, again.replayed) == (first.value, True)


# Forms that this version does not know


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: bytes([2]) + record[1:],
        lambda record: bytes([0]) + record[1:],
        lambda record: record[:1] + bytes([9]) + record[2:],
        lambda record: record[:60],
        lambda record: b"",
    ],
    ids=["later format", "format 0", "no such state", "cut off", "empty"],
)
@pytest.mark.parametrize("done", [True, False], ids=["done", "running"])
def test_c21_an_unknown_form_is_an_error_never_a_run_and_never_a_mismatch(
    store: RedisStore, before: HashStore, client: Redis, spoil: Callable[[bytes], bytes], done: bool
) -> None:
    claim = new_claim(lease=0.0)
    held = take(store, claim)
    if done:
        store.complete([Complete(claim.id, claim.nonce, held.token, b"done")])
    key = before.key(claim.id)
    spoilt = spoil(cast("bytes", client.get(key)))
    client.set(key, spoilt)
    for attempt in (again(claim), replace(again(claim), fingerprint=b"other"), claim):
        assert isinstance(store.claim([attempt])[0], Unreadable)
    if spoilt:
        assert isinstance(store.complete([Complete(claim.id, claim.nonce, held.token, b"")])[0], Unreadable)
        assert isinstance(store.renew([Renew(claim.id, claim.nonce, held.token, 1.0)])[0], Unreadable)
    with pytest.raises(Unreadable):
        store.get([claim.id])
    assert store.scan() == []
    assert list(store.reap(10).unsettled) == []
    assert client.get(key) == spoilt


def test_c21_an_engine_runs_nothing_under_an_unknown_form(store: RedisStore, client: Redis, before: HashStore) -> None:
    with Idempotency(store) as engine:
        engine.run("key", lambda: None, scope="charges")
        (record,) = store.scan()
        client.setrange(before.key(record.id), 0, b"\x02")
        with pytest.raises(Unreadable):
            engine.run("key", lambda: pytest.fail("it ran twice"), scope="charges")


def taken_before(before: HashStore, claim: Claim) -> int:
    """The token of a new operation that the release before has claimed."""
    token = before.claim(claim)
    assert isinstance(token, int), token
    return token


def read_after(before: HashStore, store: RedisStore, claim: Claim) -> Record:
    """The record of a new operation that the release before has claimed."""
    taken_before(before, claim)
    return read(store, claim.id)
