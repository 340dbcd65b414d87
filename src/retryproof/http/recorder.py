"""A response as the app sends it: the part to store, and how far it has come. Pure, for all interfaces (H9, H10).

    NO_HEAD --head--> HELD --part--> STREAMING --last part--> COMPLETE, or WRONG
                      HELD --last part--> COMPLETE, or WRONG

The response is copied as it arrives, so changes by outer layers, such as compression, sessions and CORS, are not
stored. WRONG is a response that is longer or shorter than its Content-Length: it does not count as a response, however
it ends. A proxy that loses its upstream in the middle calls `abort`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from retryproof.core.codec import Unencodable, pack_response
from retryproof.http.semantics import Header, Headers, headers_without_body, read_headers

NO_HEAD, HELD, STREAMING, COMPLETE, WRONG = "no head", "head held", "streaming", "complete", "wrong length"
"""The state of a response. HELD: nothing was sent on. COMPLETE and WRONG: only its last part was not sent on."""
REACHES = (NO_HEAD, HELD, STREAMING, COMPLETE, WRONG)

_WITHOUT_BODY = frozenset({204, 304})


def is_interim(status: int) -> bool:
    """Whether a status is one of those that come before the response: 100, 102, 103; but not 101, which is the last."""
    return status < 200 and status != 101


class Recorder:
    """Takes one response. `head` comes first, then parts; the last one is marked.

    reach: how far it is. status, headers: as they came; pairs, or None for headers that are none.
    announced: the Content-Length, where there is one that is to be kept to. came: bytes of the body so far.
    streamed: the head was handed on.
    limit: bytes that a kept response may have. unwanted: headers that are not kept, beside those that never are.
    """

    # What a response begins with: set where it is otherwise.
    _trailers = False
    reach = NO_HEAD
    status = 0
    headers: tuple[Header, ...] | None = ()
    announced: int | None = None
    came = 0
    streamed = False
    _kept: Headers | None = None

    def __init__(self, limit: int, unwanted: frozenset[bytes] = frozenset()) -> None:
        self.limit = limit
        self._unwanted = unwanted
        self._parts: list[bytes] | None = []

    def head(self, status: int, headers: Iterable[Any], *, bodiless: bool = False, trailers: bool = False) -> Headers:
        """Take the head; the headers to hand on, which are the caller's to change.

        1xx are no heads (`is_interim`): they change nothing, and the final one comes after them.
        bodiless: the answer to a HEAD, whose Content-Length is that of another response.
        trailers: they come after the body.
        Raises TypeError or ValueError for headers that are no pairs, and keeps none then.
        """
        if is_interim(status):
            return list(map(tuple, headers))
        self.reach = HELD
        self.status = status
        self.headers = None
        pairs: Headers = list(map(tuple, headers))
        self._kept, length, is_events = read_headers(pairs, self._unwanted)
        self.headers = tuple(pairs)
        if length is not None and not bodiless and status not in _WITHOUT_BODY:
            self.announced = length  # of two that differ none: no body keeps to it
        if is_events:
            self._parts = None
        if trailers:
            self._trailers = True
            self._parts = None
        return pairs

    def begin_again(self) -> None:
        """Replace this response, of which nothing was sent on, by another one."""
        self._parts, self._kept, self._trailers = [], None, False
        self.reach, self.status, self.headers = NO_HEAD, 0, ()
        self.announced, self.came = None, 0

    def part(self, body: bytes, *, more: bool) -> bool:
        """Take a part of the body; whether it is the end of the response, which is COMPLETE or WRONG then."""
        if isinstance(body, memoryview):  # whose length counts items
            body = bytes(body)
        self.came = came = self.came + len(body)
        if self._parts is not None:
            if came > self.limit:
                self._parts = None
            else:
                self._parts.append(bytes(body))  # what an app sends may be its buffer, and is used again
        announced = self.announced
        if announced is not None and came > announced:
            self.reach = WRONG
            return not (more or self._trailers)
        if more or self._trailers:
            return False
        if self.reach is not WRONG:
            self.reach = COMPLETE if announced is None or came == announced else WRONG
        return True

    def unseen(self, *, more: bool) -> bool:
        """Take a part whose bytes are not seen, such as a file that the server sends; whether it is the last."""
        self._parts = None
        self.announced = None
        return self._end(more)

    def trailers(self, *, more: bool) -> bool:
        """Take trailers; whether they are the last."""
        self._parts = None
        if self.announced is not None and self.came != self.announced:
            self.reach = WRONG
        return self._end(more)

    def _end(self, more: bool) -> bool:
        if not more and self.reach is not WRONG:
            self.reach = COMPLETE
        return not more

    def hand_on(self) -> None:
        """The head and what came so far was handed on: the response is a stream."""
        self.streamed = True
        if self.reach is HELD:
            self.reach = STREAMING

    def abort(self) -> None:
        """The response will not come to its end."""
        self._parts = None
        self.reach = WRONG

    def keep_nothing(self) -> None:
        """Nothing of the body is to be kept: the record says that it was omitted."""
        self._parts = None

    @property
    def keeps(self) -> bool:
        """Whether the whole of it can be kept so far."""
        return self._parts is not None

    def encoded(self) -> bytes | None:
        """The response as it is stored: whole, or without its body, or None: not even its head fits (H10)."""
        headers, parts = self._kept, self._parts
        if headers is None:
            return None
        try:
            if parts is not None:
                body = parts[0] if len(parts) == 1 else b"".join(parts)
                encoded = pack_response(self.status, headers, body)
                if len(encoded) <= self.limit:
                    return encoded
            return self._omitting(headers)
        except (Unencodable, TypeError, AttributeError):  # headers that are none; the server will say so
            return None

    def _omitting(self, headers: Headers) -> bytes | None:
        nothing: Headers = []
        for kept in (headers_without_body(headers), nothing):
            encoded = pack_response(self.status, kept, b"", omitted=True)
            if len(encoded) <= self.limit:
                return encoded
        return None
