"""A digest of a multipart body that does not depend on its boundary (RFC 2046, RFC 7578).

Clients choose a new boundary for every attempt, so the raw bytes of a retry differ. Instead, each part is hashed in
order: its header block (name, file name, content type and other fields) and its body, byte for byte. The parser is
strict. If it would have to interpret something (text before the first or after the last delimiter, a line that only
starts like the boundary, a part without headers), the body counts as malformed, and the caller uses the raw bytes. So
does a body with more than MAX_PARTS parts: each costs microseconds, and a body may consist of empty parts only.
"""

import hashlib
import re
from collections.abc import Callable
from typing import TypeAlias

MAX_PARTS = 10_000
_MAX_HEADERS = 16 * 1024
_MAX_PADDING = 64
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00\r\n]*|[ \t][^\x00\r\n]*")


_State: TypeAlias = Callable[[], bool]


class MultipartDigest:
    """Hashes a body part by part, from chunks of any size, in constant memory."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter may come without a line break. One that is put before the body makes it like the others.
        self._buffer = b"\r\n"
        self._at = 0
        self._parts = hashlib.sha256()
        self._body = hashlib.sha256()
        self._count = 0
        self._state: _State = self._preamble if _BOUNDARY.fullmatch(boundary) else self._malformed

    def update(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._buffer += chunk
        while self._state():
            pass
        self._buffer = self._buffer[self._at :]
        self._at = 0

    def digest(self) -> bytes | None:
        """Return the SHA-256 of the parts, or None if the body so far is not a complete multipart body."""
        return self._parts.digest() if self._state == self._epilogue else None

    # Each state reads the buffer from `_at`, and says whether the next state can continue at once. A state waits for a
    # bounded number of bytes, and its decision does not depend on how the body was cut into chunks.

    def _preamble(self) -> bool:
        found = self._buffer.find(self._delimiter, self._at)
        if found < 0:
            return len(self._buffer) > len(self._delimiter) + 2 and self._go_to(self._malformed)
        if self._buffer[:found] not in (b"", b"\r\n"):
            return self._go_to(self._malformed)
        return self._go_to(self._after_delimiter, found + len(self._delimiter))

    def _after_delimiter(self) -> bool:
        if len(self._buffer) < self._at + 2:
            return False
        if self._buffer.startswith(b"--", self._at):
            return self._go_to(self._epilogue, self._at + 2)
        end = self._buffer.find(b"\r\n", self._at, self._at + _MAX_PADDING + 2)
        if end < 0:
            return len(self._buffer) > self._at + _MAX_PADDING + 1 and self._go_to(self._malformed)
        if self._buffer[self._at : end].strip(b" \t"):
            return self._go_to(self._malformed)
        return self._go_to(self._headers, end)

    def _headers(self) -> bool:
        # The buffer starts with the line break that ended the delimiter's line.
        end = self._buffer.find(b"\r\n\r\n", self._at, self._at + _MAX_HEADERS + 4)
        if end < 0:
            return len(self._buffer) > self._at + _MAX_HEADERS + 3 and self._go_to(self._malformed)
        self._count += 1
        if self._count > MAX_PARTS:
            return self._go_to(self._malformed)
        block = self._buffer[self._at + 2 : end]
        if self._delimiter in self._buffer[self._at : end] or not _well_formed(block):
            return self._go_to(self._malformed)
        self._parts.update(b"%d:%b" % (len(block), block))
        self._body = hashlib.sha256()
        return self._go_to(self._content, end + 4)

    def _content(self) -> bool:
        found = self._buffer.find(self._delimiter, self._at)
        if found < 0:
            # The last bytes may be the start of a delimiter.
            sure = max(self._at, len(self._buffer) - len(self._delimiter) + 1)
            self._body.update(self._buffer[self._at : sure])
            self._at = sure
            return False
        self._body.update(self._buffer[self._at : found])
        self._parts.update(self._body.digest())
        return self._go_to(self._after_delimiter, found + len(self._delimiter))

    def _epilogue(self) -> bool:
        rest = self._buffer[self._at : self._at + 3]
        return not b"\r\n".startswith(rest) and self._go_to(self._malformed)

    def _malformed(self) -> bool:
        self._at = len(self._buffer)
        return False

    def _go_to(self, state: _State, at: int | None = None) -> bool:
        self._state = state
        if at is not None:
            self._at = at
        return True


def _well_formed(block: bytes) -> bool:
    return all(map(_HEADER_LINE.fullmatch, block.split(b"\r\n")))
