"""Commands in the Redis protocol (RESP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from retryproof.core.value import value


class _Heads(dict[int, bytes]):
    def __missing__(self, length: int) -> bytes:
        return b"\r\n$%d\r\n" % length


HEADS = _Heads({length: b"\r\n$%d\r\n" % length for length in range(1_024)})
"""What stands before an argument of so many bytes."""


@value
class Packed:
    """Several arguments of a command as they are sent: the end of the line before, the length, the argument.

    A batch's arguments are put together in this form at once: as single ones each would be copied and counted again.
    """

    count: int
    parts: list[bytes]


Argument: TypeAlias = bytes | str | int | Packed


def packed(*arguments: bytes | str | int) -> Packed:
    """These arguments."""
    parts: list[bytes] = []
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts += (HEADS[len(data)], data)
    return Packed(len(arguments), parts)


def pack(arguments: Sequence[Argument]) -> bytes:
    """One command."""
    count, parts = 0, [b""]
    for argument in arguments:
        several = argument if isinstance(argument, Packed) else packed(argument)
        count += several.count
        parts += several.parts
    parts[0] = b"*%d" % count
    parts.append(b"\r\n")
    return b"".join(parts)
