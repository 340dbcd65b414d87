"""What is particular to Redis and Valkey; what every store does is in the conformance suite."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import Any, cast

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from retryproof.core.batch import ItemError
from retryproof.core.commands import (
    DONE,
    LOST,
    Acquired,
    Checkpoint,
    Claim,
    ClaimReply,
    Complete,
    Finished,
    Release,
    Renew,
    Running,
)
from retryproof.core.errors import ConfigurationError, StoreUnavailable, Unreadable
from retryproof.core.record import State
from retryproof.stores.base import AsyncStore, Store
from retryproof.stores.redis import AsyncRedisStore, RedisStore
from retryproof.stores.redis.protocol import Protocol, RedisRequest
from servers import Instance
from servers.instance import free_port

PrivateServer = Callable[..., Instance]
OpenStore = Callable[..., Store]


class Awaited:
    """An AsyncRedisStore as a blocking one, on a loop of its own, so that a test serves both colours."""

    def __init__(self, source: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._store = AsyncRedisStore(source, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, "aclose" if name == "close" else name)
        if not inspect.iscoroutinefunction(method):
            return method
        return lambda *args, **kwargs: self._runner.run(method(*args, **kwargs))

    def end(self) -> None:
        self._runner.run(self._store.aclose())
        self._runner.close()


@pytest.fixture(params=["blocking", "async"])
def open_store(request: pytest.FixtureRequest, unique: str) -> Iterator[OpenStore]:
    """Makes stores of one colour under a prefix of the test's own: `open_store(url, **options)`."""
    ends: list[Callable[[], None]] = []

    def make(source: str, **options: Any) -> Store:
        options = {"prefix": unique, **options}
        if request.param == "async":
            awaited = Awaited(source, **options)
            ends.append(awaited.end)
            return cast("Store", awaited)
        store = RedisStore(source, **options)
        ends.append(store.close)
        return store

    yield make
    for end in ends:
        end()


@pytest.fixture(params=["redis", "valkey"])
def url(request: pytest.FixtureRequest) -> str:
    return cast("str", request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["redis", "valkey"])
def private(request: pytest.FixtureRequest) -> PrivateServer:
    """Starts servers of this test's own: `private(*options)`."""
    return cast("PrivateServer", request.getfixturevalue(f"private_{request.param}"))


@pytest.fixture
def control(url: str) -> Iterator[Redis]:
    """A client of the test's own."""
    with Redis.from_url(url) as client:
        yield client


def a_claim(id: bytes | None = None, **changes: Any) -> Claim:
    terms = {"fingerprint": bytes(32), "lease": 60.0, "retention": 600.0, "unsettled_retention": 6000.0}
    return Claim(id=id or secrets.token_bytes(32), nonce=secrets.token_bytes(16), **{**terms, **changes})


def taken(reply: ClaimReply | ItemError) -> Acquired:
    assert isinstance(reply, Acquired), reply
    return reply


def take(store: Store, claim: Claim) -> Acquired:
    return taken(store.claim([claim])[0])


def completion(claim: Claim, held: Acquired, result: bytes | None = b"done") -> Complete:
    return Complete(claim.id, claim.nonce, held.token, result)


def finish(store: Store, claim: Claim, result: bytes | None = b"done") -> None:
    assert store.complete([completion(claim, take(store, claim), result)]) == [DONE]


def assert_unreadable(reply: object, id: bytes) -> None:
    assert isinstance(reply, Unreadable), reply
    assert reply.digest == id.hex()[:16]


# The scripts' cache, restarts, and servers that are away


def test_a_flushed_script_cache_goes_unnoticed(open_store: OpenStore, private: PrivateServer) -> None:
    server = private()
    store = open_store(server.url)
    claim = a_claim()
    held = take(store, claim)
    with Redis.from_url(server.url) as client:
        client.script_flush()
    assert store.complete([completion(claim, held)]) == [DONE]
    assert isinstance(store.claim([a_claim(claim.id)])[0], Finished)


def test_a_restart_that_empties_the_script_cache_goes_unnoticed(open_store: OpenStore, private: PrivateServer) -> None:
    server = private("--appendonly", "yes", "--appendfsync", "always")
    store = open_store(server.url)
    claim = a_claim()
    held = take(store, claim)
    server.restart()
    assert take(store, claim) == held
    assert store.complete([completion(claim, held)]) == [DONE]


def test_c1_an_acknowledged_claim_outlives_kill_minus_9_with_appendfsync_always(
    open_store: OpenStore, private: PrivateServer
) -> None:
    server = private("--appendonly", "yes", "--appendfsync", "always")
    store = open_store(server.url)
    claims = [a_claim() for _ in range(50)]
    held = [taken(reply) for reply in store.claim(claims)]
    server.kill()
    with pytest.raises(StoreUnavailable) as caught:
        store.claim([a_claim()])
    assert caught.value.__cause__ is not None
    server.restart()
    assert store.complete([completion(*pair) for pair in zip(claims, held, strict=True)]) == [DONE] * 50


def test_c10_a_hung_server_is_unavailable_after_the_timeout_and_usable_when_it_goes_on(
    open_store: OpenStore, private: PrivateServer
) -> None:
    server = private()
    store = open_store(server.url, timeout=0.3)
    claim = a_claim()
    take(store, a_claim())
    server.pause()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.claim([claim])
    waited = time.monotonic() - began
    server.resume()
    assert 0.25 < waited < 2.0
    take(store, claim)


def test_c10_a_server_that_hangs_at_connecting_is_unavailable_after_the_timeout(
    open_store: OpenStore, private: PrivateServer
) -> None:
    server = private()
    server.pause()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        open_store(f"{server.url}?timeout=0.3").claim([a_claim()])
    waited = time.monotonic() - began
    server.resume()
    assert 0.25 < waited < 2.0


def test_callers_of_a_server_that_dies_under_load_are_told(private: PrivateServer, unique: str) -> None:
    server = private("--appendonly", "yes")
    store = RedisStore(server.url, prefix=unique, timeout=1.0)
    started = threading.Barrier(9)

    def claim_until_it_dies() -> StoreUnavailable:
        take(store, a_claim())
        started.wait()
        while True:
            try:
                store.claim([a_claim() for _ in range(16)])
            except StoreUnavailable as error:
                return error

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(claim_until_it_dies) for _ in range(8)]
        started.wait()
        server.kill()
        assert all(caller.result(timeout=20).__cause__ for caller in callers)
    server.restart()
    take(store, a_claim())
    store.close()


def test_c3_a_cancelled_call_leaves_no_answer_behind_for_the_next(private: PrivateServer, unique: str) -> None:
    server = private()

    async def scenario() -> None:
        store = AsyncRedisStore(server.url, prefix=unique, timeout=10)
        first, second = a_claim(), a_claim()
        await store.claim([a_claim()])
        server.pause()
        lost = asyncio.ensure_future(store.claim([first]))
        await asyncio.wait([lost], timeout=0.1)
        lost.cancel()
        await asyncio.wait([lost])
        server.resume()
        assert lost.cancelled()
        assert taken((await store.claim([second]))[0]).birth == second.nonce
        assert taken((await store.claim([first]))[0]).birth == first.nonce
        await store.aclose()

    asyncio.run(scenario())


def test_a_replica_answers_nothing(open_store: OpenStore, private: PrivateServer) -> None:
    master = private("--repl-diskless-sync-delay", "0", "--shutdown-timeout", "0")
    claim = a_claim()
    finish(open_store(master.url), claim)
    replica = private("--replicaof", "127.0.0.1", str(master.port))
    with Redis.from_url(replica.url) as client:
        wait_until(lambda: cast("dict[str, str]", client.info("replication"))["master_link_status"] == "up")
    store = open_store(replica.url)
    for call in (
        lambda: store.claim([a_claim(claim.id)]),
        lambda: store.complete([Complete(claim.id, claim.nonce, 1, b"")]),
        lambda: store.get([claim.id]),
        lambda: store.evict([claim.id]),
    ):
        with pytest.raises(StoreUnavailable, match=r"refused.*read only replica"):
            call()


def test_a_full_server_refuses_new_operations_and_goes_on_replaying(
    open_store: OpenStore, private: PrivateServer
) -> None:
    server = private("--maxmemory-policy", "noeviction")
    store = open_store(server.url)
    done, running = a_claim(), a_claim()
    finish(store, done)
    held = take(store, running)
    with Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable, match=r"refused.*maxmemory"):
            store.claim([a_claim(done.id), a_claim()])
        with pytest.raises(StoreUnavailable, match=r"refused.*maxmemory"):
            store.complete([completion(running, held)])
        assert isinstance(store.claim([a_claim(done.id)])[0], Finished)
        client.config_set("maxmemory", 0)
    assert store.complete([completion(running, held)]) == [DONE]


# One bad item


@pytest.mark.parametrize("spoil", ["another type", "another version"])
def test_a_key_that_cannot_be_read_fails_alone(
    open_store: OpenStore, url: str, control: Redis, unique: str, spoil: str
) -> None:
    store = open_store(url)
    claims = [a_claim() for _ in range(3)]
    bad = claims[1].id
    key = f"{unique}:{bad.hex()}"
    if spoil == "another type":
        control.rpush(key, "a list")
    else:
        control.hset(key, mapping={"head": "9 of a later version", "fingerprint": bytes(32), "nonce": claims[1].nonce})
    replies = store.claim(claims)
    held = taken(replies[0])
    taken(replies[2])
    assert_unreadable(replies[1], bad)
    assert store.renew([Renew(claims[0].id, claims[0].nonce, held.token, 1.0)]) == [DONE]
    fenced = store.complete([completion(claims[0], held), Complete(bad, claims[1].nonce, 1, b"")])
    assert fenced[0] == DONE
    assert_unreadable(fenced[1], bad)
    assert store.evict([bad, claims[0].id]) == [False, True]
    with pytest.raises(Unreadable):
        store.get([claims[2].id, bad])
    assert [record.id for record in store.scan()] == [claims[2].id]
    assert control.exists(key)


# What is stored


@pytest.mark.parametrize("result", [b"", b"0", b"null", b"\x00\xff\r\n", b"x" * 2**20, None])
def test_c12_a_result_comes_back_as_it_was_and_none_is_a_tombstone(
    open_store: OpenStore, url: str, result: bytes | None
) -> None:
    store = open_store(url)
    claim = a_claim(trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    finish(store, claim, result)
    (reply,) = store.claim([a_claim(claim.id)])
    assert isinstance(reply, Finished)
    assert (reply.result, reply.trace) == (result, claim.trace)
    (record,) = store.get([claim.id])
    assert record is not None
    assert record.state is (State.TOMBSTONE if result is None else State.COMPLETED)


def test_i7_a_record_has_no_ttl_while_in_progress_and_one_when_settled(
    open_store: OpenStore, url: str, control: Redis, unique: str
) -> None:
    store = open_store(url)
    claim, again = a_claim(retention=600.0), None
    key = f"{unique}:{claim.id.hex()}"
    held = take(store, claim)
    assert control.ttl(key) == -1
    assert store.release([Release(claim.id, claim.nonce, held.token)]) == [DONE]
    assert 590 < control.ttl(key) <= 600
    again = a_claim(claim.id, retention=60.0)
    held = take(store, again)
    assert control.ttl(key) == -1
    assert store.complete([completion(again, held)]) == [DONE]
    assert 50 < control.ttl(key) <= 60


def test_a_settled_record_is_gone_by_itself_at_the_end_of_its_retention(
    open_store: OpenStore, url: str, control: Redis, unique: str
) -> None:
    store = open_store(url)
    claim = a_claim(retention=0.002)
    first = take(store, claim)
    assert store.complete([completion(claim, first)]) == [DONE]
    wait_until(lambda: not control.exists(f"{unique}:{claim.id.hex()}"))
    assert store.get([claim.id]) == [None]
    assert take(store, a_claim(claim.id)).token > first.token


def test_c2_tokens_rise_over_release_take_over_and_a_clock_that_fell_back(
    open_store: OpenStore, url: str, control: Redis, unique: str
) -> None:
    store = open_store(url)
    id = secrets.token_bytes(32)
    tokens = []
    for _ in range(20):
        claim = a_claim(id)
        tokens.append(take(store, claim).token)
        store.release([Release(id, claim.nonce, tokens[-1])])
    claim = a_claim(id, lease=0.0)
    tokens.append(take(store, claim).token)
    key, future = f"{unique}:{id.hex()}", 2_900_000_000_000_000  # the year 2061
    control.setrange(key, 43, cast("str", pack("<d", future)))
    tokens.append(take(store, a_claim(id)).token)
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == future + 1
    assert store.renew([Renew(id, claim.nonce, tokens[-2], 1.0)]) == [LOST]


@pytest.mark.parametrize("other", [b"", b"n" * 15, b"n" * 17], ids=["none", "shorter", "longer"])
def test_c2_a_nonce_of_another_length_holds_nothing_and_fails_alone(
    open_store: OpenStore, url: str, other: bytes
) -> None:
    store = open_store(url)
    claim, neighbour = replace(a_claim(), nonce=b"n" * 16), a_claim()
    id, token = claim.id, take(store, claim).token
    done = completion(neighbour, take(store, neighbour))
    assert store.renew([Renew(id, other, token, lease=9.0, alone=True)]) == [LOST]
    assert store.checkpoint([Checkpoint(id, other, token, name="a", value=b"")]) == [LOST]
    assert store.complete([Complete(id, other, token, b"x"), done]) == [LOST, DONE]
    assert store.release([Release(id, other, token)]) == [LOST]


def test_stores_with_other_prefixes_share_nothing(open_store: OpenStore, url: str, unique: str) -> None:
    claim = a_claim()
    first, second = open_store(url), open_store(f"{url}?prefix={unique}[*?]\\")
    take(first, claim)
    take(second, claim)
    assert first.scan() != second.scan()
    assert [record.id for record in second.scan()] == [claim.id]


def test_scan_pages_in_the_order_of_ids(open_store: OpenStore, url: str) -> None:
    store = open_store(url)
    claims = [a_claim(secrets.token_bytes(32), tenant=bytes([n % 2]) * 16) for n in range(600)]
    for start in range(0, 600, 200):
        store.claim(claims[start : start + 200])
    pages: list[bytes] = []
    while page := store.scan(after=pages[-1] if pages else b"", limit=250):
        pages += (record.id for record in page)
    assert pages == sorted(claim.id for claim in claims)
    assert len(store.scan(tenant=bytes([1]) * 16, limit=1_000)) == 300


# Round trips


def test_a_full_batch_of_each_kind_is_one_command(open_store: OpenStore, private: PrivateServer) -> None:
    server = private()
    store = open_store(server.url)
    claims = [a_claim() for _ in range(256)]
    finish(store, a_claim())  # connects, and loads two scripts
    with Redis.from_url(server.url) as client:
        held = counted(client, lambda: [taken(reply) for reply in store.claim(claims)], {"evalsha": 1})
        pairs = list(zip(claims, held, strict=True))
        counted(client, lambda: store.complete([completion(*pair) for pair in pairs]), {"evalsha": 1})
        counted(client, lambda: store.claim([a_claim(claim.id) for claim in claims]), {"evalsha": 1})
        rest = [Renew(claim.id, claim.nonce, reply.token, 1.0) for claim, reply in pairs]
        counted(client, lambda: store.renew(rest), {"evalsha": 1, "eval": 1})
        counted(client, lambda: store.renew(rest), {"evalsha": 1})


def test_large_results_travel_in_portions(open_store: OpenStore, private: PrivateServer) -> None:
    server = private()
    store = open_store(server.url)
    claims = [a_claim() for _ in range(20)]
    finish(store, a_claim())
    held = [taken(reply) for reply in store.claim(claims)]
    results = [bytes([n]) * 2**20 for n in range(20)]
    commands = [completion(*item) for item in zip(claims, held, results, strict=True)]
    commands.append(completion(a_claim(), held[0]))
    with Redis.from_url(server.url) as client:
        assert counted(client, lambda: store.complete(commands), {"evalsha": 3}) == [*[DONE] * 20, LOST]
    replies = store.claim([a_claim(claim.id) for claim in claims])
    assert [cast("Finished", reply).result for reply in replies] == results


def counted(client: Redis, act: Callable[[], Any], expected: dict[str, int]) -> Any:
    """Does it; the commands that arrived meanwhile, other than this client's own and those of scripts, are expected."""
    client.config_resetstat()
    answer = act()
    stats = cast("dict[str, dict[str, int]]", client.info("commandstats"))
    arrived = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    inside = {"time", "get", "getrange", "set", "setnx", "psetex", "setrange", "config|resetstat", "info"}
    assert {name: calls for name, calls in arrived.items() if name not in inside} == expected
    return answer


def test_an_empty_batch_asks_nothing(open_store: OpenStore) -> None:
    store = open_store("redis://127.0.0.1:1")
    assert (store.claim([]), store.complete([]), store.renew([]), store.get([]), store.evict([])) == ([],) * 5


# Connections


@pytest.mark.parametrize("decode", [False, True])
def test_a_callers_client_gives_its_address_and_is_left_alone(url: str, unique: str, decode: bool) -> None:
    with Redis.from_url(url, decode_responses=decode) as client:
        client.ping()
        store = RedisStore(client, prefix=unique)
        finish(store, a_claim(), b"\xff")
        store.close()
        assert client.connection_pool.connection_kwargs.get("decode_responses", False) is decode
        assert client.ping()


async def test_an_async_client_gives_its_address_and_is_left_alone(url: str, unique: str) -> None:
    client = AsyncRedis.from_url(url, decode_responses=True)
    store = AsyncRedisStore(client, prefix=unique)
    claim = a_claim()
    held = taken((await store.claim([claim]))[0])
    keeper = store.keeper()
    assert await asyncio.to_thread(keeper.renew, [Renew(claim.id, claim.nonce, held.token, 90.0)]) == [DONE]
    keeper.close()
    await store.aclose()
    assert await client.ping()
    await client.aclose()


@pytest.mark.quiet
def test_no_retries_of_the_drivers_are_made(unique: str) -> None:
    client = Redis(host="127.0.0.1", port=1)  # redis-py 8 retries this ten times, for seconds
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        RedisStore(client, prefix=unique).claim([a_claim()])
    assert time.monotonic() - began < 1.0


PERMISSIONS = "+@string +@hash +@scripting +del +time +scan +select"  # as docs/howto/redis.md has them


def test_login_database_and_socket_are_taken_from_the_url(
    open_store: OpenStore, private: PrivateServer, tmp_path: Path, unique: str
) -> None:
    socket = tmp_path / "redis.sock"
    server = private("--unixsocket", str(socket), "--unixsocketperm", "777")
    with Redis.from_url(server.url) as client:
        permissions = PERMISSIONS.split()
        client.acl_setuser("app", enabled=True, passwords=["+p@ss"], commands=permissions, keys=[f"{unique}:*"])
    claim, done = a_claim(), a_claim()
    store = open_store(f"redis://app:p%40ss@127.0.0.1:{server.port}/3")
    take(store, claim)
    finish(store, done)
    assert store.evict([record.id for record in store.scan(state=State.COMPLETED)]) == [True]
    assert isinstance(open_store(f"unix://{socket}?db=3").claim([a_claim(claim.id)])[0], Running)
    take(open_store(f"unix://{socket}"), claim)
    with pytest.raises(StoreUnavailable):
        open_store(f"redis://app:wrong@127.0.0.1:{server.port}/3").claim([claim])


def test_tls(open_store: OpenStore, private_redis: PrivateServer, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        ["openssl", *request.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    key.chmod(0o644)
    server = private_redis()
    with Redis.from_url(server.url) as client:
        client.config_set("tls-cert-file", str(certificate))
        client.config_set("tls-key-file", str(key))
        client.config_set("tls-ca-cert-file", str(certificate))
        client.config_set("tls-auth-clients", "no")
        port = free_port()
        client.config_set("tls-port", port)
    take(open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"), a_claim())
    with pytest.raises(StoreUnavailable, match="certificate"):
        open_store(f"rediss://127.0.0.1:{port}").claim([a_claim()])


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1", "schemes"),
        ("redis://127.0.0.1?no_such_option=1", "no_such_option"),
        ("redis://127.0.0.1?timeout=soon", "seconds"),
        ("redis://127.0.0.1?timeout=0", "more than 0"),
        ("redis://127.0.0.1?prefix=", "must not be empty"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_at_once(open_store: OpenStore, url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        open_store(url)


@pytest.mark.parametrize(
    "client",
    [AsyncRedis(), RedisCluster.__new__(RedisCluster), object()],
    ids=["async", "cluster", "anything"],
)
def test_a_client_of_another_kind_is_refused(client: Any) -> None:
    with pytest.raises(ConfigurationError, match="Redis client is needed"):
        RedisStore(client)


@pytest.mark.parametrize(
    ("client", "complaint"),
    [
        (Redis(redis_connect_func=lambda: None), "redis_connect_func"),
        (cast("Any", Sentinel)([("127.0.0.1", 1)]).slave_for("replicas"), "one master"),
    ],
)
def test_a_client_that_cannot_be_taken_over_is_refused(client: Redis, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        RedisStore(client)


def test_a_blocking_client_is_refused_by_the_async_store() -> None:
    with pytest.raises(ConfigurationError, match=r"redis\.asyncio\.Redis client is needed"):
        AsyncRedisStore(cast("Any", Redis()))


def test_the_stores_keep_the_protocols(url: str) -> None:
    blocking: Store = RedisStore(url)
    awaited: AsyncStore = AsyncRedisStore(url)
    assert isinstance(blocking, Store)
    assert isinstance(awaited, AsyncStore)


def test_many_threads_share_a_store(url: str, unique: str) -> None:
    store = RedisStore(url, prefix=unique)
    claims = [a_claim() for _ in range(32)]

    def finish_all(claims: Sequence[Claim]) -> None:
        for claim in claims:
            finish(store, claim, claim.id)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(finish_all, [[a_claim() for _ in range(20)] for _ in claims]))
    assert len(store.scan(state=State.COMPLETED, limit=10_000)) == 640
    store.close()


# Reaping


def test_c19_reaping_ends_what_was_never_settled_and_tells(open_store: OpenStore, url: str) -> None:
    store = open_store(url)
    claims = [a_claim(lease=0.0, unsettled_retention=0.0, tenant=b"t" * 16) for _ in range(5)]
    live = a_claim(unsettled_retention=0.0)
    store.claim([*claims, live])
    told: list[bytes] = []
    more = True
    while more:
        reaped = store.reap(2)
        assert len(reaped.unsettled) <= 2
        told += store.reap(0, reaped.unsettled).ended
        more = reaped.more
    assert sorted(told) == sorted(claim.id for claim in claims)
    assert [record.id for record in store.scan()] == [live.id]


def test_i7_a_pass_removes_nothing_that_nobody_has_been_told_of() -> None:
    id = bytes(32)
    plan = Protocol("p").reap(10)
    assert next(plan).arguments[0] == "SCAN"
    read = plan.send([b"0", [b"p:" + id.hex().encode()]])
    assert read.arguments[-1] == "over"
    record = pack("<BBddBIIddd16sBBBI", 1, State.IN_PROGRESS, 7, 6, 1, 1, 0, 6e8, 5, 5, bytes(16), 32, 0, 0, 0) + bytes(
        32
    )
    with pytest.raises(StopIteration) as end:
        plan.send([b"100", record])
    found = end.value.value.unsettled
    assert [record.id for record in found] == [id]
    remove = next(Protocol("p").reap(0, found))
    fence = pack("<d", 5) + bytes(16)
    assert remove == RedisRequest([1, b"p:" + id.hex().encode(), "over", fence], remove.script, repeatable=False)


def wait_until(true: Callable[[], object]) -> None:
    """Asks the server until it is so: its clock is the one that counts."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline


def test_one_damaged_record_or_odd_name_does_not_fail_its_neighbours(redis_url: str, unique: str) -> None:
    store = RedisStore(redis_url, prefix=unique)
    claims = [a_claim() for _ in range(3)]
    acquired = store.claim(claims)
    steps = [
        Checkpoint(claim.id, claim.nonce, reply.token, name, b"1")
        for claim, reply, name in zip(claims, acquired, ["one", "\ud800", "two"], strict=True)
        if isinstance(reply, Acquired)
    ]
    assert store.checkpoint(steps) == [DONE] * 3
    with Redis.from_url(redis_url) as client:
        client.append(f"{unique}:{claims[1].id.hex()}", b"\xff\xff\xff\xff\xff")
    replies = store.claim(claims)
    assert [type(reply) for reply in replies] == [Acquired, Unreadable, Acquired]
    store.close()
