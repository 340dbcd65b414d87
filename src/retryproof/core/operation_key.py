"""One key that outlives a single call of the client.

    with operation_key("order-42"):          # or: with operation_key() as key
        for _ in range(3):
            client.post("/charges", json=charge)

The block names *one* operation. The first covered request binds the key to its method, URL and body; the same request
may be sent again as often as wanted, by any client, and another request under the same block is refused. It is not
given a derived key: which request comes first can differ from one run of the program to the next (a step that was done
yesterday is skipped today), and then the same operation would travel under two keys and take effect twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import uuid4

from retryproof.core.errors import ConfigurationError, InvalidKey

# Visible ASCII that reads the same as a bare token and inside a Structured Field String (H2).
_SENDABLE = re.compile(r"[!#-+\--:<-\[\]-~]{1,255}")


class OperationKey:
    """The key of one block, and the request that it stands for once one was made."""

    __slots__ = ("_bound", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self._bound: dict[str, tuple[str, bytes]] = {}

    def bind(self, target: str, digest: bytes) -> None:
        """Tie the key to a request; `target` ("POST https://…") is for people, `digest` covers all of the request.

        Raises ConfigurationError when the key already stands for another request.
        """
        first_target, first_digest = self._bound.setdefault("request", (target, digest))
        if first_digest != digest:
            what = "with another body" if first_target == target else f"and this is {target}"
            raise ConfigurationError(
                f"the key {self.key!r} of this operation_key block stands for {first_target}, {what}; "
                "give each operation a block of its own, or set the key header on this request"
            )


_current: ContextVar[OperationKey | None] = ContextVar("retryproof_operation_key", default=None)


@contextmanager
def operation_key(key: str | None = None) -> Iterator[str]:
    """Send every covered request of the block under one key: the one given, else a new UUIDv4.

    The block follows the context: tasks started inside inherit it, plain threads do not. An inner block hides an outer
    one. Raises InvalidKey unless the key is 1 to 255 visible ASCII characters without space, quotes, backslash, comma
    or semicolon, so that it means the same to every server.
    """
    if key is None:
        key = str(uuid4())
    if not _SENDABLE.fullmatch(key):
        raise InvalidKey(
            "a key to send is 1 to 255 visible ASCII characters without space, quotes, backslash, comma or semicolon"
        )
    token = _current.set(OperationKey(key))
    try:
        yield key
    finally:
        _current.reset(token)


def current_operation_key() -> OperationKey | None:
    """The innermost block's key, or None outside of any."""
    return _current.get()
