"""A request as the rules see it, whatever server interface it came by. Pure.

Each adapter makes one, in a single look at the headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NONE: tuple[bytes, ...] = ()


class HttpRequest:
    """What is asked for, and by whom.

    method, raw_path, query: as they were sent; the path without its query, and percent-encoded.
    headers: by name in lower case; of a name that came several times, the last value.
    key_lines: every value of the header that holds the key; empty where the key is elsewhere.
    context: what callables of the user's are given, under the names of an ASGI scope.
    """

    __slots__ = ("context", "headers", "key_lines", "method", "query", "raw_path")

    def __init__(
        self,
        method: str,
        raw_path: bytes,
        query: bytes,
        headers: dict[bytes, bytes],
        key_lines: Sequence[bytes],
        context: Mapping[str, Any],
    ) -> None:
        self.method = method
        self.raw_path = raw_path
        self.query = query
        self.headers = headers
        self.key_lines = key_lines
        self.context = context

    @property
    def announced(self) -> int | None:
        """The body's length by Content-Length, where that is one."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() and len(value) < 20 else None


def key_lines_in(headers: dict[bytes, bytes], every: Iterable[tuple[bytes, bytes]], name: bytes) -> Sequence[bytes]:
    """Each value of this header.

    every: the pairs that `headers` was made of; they are looked at again only where a name came more than once.
    """
    value = headers.get(name)
    if value is None:
        return _NONE
    pairs = every if isinstance(every, list | tuple) else list(every)
    return (value,) if len(pairs) == len(headers) else [found for named, found in pairs if named == name]
