"""Statements whose parameters have names: written once for people, rendered once in an engine's own style.

A parameter is `:name`, on PostgreSQL with its type behind it: `:name::bytea`. `dollars` numbers each name once, and
keeps the types; `marks` puts a `?` in each place and drops them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from retryproof.sql.plan import Statement

_NAMED = re.compile(r"(?<!:):([a-z_]+)(::[a-z]+(?:\[\])?)?")


class Named:
    """A rendered statement. sql: as the driver gets it. names: of its parameters, in the order of their places."""

    __slots__ = ("names", "sql")

    def __init__(self, sql: str, names: Sequence[str]) -> None:
        self.sql = sql
        self.names = tuple(names)

    def __call__(self, **values: Any) -> Statement:
        """The statement with its values."""
        return Statement(self.sql, [values[name] for name in self.names])

    def counted(self, **values: Any) -> Statement:
        """The same, answered by an empty row for each that it wrote."""
        return Statement(self.sql, [values[name] for name in self.names], counted=True)


def dollars(sql: str) -> Named:
    """In PostgreSQL's style: `$1::bytea`."""
    names: list[str] = []

    def place(found: re.Match[str]) -> str:
        name = found[1]
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}{found[2] or ''}"

    return Named(_NAMED.sub(place, sql), names)


def marks(sql: str) -> Named:
    """In the style of SQLite and MySQL: `?`."""
    names = [found[1] for found in _NAMED.finditer(sql)]
    return Named(_NAMED.sub("?", sql), names)
