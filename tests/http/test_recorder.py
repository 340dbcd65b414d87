"""H9, H10: what is kept of a response, and how far it is, without a server."""

from typing import Any

import pytest

from retryproof.core.codec import decode_response
from retryproof.http.recorder import COMPLETE, HELD, NO_HEAD, STREAMING, WRONG, Recorder

LENGTH_3 = (b"Content-Length", b"3")


def recorded(*headers: Any, status: int = 200, limit: int = 1000, **options: Any) -> Recorder:
    recorder = Recorder(limit)
    recorder.head(status, headers, **options)
    return recorder


def stored(recorder: Recorder) -> tuple[int, bytes, bool]:
    encoded = recorder.encoded()
    assert encoded is not None
    response = decode_response(encoded)
    return response.status, response.body, response.omitted


def test_how_far_a_response_is() -> None:
    recorder = Recorder(1000)
    assert recorder.reach == NO_HEAD
    recorder.head(200, [])
    assert (recorder.reach, recorder.streamed) == (HELD, False)
    assert not recorder.part(b"a", more=True)
    recorder.hand_on()
    assert (recorder.reach, recorder.streamed) == (STREAMING, True)
    assert recorder.part(b"b", more=False)
    assert (recorder.reach, stored(recorder)) == (COMPLETE, (200, b"ab", False))


@pytest.mark.parametrize("status", [100, 102, 103])
def test_h14_an_interim_response_is_no_head(status: int) -> None:
    recorder = Recorder(1000)
    assert recorder.head(status, [(b"link", b"</a>")]) == [(b"link", b"</a>")]
    assert (recorder.reach, recorder.status, recorder.headers) == (NO_HEAD, 0, ())
    recorder.head(201, [LENGTH_3])
    recorder.part(b"abc", more=False)
    assert (recorder.reach, stored(recorder)) == (COMPLETE, (201, b"abc", False))


def test_h10_what_was_aborted_is_no_response() -> None:
    recorder = recorded(LENGTH_3)
    recorder.part(b"abc", more=True)
    recorder.abort()
    assert recorder.part(b"", more=False)
    assert (recorder.reach, stored(recorder)) == (WRONG, (200, b"", True))


def test_h9_what_is_handed_on_is_another_list_than_what_is_kept() -> None:
    given = [(b"a", b"1")]
    recorder = Recorder(1000)
    handed_on = recorder.head(200, given)
    given.append((b"b", b"2"))
    handed_on.append((b"c", b"3"))
    assert recorder.headers == ((b"a", b"1"),)


@pytest.mark.parametrize(
    ("parts", "reach"),
    [([b"abc"], COMPLETE), ([b"ab", b"c"], COMPLETE), ([b"ab"], WRONG), ([b"ab", b"cd"], WRONG), ([b"abcd"], WRONG)],
)
def test_h10_a_response_is_as_long_as_it_says(parts: list[bytes], reach: str) -> None:
    recorder = recorded(LENGTH_3)
    for body in parts[:-1]:
        recorder.part(body, more=True)
    assert recorder.part(parts[-1], more=False)
    assert recorder.reach == reach


def test_h10_what_is_too_long_is_found_out_before_its_end_and_stays_wrong() -> None:
    recorder = recorded(LENGTH_3)
    assert not recorder.part(b"abcd", more=True)
    assert recorder.reach == WRONG
    recorder.hand_on()
    assert recorder.part(b"", more=False)
    assert recorder.reach == WRONG


@pytest.mark.parametrize("options", [{"status": 204}, {"status": 304}, {"bodiless": True}])
def test_h10_a_response_without_a_body_may_announce_that_of_another(options: dict[str, Any]) -> None:
    recorder = recorded(LENGTH_3, **options)
    recorder.part(b"", more=False)
    assert recorder.reach == COMPLETE


@pytest.mark.parametrize("values", [[b"3", b"4"], [b"4", b"3"]])
def test_h10_two_lengths_are_kept_to_by_no_body(values: list[bytes]) -> None:
    recorder = recorded(*((b"content-length", value) for value in values))
    recorder.part(b"abc", more=False)
    assert recorder.reach == WRONG


def test_h10_a_length_that_is_none_is_the_servers_to_judge() -> None:
    recorder = recorded((b"content-length", b"three"))
    recorder.part(b"abc", more=False)
    assert recorder.reach == COMPLETE


def test_h10_over_the_limit_and_for_event_streams_the_body_is_omitted() -> None:
    for recorder in (recorded(limit=100), recorded((b"content-type", b"Text/Event-Stream ; charset=utf-8"))):
        recorder.part(b"a" * 200, more=False)
        assert stored(recorder) == (200, b"", True)


def test_h14_bytes_that_are_not_seen_are_omitted_and_not_counted() -> None:
    recorder = recorded(LENGTH_3)
    assert recorder.unseen(more=False)
    assert (recorder.reach, stored(recorder)) == (COMPLETE, (200, b"", True))


@pytest.mark.parametrize(("body", "reach"), [(b"abc", COMPLETE), (b"ab", WRONG)])
def test_h14_a_response_with_trailers_ends_with_them(body: bytes, reach: str) -> None:
    recorder = recorded(LENGTH_3, trailers=True)
    assert not recorder.part(body, more=False)
    assert not recorder.trailers(more=True)
    assert recorder.trailers(more=False)
    assert (recorder.reach, stored(recorder)) == (reach, (200, b"", True))


def test_an_upstream_that_is_lost_half_way_leaves_no_response() -> None:
    recorder = recorded()
    recorder.part(b"a", more=True)
    recorder.abort()
    assert recorder.part(b"", more=False)
    assert recorder.reach == WRONG


def test_h9_headers_that_are_no_pairs_keep_nothing() -> None:
    recorder = Recorder(1000)
    with pytest.raises(ValueError, match="unpack"):
        recorder.head(200, [(b"a", b"b", b"c")])
    assert (recorder.reach, recorder.encoded()) == (HELD, None)
