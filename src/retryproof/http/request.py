"""A request for the rules, from any server interface. Pure.

Each adapter makes one, in a single look at the headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class HttpRequest:
    """What is asked for, and by whom.

    method, raw_path, query: as they were sent; the path without its query, and percent-encoded.
    headers: by name in lower case; of a name that came several times, the last value.
    once: no header came several times.
    key_lines: every value of the header that holds the key; empty where the key is elsewhere.
    context: what callables of the user's are given, under the names of an ASGI scope.
    """

    __slots__ = ("context", "headers", "key_lines", "method", "once", "query", "raw_path")

    def __init__(
        self,
        method: str,
        raw_path: bytes,
        query: bytes,
        headers: dict[bytes, bytes],
        once: bool,
        key_lines: Sequence[bytes],
        context: Mapping[str, Any],
    ) -> None:
        self.method = method
        self.raw_path = raw_path
        self.query = query
        self.headers = headers
        self.once = once
        self.key_lines = key_lines
        self.context = context

    def lines(self, name: bytes) -> Sequence[bytes]:
        """Each value of this header."""
        value = self.headers.get(name)
        if value is None:
            return ()
        return (value,) if self.once else [found for named, found in self.context["headers"] if named == name]
