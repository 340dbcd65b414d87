"""Canonical JSON (RFC 8785), for H6."""

import json
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core.canonical import MAX_DEPTH, canonical_json, format_number

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(-1e15, 1e15),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)


def shuffled(value: object, source: random.Random) -> object:
    if isinstance(value, dict):
        members = list(value.items())
        source.shuffle(members)
        return {name: shuffled(item, source) for name, item in members}
    if isinstance(value, list):
        return [shuffled(item, source) for item in value]
    return value


@given(values, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_h6_order_whitespace_and_escapes_do_not_count(
    value: object, source: random.Random, ascii_only: bool, indent: int | str | None
) -> None:
    spelling = json.dumps(shuffled(value, source), ensure_ascii=ascii_only, indent=indent).encode()
    assert canonical_json(spelling) == canonical_json(json.dumps(value).encode()) is not None


@given(values)
def test_h6_the_canonical_form_is_canonical_and_means_the_same(value: object) -> None:
    canonical = canonical_json(json.dumps(value).encode())
    assert canonical is not None
    assert canonical_json(canonical) == canonical
    assert json.loads(canonical) == value


@given(values, values)
def test_h6_different_values_have_different_forms(one: object, other: object) -> None:
    # Python takes True for 1; JSON does not.
    forms = [canonical_json(json.dumps(value).encode()) for value in (one, other)]
    if one != other:
        assert forms[0] != forms[1]


@given(st.binary(max_size=60))
def test_h6_any_bytes_have_a_form_or_none(body: bytes) -> None:
    canonical = canonical_json(body)
    assert canonical is None or canonical_json(canonical) == canonical


def test_rfc8785_section_3_2_2_example() -> None:
    body = rb"""{
      "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"""
    assert (
        canonical_json(body)
        == (
            '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
            '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
        ).encode()
    )


def test_rfc8785_section_3_2_3_sorts_by_utf16_code_units() -> None:
    body = rb"""{"\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh",
      "1": "One", "\ud83d\ude00": "Emoji: Grinning Face", "\u0080": "Control", "\u00f6": "O"}"""
    canonical = canonical_json(body)
    assert canonical is not None
    assert list(json.loads(canonical)) == ["\r", "1", "\x80", "ö", "€", "\U0001f600", "\ufb33"]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_rfc8785_appendix_b_numbers(bits: str, expected: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert format_number(number) == expected


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_formatted_number_reads_back_as_itself(number: float) -> None:
    assert float(format_number(number)) == number


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'[{"a":1,"\\u0061":2}]',
        b"9007199254740993",
        b"-9007199254740993",
        b"1" * 5000,
        b"9007199254740993.0",
        b"900719925474099300e-2",
        b"0.1000000000000000055",
        b"1e400",
        b"1e-400",
        b"0e99999999999999999999999",
        b"NaN",
        b"-Infinity",
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'"\xff"',
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        b"",
        b"{",
        b"{}x",
        b"{'a':1}",
        b"[1,]",
        b"01",
        b'"a\nb"',
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        "１２".encode(),
    ],
)
def test_h6_what_readers_differ_about_has_no_canonical_form(body: bytes) -> None:
    assert canonical_json(body) is None


def test_h6_nesting_up_to_the_limit_has_a_form() -> None:
    body = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert canonical_json(body) == body
