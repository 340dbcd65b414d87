"""H8, H9, H10: the straight way of a plain response ends as the general one does, and leaves all others to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof import Policy
from retryproof.core.codec import decode_response
from retryproof.core.commands import Acquired, Claim, Returned
from retryproof.core.flow import Completed
from retryproof.core.hold import Hold
from retryproof.http import ending, single_tenant
from retryproof.http.layer import Layer
from retryproof.http.options import Options
from retryproof.http.semantics import read_headers
from retryproof.http.settlement import Settlement, plain_answer
from retryproof.operation import BlockingOperation
from retryproof.stores.memory import MemoryStore

HEADERS = st.sampled_from(
    [
        (b"content-length", b"3"),
        (b"Content-Length", b"2"),
        (b"content-type", b"text/event-stream"),
        (b"Content-Type", b"application/json"),
        (b"connection", b"x-a"),
        (b"X-A", b"1"),
        (b"set-cookie", b"a=b"),
        (b"idempotency-replayed", b"true"),
    ]
)
STATUSES = st.sampled_from([101, 200, 201, 204, 302, 304, 404, 409, 429, 500, 503, 600])


class Optioned(Layer[None, Options]):
    """A layer that is nothing but its options."""

    def _make_engine(self, app: None, options: Options, **engine_options: Any) -> Options:
        return options


def options_of(**options: Any) -> Options:
    return Optioned(None, store=MemoryStore(), scope=single_tenant, **options)._engine


PRESETS = [
    options_of(store_when=preset, keep_set_cookie=keeps)
    for preset in ("default", "stripe", "success-only")
    for keeps in (True, False)
]


def attempt_of() -> Any:
    """What a settlement needs of an attempt."""
    claim = Claim(bytes(32), bytes(34), bytes(16), 10.0, 60.0, 60.0)
    hold, policy = Hold(claim, Acquired(1, 1, 1, bytes(16)), 0.0), Policy()
    return SimpleNamespace(hold=hold, policy=policy, operation=BlockingOperation(hold, None, policy))


@given(
    STATUSES,
    st.lists(HEADERS, max_size=4),
    st.sampled_from([b"", b"ab", b"abc"]),
    st.integers(0, 90),
    st.integers(0, 5),
)
def test_what_the_straight_way_decides_the_general_one_decides_as_well(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, limit: int, preset: int
) -> None:
    options = PRESETS[preset]
    straight = attempt_of()
    plain = plain_answer(straight.operation, options, status, read_headers(headers, options.not_kept), body, limit)
    general = Settlement(attempt_of(), options, limit)
    general.take_head(status, headers)
    assert general.part(body, more=False)
    outcome = general.end(general.answered())
    if plain is not None:
        assert plain == outcome
        completed = Completed(straight.hold, plain.result)
        assert general.sending(completed, gone=False) == general.sending(completed, gone=True) == ending.RESPONSE
        assert not general.raises


@pytest.mark.parametrize("headers", [[], [(b"Content-Length", b"3")]])
def test_a_usual_response_is_a_plain_answer(headers: list[tuple[bytes, bytes]]) -> None:
    assert plain_answer(attempt_of().operation, PRESETS[0], 201, read_headers(headers), b"abc", 1000) is not None


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"4")]])
def test_h9_a_buffer_is_kept_by_its_bytes_not_by_its_items(headers: list[tuple[bytes, bytes]]) -> None:
    attempt, buffer = attempt_of(), memoryview(b"abcd").cast("H")
    plain = plain_answer(attempt.operation, PRESETS[0], 201, read_headers(headers), buffer, 1000)  # type: ignore[arg-type]
    general = Settlement(attempt_of(), PRESETS[0], 1000)
    general.take_head(201, headers)
    assert general.part(buffer, more=False)  # type: ignore[arg-type]
    for outcome in (plain or general.end(general.answered()), general.end(general.answered())):
        assert isinstance(outcome, Returned)
        assert outcome.result is not None
        assert decode_response(outcome.result).body == b"abcd"


@pytest.mark.parametrize("status", [200, 404])
def test_c5_a_handler_that_does_not_know_is_no_plain_answer(status: int) -> None:
    attempt = attempt_of()
    attempt.operation.outcome_unknown()
    assert plain_answer(attempt.operation, PRESETS[0], status, read_headers([]), b"", 1000) is None


def test_h8_a_callable_decides_by_headers_too_and_is_asked_by_a_settlement() -> None:
    attempt = attempt_of()
    options = options_of(store_when=lambda status, headers: True)
    assert plain_answer(attempt.operation, options, 200, read_headers([]), b"", 1000) is None
