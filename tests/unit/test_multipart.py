"""Multipart bodies by parts: the boundary does not count, everything else does (H6)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core.multipart import MultipartDigest

Part = tuple[bytes, bytes]

contents = st.lists(st.sampled_from([b"\r\n", b"--", b"-", b"\n", b"\r", b"X", b"XX", b"data", b"\0"]), max_size=8).map(
    b"".join
)
headers = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="a"',
        b'Content-Disposition: form-data; name="f"; filename="x.bin"\r\nContent-Type: application/octet-stream',
    ]
)
multiparts = st.lists(st.tuples(headers, contents), max_size=3)


def body_of(parts: list[Part], boundary: bytes) -> bytes:
    rendered = [b"--" + boundary + b"\r\n" + header + b"\r\n\r\n" + content + b"\r\n" for header, content in parts]
    return b"".join(rendered) + b"--" + boundary + b"--\r\n"


def digest(body: bytes, boundary: bytes, size: int | None = None) -> bytes | None:
    hasher = MultipartDigest(boundary)
    step = size or max(len(body), 1)
    for start in range(0, len(body), step):
        hasher.update(body[start : start + step])
    return hasher.digest()


@given(multiparts, st.sampled_from([b"XXX-boundary", b"----WebKitFormBoundary7MA4YWxkTrZu0gW", b"'()+_,-./:=?9"]))
def test_h6_the_boundary_does_not_count(parts: list[Part], boundary: bytes) -> None:
    assert digest(body_of(parts, boundary), boundary) == digest(body_of(parts, b"other"), b"other") is not None


@given(multiparts, multiparts)
def test_h6_parts_their_headers_and_their_order_count(one: list[Part], other: list[Part]) -> None:
    same = digest(body_of(one, b"b0undary"), b"b0undary") == digest(body_of(other, b"b0undary"), b"b0undary")
    assert same == (one == other)


@given(st.data())
def test_h6_chunks_do_not_count(data: st.DataObject) -> None:
    body = data.draw(
        st.one_of(
            multiparts.map(lambda parts: body_of(parts, b"X")),
            st.lists(st.sampled_from([b"\r\n", b"--X", b"--", b"a: b", b" ", b"\r\n\r\n", b"\n"]), max_size=16).map(
                b"".join
            ),
        )
    )
    whole = digest(body, b"X")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=6)))
    hasher = MultipartDigest(b"X")
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        hasher.update(body[start:end])
    assert hasher.digest() == whole == digest(body, b"X", size=1)


def test_h6_a_cut_at_every_position_gives_the_same_digest() -> None:
    body = body_of([(b'Content-Disposition: form-data; name="a"', b"\r\n--bound\r\n"), (b"A: b", b"")], b"boundary")
    whole = digest(body, b"boundary")
    assert whole is not None
    for cut in range(len(body) + 1):
        hasher = MultipartDigest(b"boundary")
        hasher.update(body[:cut])
        hasher.update(body[cut:])
        assert hasher.digest() == whole


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--X",
        b"--X--junk",
        b"--X\r\nA: b\r\n\r\ndata",
        b"--X\r\nA: b\r\n\r\ndata\r\n--X",
        b"--X\r\nA: b\r\n\r\ndata\r\n--X-",
        b"--X\r\nA: b\r\n\r\ndata\r\n--X--\r\nepilogue",
        b"preamble\r\n--X\r\nA: b\r\n\r\ndata\r\n--X--",
        b"--X\r\n\r\ndata\r\n--X--",
        b"--X\r\nno colon\r\n\r\ndata\r\n--X--",
        b"--X\r\nA: b\r\n--X\r\nA: b\r\n\r\ndata\r\n--X--",
        b"--X\r\nA: b\r\n\r\ndata\r\n--Xtra\r\n--X--",
        b"--X\nA: b\n\ndata\n--X--",
        b"--X\r\nA: b\0\r\n\r\ndata\r\n--X--",
        b"--X" + b" " * 70 + b"\r\nA: b\r\n\r\ndata\r\n--X--",
        b"--X\r\nA: " + b"b" * 20_000 + b"\r\n\r\ndata\r\n--X--",
    ],
)
def test_h6_malformed_bodies_have_no_digest(body: bytes) -> None:
    assert digest(body, b"X") is None
    assert digest(body, b"X", size=1) is None


@pytest.mark.parametrize(
    "body",
    [
        b"--X--",
        b"--X--\r\n",
        b"\r\n--X\r\nA: b\r\n\r\n\r\n--X--",
        b"--X \t\r\nA: b\r\n\r\ndata\r\n--X--\r\n",
        b"--X\r\nA: b\r\n folded\r\n\r\ndata\r\n--X--",
    ],
)
def test_h6_unusual_but_clear_bodies_have_a_digest(body: bytes) -> None:
    assert digest(body, b"X") is not None


@pytest.mark.parametrize("boundary", [b"", b"a" * 71, b"ends in space ", b"line\r\nbreak", b'quo"te'])
def test_h6_an_impossible_boundary_gives_no_digest(boundary: bytes) -> None:
    assert digest(b"--" + boundary + b"--\r\n", boundary) is None


def test_h6_a_large_part_is_not_kept_in_memory() -> None:
    hasher = MultipartDigest(b"X")
    hasher.update(b"--X\r\nA: b\r\n\r\n")
    for _ in range(64):
        hasher.update(b"x" * 65536)
        assert len(hasher._buffer) <= len(b"\r\n--X")
    hasher.update(b"\r\n--X--")
    assert hasher.digest() is not None
