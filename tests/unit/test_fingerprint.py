"""Fingerprints of requests: H6 and C21."""

import hashlib
import json as stdlib_json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core import fingerprint
from retryproof.core.errors import ConfigurationError, Unreadable
from retryproof.core.fingerprint import (
    Method,
    Request,
    Strategy,
    comparable,
    fields,
    json,
    raw,
    strategy_for,
    version_of,
)

JSON = b"application/json"


def take(
    strategy: Strategy,
    body: bytes,
    *,
    method: str = "POST",
    path: bytes = b"/charges",
    query: bytes = b"",
    content_type: bytes = JSON,
    chunk: int = 1_000_000,
) -> bytes:
    hasher = strategy.begin(method, path, query, content_type)
    for start in range(0, len(body), chunk):
        hasher.update(body[start : start + chunk])
    return hasher.digest()


def form(boundary: bytes, content: bytes = b"1") -> bytes:
    header = b'Content-Disposition: form-data; name="a"'
    return b"--" + boundary + b"\r\n" + header + b"\r\n\r\n" + content + b"\r\n--" + boundary + b"--\r\n"


small = st.binary(max_size=4)
requests = st.tuples(st.text(max_size=3), small, small, small)


@given(requests, requests)
def test_h6_method_path_query_and_body_count_and_stay_apart(
    one: tuple[str, bytes, bytes, bytes], other: tuple[str, bytes, bytes, bytes]
) -> None:
    taken = [take(raw, body, method=method, path=path, query=query) for method, path, query, body in (one, other)]
    assert (taken[0] == taken[1]) == (one == other)


@given(
    st.binary(max_size=40),
    st.integers(1, 40),
    st.sampled_from([JSON, b"text/plain", b"multipart/form-data; boundary=X"]),
    st.sampled_from([raw, json, fields("/a")]),
)
def test_h6_chunks_do_not_count(body: bytes, chunk: int, content_type: bytes, strategy: Strategy) -> None:
    assert take(strategy, body, content_type=content_type, chunk=chunk) == take(
        strategy, body, content_type=content_type
    )


def test_h6_a_fingerprint_is_a_version_a_method_and_a_sha256_that_never_change() -> None:
    message = b"retryproof fingerprint 1.1\n4:POST2:/p3:q=119:16:application/jsonbody"
    expected = b"\x01\x01" + hashlib.sha256(message).digest()
    assert take(raw, b"body", path=b"/p", query=b"q=1") == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b"application/json", b"Application/JSON ", True),
        (b"application/json", b"application/json; charset=utf-8", False),
        (b"application/json; charset=utf-8", b'application/json;CHARSET="UTF-8"', True),
        (b"application/json; charset=utf-8", b"application/json; charset=latin-1", False),
        (b"application/json", b"application/json; profile=x", True),
        (b"application/json", b"text/json", False),
        (b"application/json", b"", False),
        (b"multipart/related; boundary=a; start=x", b"multipart/related; start=x; boundary=b", True),
        (b"multipart/related; boundary=a; start=x", b"multipart/related; boundary=a; start=y", False),
        (b'text/plain; charset="a', b"text/plain", False),
    ],
)
def test_h6_the_media_type_counts_without_what_does_not_matter(one: bytes, other: bytes, same: bool) -> None:
    assert (take(raw, b"x", content_type=one) == take(raw, b"x", content_type=other)) == same


@given(st.binary(max_size=40), st.sampled_from([b"", b"a/b;", b"multipart/x;", b"application/json;"]))
def test_h6_any_content_type_gives_a_fingerprint(noise: bytes, start: bytes) -> None:
    assert len(take(json, b"{}", content_type=start + noise)) == 34


# --- Multipart ------------------------------------------------------------------------------------------------------


def multipart(boundary: bytes) -> bytes:
    return b"multipart/form-data; boundary=" + boundary


def test_h6_a_multipart_retry_with_another_boundary_is_the_same_request() -> None:
    one = take(raw, form(b"aaa"), content_type=multipart(b"aaa"))
    assert one == take(raw, form(b"bbb"), content_type=multipart(b'"bbb"'))
    assert version_of(one) == (1, Method.MULTIPART)


def test_h6_a_multipart_body_with_other_content_is_another_request() -> None:
    one = take(raw, form(b"aaa"), content_type=multipart(b"aaa"))
    assert one != take(raw, form(b"aaa", b"2"), content_type=multipart(b"aaa"))
    assert one != take(raw, form(b"aaa"), content_type=multipart(b"aaa"), path=b"/other")
    assert one != take(raw, form(b"aaa"), content_type=b"multipart/mixed; boundary=aaa")


@pytest.mark.parametrize(
    "content_type", [multipart(b"bbb"), b"multipart/form-data", b"multipart/form-data; boundary=aaa; boundary=aaa"]
)
def test_h6_a_malformed_multipart_request_is_taken_raw(content_type: bytes) -> None:
    assert version_of(take(raw, form(b"aaa"), content_type=content_type)) == (1, Method.RAW)


# --- JSON and fields ------------------------------------------------------------------------------------------------


def test_h6_json_takes_two_spellings_for_the_same_request() -> None:
    one = take(json, b'{"a": 1.0, "b": "\\u00e9"}')
    assert one == take(json, '{"b":"é","a":1}'.encode())
    assert one != take(raw, b'{"a": 1.0, "b": "\\u00e9"}')
    assert one != take(json, b'{"a": 1, "b": "e"}')
    assert version_of(one) == (1, Method.JSON)


def test_h6_json_applies_to_structured_suffixes() -> None:
    taken = take(json, b"{ }", content_type=b"application/vnd.api+json; charset=UTF-8")
    assert version_of(taken) == (1, Method.JSON)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"a":1,"a":2}', JSON),
        (b"[9007199254740993]", JSON),
        (b"not json", JSON),
        (b"{}", b"text/plain"),
        (b"{}", b"application/json; charset=latin-1"),
    ],
)
def test_h6_json_falls_back_to_the_raw_bytes(body: bytes, content_type: bytes) -> None:
    for strategy in (json, fields("/a")):
        assert take(strategy, body, content_type=content_type) == take(raw, body, content_type=content_type)


def test_h6_json_still_takes_multipart_by_parts() -> None:
    assert version_of(take(json, form(b"aaa"), content_type=multipart(b"aaa"))) == (1, Method.MULTIPART)


def test_h6_fields_look_at_the_selected_values_alone() -> None:
    strategy = fields("/amount", "/currency")
    one = take(strategy, b'{"amount": 5, "currency": "EUR", "note": "first"}')
    assert one == take(strategy, b'{"currency": "EUR", "amount": 5.0, "note": "second"}')
    assert one != take(strategy, b'{"amount": 6, "currency": "EUR", "note": "first"}')
    assert one == take(fields("/currency", "/amount"), b'{"amount": 5, "currency": "EUR"}')
    assert version_of(one) == (1, Method.FIELDS)


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        ("", b'{"":2,"a/b":1,"list":[7,{"m~n":null}]}'),
        ("/a~1b", b"1"),
        ("/", b"2"),
        ("/list/0", b"7"),
        ("/list/1/m~0n", b"null"),
    ],
)
def test_rfc6901_pointers_select(pointer: str, expected: bytes) -> None:
    body = b'{"a/b": 1, "": 2, "list": [7, {"m~n": null}]}'
    assert fingerprint.selected_fields(body, [pointer]) == b'[["%b",[%b]]]' % (pointer.encode(), expected)


@pytest.mark.parametrize("pointer", ["/x", "/list/2", "/list/-", "/list/00", "/list/٠", "/list/0/x", "/list/a"])
def test_rfc6901_what_is_absent_is_not_null(pointer: str) -> None:
    selected = fingerprint.selected_fields(b'{"list": [null, 1]}', [pointer])
    assert selected is not None
    assert stdlib_json.loads(selected) == [[pointer, []]]


@pytest.mark.parametrize("pointers", [(), ("amount",), ("/a~2",), ("/a", "b")])
def test_h6_fields_refuse_what_is_no_pointer(pointers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="JSON Pointer"):
        fields(*pointers)


# --- Callables and options ------------------------------------------------------------------------------------------


def test_h6_a_callable_sees_the_request_and_decides_alone() -> None:
    seen: list[Request] = []

    def by_length(request: Request) -> bytes:
        seen.append(request)
        return b"%d" % len(request.body)

    one = take(strategy_for(by_length), b"abc", chunk=2, query=b"q")
    assert seen == [Request("POST", b"/charges", b"q", JSON, b"abc")]
    assert one == take(strategy_for(by_length), b"xyz", path=b"/other")
    assert one != take(strategy_for(by_length), b"abcd")
    assert version_of(one) == (1, Method.CUSTOM)


def test_h6_a_callable_may_return_text_which_is_not_bytes() -> None:
    assert take(strategy_for(lambda _: "a"), b"") != take(strategy_for(lambda _: b"a"), b"")


def test_h6_a_callable_that_returns_something_else_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="NoneType"):
        take(strategy_for(lambda _: None), b"")


@pytest.mark.parametrize("strategy", [raw, json, fields("/a")])
def test_h6_a_strategy_is_its_own_option(strategy: Strategy) -> None:
    assert strategy_for(strategy) is strategy


async def asynchronous(request: Request) -> bytes:
    return request.body


@pytest.mark.parametrize("option", [None, "raw", 1, fields, fingerprint.Raw, asynchronous])
def test_h6_other_options_are_refused_with_the_choices(option: Any) -> None:
    with pytest.raises(ConfigurationError, match="raw"):
        strategy_for(option)


# --- Versions -------------------------------------------------------------------------------------------------------


def test_c21_the_empty_fingerprint_has_no_version() -> None:
    assert version_of(b"") == (0, 0)
    assert comparable(b"", raw) is None


@given(st.binary(min_size=1, max_size=40).filter(lambda stored: not (len(stored) == 34 and stored[0] == 1)))
def test_c21_unknown_fingerprints_are_unreadable(stored: bytes) -> None:
    with pytest.raises(Unreadable):
        version_of(stored)


@pytest.mark.parametrize("method", [0, 7, 255])
def test_c21_unknown_methods_are_unreadable(method: int) -> None:
    with pytest.raises(Unreadable):
        version_of(bytes([1, method]) + bytes(32))


custom = strategy_for(lambda request: request.body)


@pytest.mark.parametrize("maker", [raw, json, fields("/a"), custom])
@pytest.mark.parametrize("configured", [raw, json, fields("/a"), custom])
@pytest.mark.parametrize(
    ("body", "content_type"), [(b'{"a": 1}', JSON), (b"{", JSON), (form(b"XX"), multipart(b"XX")), (b"x", b"")]
)
def test_c21_an_older_fingerprint_is_compared_by_the_method_that_made_it(
    maker: Strategy, configured: Strategy, body: bytes, content_type: bytes
) -> None:
    stored = take(maker, body, content_type=content_type)
    strategy = comparable(stored, configured)
    if strategy is None:
        assert version_of(stored)[1] in (Method.FIELDS, Method.CUSTOM)
        assert configured is not maker
    else:
        assert take(strategy, body, content_type=content_type) == stored
