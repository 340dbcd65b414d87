"""`retryproof keys`: find, show, settle and evict, over real stores (O1)."""

import json
import os
from pathlib import Path

import httpx
import pytest

from retryproof import AsyncIdempotency, Idempotency, Policy, errors
from retryproof.core.codec import JsonCodec, StoredResponse, decode_response, decode_value, encode_response
from retryproof.core.commands import LOST, Claim, Complete, Done, Finished
from retryproof.core.keys import record_id, short_digest
from retryproof.core.record import State
from retryproof.http import by_header, single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.scope import Identify
from retryproof.stores import Store
from tests.cli.conftest import FINGERPRINT, TENANT, Run, abandon, claim, found, until_its_lease_is_over

WHY = ("--why", "the bank's ledger has it", "--by", "ada")


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def entries(audit: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in audit.read_text().splitlines()]


# List


def test_o1_list_shows_states_digests_and_no_key(run: Run, url: str, store: Store) -> None:
    done, held = claim(store, "secret-done")
    store.complete([Complete(done.id, done.nonce, held.token, b"r")])
    abandoned = abandon(store, "secret-dead")
    claim(store, "secret-live")

    listed = run("keys", "list", url, "--json")
    shown = run("keys", "list", url)

    assert listed.code == 0
    states = {record["digest"]: record["state"] for record in listed.document["records"]}
    assert states == {
        short_digest(done.id): "completed",
        short_digest(abandoned.id): "abandoned",
        short_digest(record_id(("charge",), "secret-live")): "in_progress",
    }
    assert all(digest in shown.out for digest in states)
    assert "secret" not in listed.out + shown.out


def test_o1_list_filters_by_state_and_tenant_and_says_when_there_is_more(run: Run, url: str, store: Store) -> None:
    mine = abandon(store, "a", tenant=TENANT)
    abandon(store, "b")
    claim(store, "c")

    assert len(run("keys", "list", url, "--state", "abandoned", "--json").document["records"]) == 2
    assert [it["id"] for it in run("keys", "list", url, "--tenant", "acme", "--json").document["records"]] == [
        mine.id.hex()
    ]
    assert len(run("keys", "list", url, "--tenant", TENANT.hex(), "--json").document["records"]) == 1
    limited = run("keys", "list", url, "--limit", "2", "--json").document
    assert (len(limited["records"]), limited["more"]) == (2, True)
    everything = run("keys", "list", url, "--limit", "2", "--all", "--json").document
    assert (len(everything["records"]), everything["more"]) == (3, False)


def test_list_of_nothing_says_so(run: Run, url: str) -> None:
    assert run("keys", "list", url).out == "No records.\n"


# Find and show


def test_o1_show_finds_by_digest_by_a_shorter_and_a_longer_start_and_by_key(run: Run, url: str, store: Store) -> None:
    record = abandon(store, "order-1", ("acme", "charge"))
    whole = record.id.hex()

    for target in (whole[:16], whole[:5], whole[:40], whole, whole[:16].upper()):
        assert run("keys", "show", url, target, "--json").document["id"] == whole
    by_key = run("keys", "show", url, "--scope", "acme", "--scope", "charge", "--key", "-", "--json", stdin="order-1\n")
    assert by_key.document["id"] == whole
    assert by_key.document["state"] == "abandoned"
    assert by_key.document["fingerprint"] == "custom v1"
    assert "order-1" not in by_key.out


def test_o1_a_digest_that_several_records_share_is_refused(run: Run, url: str, store: Store) -> None:
    for last in (b"\x01", b"\x02"):
        claim(store, id=b"\xab\xcd" + bytes(29) + last)

    ambiguous = run("keys", "show", url, "abcd")

    assert ambiguous.code == 1
    assert "several digests" in ambiguous.err
    assert run("keys", "show", url, "abcd" + "00" * 29 + "02").code == 0


def test_what_is_neither_a_digest_nor_a_store_is_named(run: Run) -> None:
    ran = run("keys", "show", "keys.db")
    assert ran.code == 2
    assert "'keys.db' is neither a digest" in ran.err
    assert "sqlite:///keys.db" in ran.err


@pytest.mark.parametrize("target", ["abc", "xyz1", "ab" * 33])
def test_what_is_no_digest_is_wrong_usage(run: Run, url: str, target: str) -> None:
    assert run("keys", "show", url, target).code == 2


def test_a_record_that_is_not_there_is_exit_code_1_and_says_what_to_look_at(run: Run, url: str) -> None:
    missing = run("keys", "show", url, "--scope", "charge", "--key", "k")

    assert missing.code == 1
    assert "scope is different" in missing.err


def test_o1_show_names_checkpoints_and_decodes_results_on_demand(run: Run, url: str, store: Store) -> None:
    with Idempotency(store) as engine:
        engine.run("value", lambda: {"amount": 5}, scope="charge")
    done, held = claim(store, "response")
    response = StoredResponse(201, ((b"content-type", b"text/plain"),), b"made")
    store.complete([Complete(done.id, done.nonce, held.token, encode_response(response))])

    value = run("keys", "show", url, "--scope", "charge", "--key", "value", "--json")
    assert "result" not in value.document
    value = run("keys", "show", url, "--scope", "charge", "--key", "value", "--result", "--json")
    assert value.document["result"] == {"kind": "value", "value": {"amount": 5}}
    shown = run("keys", "show", url, "--scope", "charge", "--key", "response", "--result", "--json")
    assert shown.document["result"] == {
        "kind": "response",
        "status": 201,
        "headers": [["content-type", "text/plain"]],
        "omitted": False,
        "body": "made",
    }


def test_c11_a_pepper_is_taken_from_the_environment(
    run: Run, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Idempotency(store, pepper=b"salt") as engine:
        engine.run("k", lambda: 1, scope="charge")

    assert run("keys", "show", url, "--scope", "charge", "--key", "k").code == 1
    monkeypatch.setenv("RETRYPROOF_PEPPER", "salt")
    assert run("keys", "show", url, "--scope", "charge", "--key", "k").code == 0


@pytest.mark.parametrize(
    ("identify", "options", "extra"),
    [
        (single_tenant, ("--single-tenant",), {}),
        (by_header("x-api-key"), ("--caller", "cred-1"), {}),
        (lambda scope: "user-7", ("--caller", "user-7"), {}),
        (lambda scope: None, ("--anonymous",), {}),
        (single_tenant, ("--single-tenant", "--app", "shop"), {"name": "shop"}),
        (single_tenant, ("--single-tenant", "--endpoint", "charge"), {"endpoint": "charge"}),
    ],
)
async def test_o1_a_requests_key_is_found_as_the_http_layer_keeps_it(
    run: Run, tmp_path: Path, identify: Identify, options: tuple[str, ...], extra: dict[str, str]
) -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})  # type: ignore[operator]  # ASGI
        await send({"type": "http.response.body", "body": b"made"})  # type: ignore[operator]  # ASGI

    url = f"sqlite:///{tmp_path}/http.db"
    key = "4cf3b0f6-37a5-4c3e-9b8e-6f4f8e2f7c11"
    layer = IdempotencyMiddleware(app, store=url, scope=identify, **extra)  # type: ignore[arg-type]  # options by name
    async with httpx.AsyncClient(transport=httpx.ASGITransport(layer), base_url="http://test") as client:
        await client.post("/a%20b?x=1", headers={"idempotency-key": key, "x-api-key": "cred-1"})
    await layer.aclose()

    where = () if "--endpoint" in options else ("--http", "POST /a%20b")
    shown = run("keys", "show", url, *where, *options, "--key", key, "--result", "--json")

    assert shown.document["result"]["status"] == 201
    assert shown.document["result"]["body"] == "made"


# Settle


@pytest.mark.parametrize(
    ("how", "state", "result"),
    [
        (("--as", "done"), State.TOMBSTONE, None),
        (("--value", '{"paid": true}'), State.COMPLETED, {"paid": True}),
        (("--value", "null"), State.COMPLETED, None),
    ],
)
def test_o1_settles_a_dead_operation_as_done(
    run: Run, url: str, store: Store, audit: Path, how: tuple[str, ...], state: State, result: object
) -> None:
    record = abandon(store)

    ran = run("keys", "settle", url, short_digest(record.id), *how, *WHY, "--audit-file", str(audit), "--json")

    assert ran.code == 0
    settled = found(store, record.id)
    assert settled.state is state
    if state is State.COMPLETED:
        assert settled.result is not None
        assert decode_value(JsonCodec(), settled.result) == result


def test_o1_a_settled_function_gives_its_callers_the_operators_value(
    run: Run, url: str, store: Store, audit: Path
) -> None:
    def die() -> int:
        raise errors.OutcomeUnknown("the bank did not answer")

    with Idempotency(store, policy=Policy(lease=0.02)) as engine:
        with pytest.raises(errors.OutcomeUnknown):
            engine.run("k", die, scope="charge")
        until_its_lease_is_over(store, engine.id_of("charge", "k"))
        named = ("--scope", "charge", "--key", "k")
        assert run("keys", "settle", url, *named, "--value", "42", *WHY, "--audit-file", str(audit)).code == 0
        outcome = engine.run("k", lambda: 0, scope="charge")

    assert (outcome.value, outcome.replayed) == (42, True)


def test_o1_settles_as_never_happened_and_a_retry_runs(run: Run, url: str, store: Store, audit: Path) -> None:
    record = abandon(store)

    ran = run("keys", "settle", url, record.id.hex(), "--as", "never-happened", *WHY, "--audit-file", str(audit))

    assert ran.code == 0
    assert found(store, record.id).state is State.RELEASED
    shown = run("keys", "show", url, record.id.hex(), "--json").document
    assert shown["checkpoints"] == ["retryproof.settled"]
    assert json.loads(shown["settled"])["by"] == "ada"
    _, retried = claim(store)
    assert retried.birth == record.birth


def test_o1_settles_with_a_response(run: Run, url: str, store: Store, audit: Path) -> None:
    record = abandon(store)
    response = {"status": 201, "headers": [["Location", "/charges/1"], ["Content-Length", "9"]], "json": {"id": 1}}
    how = ("--response", "-")

    ran = run(
        "keys", "settle", url, record.id.hex(), *how, *WHY, "--audit-file", str(audit), stdin=json.dumps(response)
    )

    assert ran.code == 0, ran.err
    stored = decode_response(found(store, record.id).result or b"")
    assert stored.status == 201
    assert stored.body == b'{"id":1}'
    assert stored.headers == ((b"location", b"/charges/1"), (b"content-type", b"application/json"))


@pytest.mark.parametrize(
    "response",
    [
        "not json",
        "[]",
        "{}",
        '{"status": 99}',
        '{"status": true}',
        '{"status": 200, "body": "a", "json": 1}',
        '{"status": 200, "body": 1}',
        '{"status": 200, "body_base64": "?"}',
        '{"status": 200, "headers": [["a b", "c"]]}',
        '{"status": 200, "headers": [["a", "b\\r\\nc: d"]]}',
        '{"status": 200, "headers": "a"}',
        '{"status": 200, "colour": "red"}',
    ],
)
def test_a_response_that_makes_no_sense_changes_nothing(
    run: Run, store: Store, url: str, audit: Path, response: str
) -> None:
    record = abandon(store)
    how = ("--response", "-")

    ran = run("keys", "settle", url, record.id.hex(), *how, *WHY, "--audit-file", str(audit), stdin=response)

    assert ran.code == 2
    assert found(store, record.id).token == record.token
    assert not audit.exists()


def test_o1_a_live_lease_is_never_settled_or_evicted(run: Run, url: str, store: Store, audit: Path) -> None:
    claimed, held = claim(store)
    what = (url, claimed.id.hex(), *WHY, "--audit-file", str(audit))

    settled = run("keys", "settle", *what, "--as", "done")
    evicted = run("keys", "evict", *what, "--json")

    assert settled.code == 1
    assert "lease is live" in settled.err
    assert evicted.code == 1
    assert evicted.document["error"]["kind"] == "refused"
    assert not audit.exists()
    assert store.complete([Complete(claimed.id, claimed.nonce, held.token, b"r")]) == [Done()]


def test_o1_what_is_settled_is_not_settled_again(run: Run, url: str, store: Store, audit: Path) -> None:
    claimed, held = claim(store)
    store.complete([Complete(claimed.id, claimed.nonce, held.token, b"r")])

    ran = run("keys", "settle", url, claimed.id.hex(), "--as", "never-happened", *WHY, "--audit-file", str(audit))

    assert ran.code == 1
    assert found(store, claimed.id).result == b"r"


def test_c2_the_attempt_that_was_thought_dead_is_fenced_off(run: Run, url: str, store: Store, audit: Path) -> None:
    claimed, held = claim(store, lease=0.001)
    until_its_lease_is_over(store, claimed.id)

    assert run("keys", "settle", url, claimed.id.hex(), "--as", "done", *WHY, "--audit-file", str(audit)).code == 0

    assert store.complete([Complete(claimed.id, claimed.nonce, held.token, b"late")]) == [LOST]
    assert found(store, claimed.id).state is State.TOMBSTONE


def test_c15_a_poisoned_operation_can_be_settled(run: Run, url: str, store: Store, audit: Path) -> None:
    record = abandon(store)
    for _ in range(3):
        record = abandon(store)
    assert record.deaths == 3

    assert run("keys", "settle", url, record.id.hex(), "--as", "done", *WHY, "--audit-file", str(audit)).code == 0
    (reply,) = store.claim(
        [
            Claim(
                id=record.id,
                fingerprint=FINGERPRINT,
                nonce=os.urandom(16),
                lease=1.0,
                retention=1.0,
                unsettled_retention=1.0,
                max_attempts=1,
            )
        ]
    )
    assert isinstance(reply, Finished)


def test_o1_the_audit_says_who_why_and_what_before_anything_changes(
    run: Run, url: str, store: Store, audit: Path
) -> None:
    record = abandon(store, "secret")

    run("keys", "settle", url, record.id.hex(), "--as", "done", *WHY, "--audit-file", str(audit))

    settling, settled = entries(audit)
    assert (settling["what"], settled["what"]) == ("settling", "settled")
    assert (settling["by"], settling["why"]) == ("ada", "the bank's ledger has it")
    assert settling["digest"] == short_digest(record.id)
    assert settling["how"] == "done, result omitted"
    assert "secret" not in audit.read_text()
    assert audit.stat().st_mode & 0o077 == 0


def test_o1_without_an_audit_nothing_is_changed(run: Run, url: str, store: Store, tmp_path: Path) -> None:
    record = abandon(store)
    what = ("keys", "settle", url, record.id.hex(), "--as", "done", *WHY)

    assert run(*what).code == 2
    assert run(*what, "--audit-file", str(tmp_path / "nowhere" / "audit")).code == 1
    assert run("keys", "settle", url, record.id.hex(), "--as", "done", "--audit-file", "-").code == 2
    assert found(store, record.id).token == record.token


def test_the_audit_can_go_to_standard_error(run: Run, url: str, store: Store) -> None:
    record = abandon(store)

    ran = run("keys", "settle", url, record.id.hex(), "--as", "done", *WHY, "--audit-file", "-")

    assert ran.code == 0
    assert '"what": "settling"' in ran.err


def test_settling_takes_exactly_one_outcome(run: Run, url: str, store: Store, audit: Path) -> None:
    record = abandon(store)
    what = ("keys", "settle", url, record.id.hex(), *WHY, "--audit-file", str(audit))

    assert run(*what).code == 2
    assert run(*what, "--as", "done", "--value", "1").code == 2


# Evict


def test_o1_evicts_and_the_key_starts_anew(
    run: Run, url: str, store: Store, audit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = abandon(store)

    with caplog.at_level("INFO", "retryproof"):
        ran = run("keys", "evict", url, record.id.hex(), *WHY, "--audit-file", str(audit))

    assert ran.code == 0
    assert store.get([record.id]) == [None]
    assert [entry["what"] for entry in entries(audit)] == ["evicting"]
    assert any(message.startswith("evicted") for message in caplog.messages)
    _, again = claim(store)
    assert (again.attempt, again.birth == record.birth) == (1, False)


# Usage


def test_a_record_is_named_by_digest_or_by_key_and_not_by_both(run: Run, url: str) -> None:
    assert run("keys", "show", url).code == 2
    assert run("keys", "show", url, "abcd", "--scope", "s", "--key", "k").code == 2
    assert run("keys", "show", url, "--key", "k").code == 2
    assert run("keys", "show", url, "--key", "k", "--http", "POST /x").code == 2
    assert run("keys", "show", url, "--key", "k", "--http", "nonsense", "--anonymous").code == 2
    assert run("keys", "show", url, "--key", "", "--scope", "s").code != 0


def test_the_store_comes_from_the_environment(
    run: Run, url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = abandon(store)
    assert run("keys", "list").code == 2

    monkeypatch.setenv("RETRYPROOF_STORE", url)

    assert len(run("keys", "list", "--json").document["records"]) == 1
    assert run("keys", "show", record.id.hex()).code == 0


async def test_an_async_engine_and_the_command_line_mean_the_same_record(run: Run, url: str) -> None:
    async with AsyncIdempotency(url) as engine:
        await engine.run("k", lambda: 1, scope=("acme", "charge"))

    shown = run("keys", "show", url, "--scope", "acme", "--scope", "charge", "--key", "k", "--json").document

    assert shown["state"] == "completed"
    assert shown["tenant"] == TENANT.hex()
