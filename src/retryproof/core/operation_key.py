"""One key for several calls of the client.

    with operation_key("order-42"):          # or: with operation_key() as key
        for _ in range(3):
            client.post("/charges", json=charge)

The block names *one* operation. The first covered request binds the key to its method, URL and body. The same request
may be sent again as often as you like, by any client. Another request in the same block is refused. It does not get a
derived key, because another request may be the first one in the next run of the program (a step that was done yesterday
is skipped today). Then the same operation would have two keys, and take effect twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import uuid4

from retryproof.core.errors import ConfigurationError, InvalidKey

# Visible ASCII characters that mean the same as a bare token and inside a Structured Field String (H2).
_SENDABLE = re.compile(r"[!#-+\--:<-\[\]-~]{1,255}")


class OperationKey:
    """The key of one block, and its request, when one was made."""

    __slots__ = ("_bound", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self._bound: dict[str, tuple[str, bytes]] = {}

    def bind(self, target: str, digest: bytes) -> None:
        """Bind the key to a request; `target` ("POST https://…") is for people, `digest` covers the whole request.

        Raises ConfigurationError if the key is bound to another request.
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
    """Send every covered request of the block with one key: the given one, or a new UUIDv4.

    The block is in the context: tasks that are started inside inherit it, plain threads do not. An inner block hides an
    outer one. Raises InvalidKey unless the key is 1 to 255 visible ASCII characters without space, quotes, backslash,
    comma or semicolon, so that it means the same to every server.
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
    """The key of the innermost block, or None outside a block."""
    return _current.get()
