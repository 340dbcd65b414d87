"""Which connection carries which operation: one at a time. Otherwise one would commit the other's unfinished work.

The key is the driver's own connection, also if another object wraps it, for as long as the joined attempt exists.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from retryproof.core.errors import ConfigurationError
from retryproof.core.keys import short_digest


class Carried(Protocol):
    """A transaction that an operation has joined. id: the record's."""

    @property
    def id(self) -> bytes: ...


_carried: dict[int, weakref.ref[Carried]] = {}
"""What is joined, by the identity of the driver's connection, which it keeps alive. One that was forgotten stays until
that identity is another's: plain references cost a quarter of a WeakValueDictionary's."""
_mutex = threading.Lock()


def take(transaction: Carried, driver: object) -> None:
    """Let the connection carry this operation; ConfigurationError if it carries another one."""
    with _mutex:
        found = _carried.get(id(driver))
        other = None if found is None else found()
        if other is not None:
            raise ConfigurationError(
                f"This connection is in the transaction of operation {short_digest(other.id)}, which would commit "
                "what is done here, or lose it. Give each operation a connection of its own. Nothing was written.",
                digest=short_digest(transaction.id),
            )
        _carried[id(driver)] = weakref.ref(transaction)


def let_go(transaction: Carried, driver: object) -> None:
    """The connection does not carry that operation any more; may be called repeatedly."""
    with _mutex:
        found = _carried.get(id(driver))
        if found is not None and found() is transaction:
            del _carried[id(driver)]
