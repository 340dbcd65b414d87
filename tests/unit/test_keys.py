"""Keys: H2, H3, H5 (strength) and C11 (record ids)."""

import base64
import hashlib
import secrets
import string
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core.errors import InvalidKey
from retryproof.core.keys import check_key, parse_key, record_id, short_digest, tenant_digest

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
BARE = "".join(set(PRINTABLE) - set(' ",;\\'))

printable_keys = st.text(PRINTABLE, min_size=1, max_size=255)
bare_keys = st.text(BARE, min_size=1, max_size=255)


def quoted(key: str) -> bytes:
    return b'"' + key.replace("\\", "\\\\").replace('"', '\\"').encode() + b'"'


@given(printable_keys)
def test_h2_a_quoted_key_is_read_back_whatever_it_contains(key: str) -> None:
    assert parse_key([quoted(key)]) == key
    assert parse_key([quoted(key)], strict=True) == key


@given(bare_keys)
def test_h2_bare_and_quoted_forms_name_the_same_key(key: str) -> None:
    assert parse_key([key.encode()]) == parse_key([quoted(key)]) == key


@given(st.binary(max_size=300), st.booleans())
def test_h3_any_bytes_are_a_valid_key_or_an_invalid_key_error(value: bytes, strict: bool) -> None:
    try:
        key = parse_key([value], strict=strict)
    except InvalidKey:
        return
    assert check_key(key) == key


@given(st.text(PRINTABLE, min_size=8, max_size=40).filter(lambda text: "," in text or " " in text.strip()))
def test_c11_messages_never_echo_the_key(value: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        parse_key(["é".encode() + value.encode()])
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        b"8e03978e-40d5-43dd-bc93-6894a57f9324",
        b"01ARZ3NDEKTSV4RRFFQ69G5FAV",
        b"q1+/w==",
        b"order_1.2:3~4",
        b":cHJldGVuZCB0aGlz:",
        b"k" * 255,
    ],
)
def test_h2_takes_the_bare_tokens_that_vendors_use(value: bytes) -> None:
    assert parse_key([b" \t" + value + b" "]) == value.decode()


@pytest.mark.parametrize(
    "parameters",
    [
        b";a",
        b";a=1",
        b"; a=1.5;b=?1",
        b';*x="q\\"uo"',
        b";t=tok/en:*",
        b";b=:aGk=:",
        b";d=@1659578233",
        b';s=%"f%c3%bc"',
    ],
)
def test_h2_ignores_well_formed_parameters(parameters: bytes) -> None:
    assert parse_key([b'"k"' + parameters]) == "k"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b'""', "empty"),
        (b"k" * 256, "at most 255"),
        (b'"' + b"k" * 256 + b'"', "at most 255"),
        (b"a\x00b", "control"),
        (b"a\x7fb", "control"),
        (b"a\tb", "control"),
        (b'"a\tb"', "control"),
        ("é".encode(), "non-ASCII"),
        ('"é"'.encode(), "non-ASCII"),
        (b'"open', "malformed"),
        (b'"bad \\escape"', "malformed"),
        (b'"a\\"', "malformed"),
        (b'"a" "b"', "parameter"),
        (b'"a"b', "parameter"),
        (b'"a";', "parameter"),
        (b'"a";B=1', "parameter"),
        (b'"a";b=', "parameter"),
        (b'"a" ;b=1', "parameter"),
        (b'"a", "b"', "list"),
        (b"a, b", "comma"),
        (b"a,b", "comma"),
        (b"a b", "quotes"),
        (b"a;b=1", "quotes"),
        (b'a"b', "quotes"),
        (b"a\\b", "quotes"),
    ],
)
def test_h3_refuses_what_is_not_one_clear_key(value: bytes, hint: str) -> None:
    with pytest.raises(InvalidKey, match=hint):
        parse_key([value])


def test_h3_refuses_several_field_lines() -> None:
    with pytest.raises(InvalidKey, match="several"):
        parse_key([b"a", b"a"])


def test_h3_refuses_no_field_line() -> None:
    with pytest.raises(InvalidKey, match="no Idempotency-Key"):
        parse_key([])


def test_h2_strict_refuses_the_bare_form() -> None:
    with pytest.raises(InvalidKey, match="not quoted"):
        parse_key([b"abc"], strict=True)


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", "é", "\ud800"])
def test_h3_keys_from_elsewhere_follow_the_same_rules(key: str) -> None:
    with pytest.raises(InvalidKey):
        check_key(key)


def test_h3_a_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(InvalidKey, match="int"):
        check_key(7)  # type: ignore[arg-type]  # what an untyped caller may pass


# --- Strength -------------------------------------------------------------------------------------------------------


def uuid7(random: bytes) -> str:
    value = bytearray(bytes.fromhex("019ab3c4d5e6") + random[:10])
    value[6] = 0x70 | value[6] & 0x0F
    value[8] = 0x80 | value[8] & 0x3F
    return str(uuid.UUID(bytes=bytes(value)))


def ulid() -> str:
    return "01JD4QZ8XK" + "".join(secrets.choice("0123456789ABCDEFGHJKMNPQRSTVWXYZ") for _ in range(16))


@pytest.mark.parametrize("attempt", range(50))
def test_h3_strong_accepts_random_formats(attempt: int) -> None:
    four = uuid.uuid4()
    seven = uuid7(secrets.token_bytes(10))
    accepted = [
        *(str(four), str(four).upper(), four.hex, seven, seven.replace("-", "")),
        *(ulid(), ulid().lower()),
        *(secrets.token_urlsafe(17), secrets.token_urlsafe(32), secrets.token_hex(20), secrets.token_hex(32)),
        base64.urlsafe_b64encode(secrets.token_bytes(17)).decode(),
    ]
    assert [check_key(key, "strong") for key in accepted] == accepted


@pytest.mark.parametrize(
    "key",
    [
        "1",
        "order-42",
        "1700000000",
        "1700000000123456789",
        "1234567890123456789012345678901234567890",
        "2026-11-24T03:14:00Z",
        "2026-11-24T03-14-00-123456Z",
        "20261124T031400123456789Z",
        "order-1700000000-customer",
        "customer-order-1700000000123",
        "00000000000000000000000000000001",
        "0000000000000000000000000a",
        "a" * 40,
        "abcabcabcabcabcabcabcabc",
        "abcdefghijabcdefghijabcdefghij",
        "abcdefghijklmnopqrstuvwxyz",
        "ZYXWVUTSRQPONMLKJIHGFEDCBA",
        "order-000000000000000000001",
        "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "6ba7b8109dad11d180b400c04fd430c8",
        "00000000-0000-4000-8000-000000000001",
        "019ab3c4-d5e6-7000-8000-000000000000",
        "8e03978e-40d5-43dd-cc93-6894a57f9324",
        "8e03978e40d543ddbc93",
        "{8e03978e-40d5-43dd-bc93-6894a57f9324}",
        "urn:uuid:8e03978e-40d5-43dd-bc93-6894a57f9324",
        "01JD4QZ8XK0000000000000000",
        "q1w2e3r4t5y6u7i8o9p0a",
        "with spaces it is no token at all",
        str(uuid.uuid5(uuid.NAMESPACE_DNS, "example.org")),
        str(uuid.UUID(int=0)),
    ],
)
def test_h3_strong_refuses_what_is_not_random(key: str) -> None:
    assert check_key(key) == key
    with pytest.raises(InvalidKey, match="UUIDv4") as caught:
        check_key(key, "strong")
    assert len(key) < 4 or key not in str(caught.value)


@given(st.integers(0, 10**40))
def test_h3_strong_refuses_every_number(number: int) -> None:
    with pytest.raises(InvalidKey):
        parse_key([str(number).encode()], strength="strong")


@given(st.datetimes(), st.sampled_from(["%Y%m%d%H%M%S%f", "%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d_%H-%M-%S-%f"]))
def test_h3_strong_refuses_every_timestamp(moment: object, form: str) -> None:
    with pytest.raises(InvalidKey):
        check_key(format(moment, form), "strong")


def test_h3_strong_applies_to_header_keys() -> None:
    with pytest.raises(InvalidKey, match="shorter"):
        parse_key([b'"order-x"'], strength="strong")


# --- Record ids -----------------------------------------------------------------------------------------------------

parts = st.one_of(st.text(string.printable + "é\ud800\udcff", max_size=6), st.binary(max_size=6))
pairs = st.tuples(st.lists(parts, max_size=4), parts)


@given(pairs, pairs)
def test_c11_no_two_different_scopes_and_keys_share_an_id(
    one: tuple[list[str | bytes], str | bytes], other: tuple[list[str | bytes], str | bytes]
) -> None:
    assert (record_id(*one) == record_id(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((["a", "b"], "c"), (["ab"], "c")),
        ((["a"], "bc"), (["ab"], "c")),
        (([], "a"), ([""], "a")),
        (([], "a"), ([], b"a")),
        ((["s1:a"], "b"), (["s1", "a"], "b")),
        ((["\udcc3\udca9"], "k"), (["é"], "k")),
    ],
)
def test_c11_framing_keeps_neighbours_apart(one: tuple[list[str], str], other: tuple[list[str], str]) -> None:
    assert record_id(*one) != record_id(*other)


def test_c11_an_id_is_32_bytes_and_never_changes_between_releases() -> None:
    message = b"retryproof record 1\ns4:userb5:/pathb1:k"
    assert record_id(["user", b"/path"], b"k") == hashlib.sha256(message).digest()


def test_c11_a_pepper_changes_ids_and_tenants() -> None:
    assert len({record_id(["a"], "k"), record_id(["a"], "k", pepper=b"p"), record_id(["a"], "k", pepper=b"q")}) == 3
    assert len({tenant_digest("a"), tenant_digest("a", pepper=b"p"), tenant_digest(b"a")}) == 3


def test_c11_digests_have_their_lengths() -> None:
    record = record_id(["a"], "k", pepper=b"p")
    assert (len(record), len(tenant_digest("a")), short_digest(record)) == (32, 16, record[:8].hex())
