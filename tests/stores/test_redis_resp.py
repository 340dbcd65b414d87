"""Commands as they are sent: the same bytes as hiredis packs, whatever the sizes, and no key that is another's."""

from __future__ import annotations

import os
from typing import Any, cast

import hiredis
import pytest

from retryproof.core.commands import Claim, Complete
from retryproof.stores.redis import packed
from retryproof.stores.redis.protocol import Protocol
from retryproof.stores.redis.resp import Argument, Packed, pack


@pytest.mark.parametrize("size", [0, 1, 9, 10, 1_023, 1_024, 70_000])
def test_a_command_is_packed_as_hiredis_packs_it(size: int) -> None:
    nonce, result = os.urandom(16), os.urandom(size)
    command = Complete(os.urandom(32), nonce, 1_700_000_000_000_000, result)
    tombstone = Complete(os.urandom(32), nonce, 1_700_000_000_000_000, None)
    plain: list[Any] = [
        "EVALSHA",
        "é" * size,
        2,
        *_plain_keys([command, tombstone]),
        *_plain(command),
        *_plain(tombstone),
        b"\3\4",
    ]
    keys = packed.keys(b"p:", [command.id, tombstone.id])
    given: list[Argument] = ["EVALSHA", "é" * size, keys, packed.completions([command, tombstone])]
    assert pack(given) == hiredis.pack_command(cast("Any", tuple(plain)))


def test_what_is_packed_counts_as_its_arguments() -> None:
    assert pack([]) == b"*0\r\n"
    assert (
        pack(["A", Packed(2, [b"\r\n$1\r\n", b"b", b"\r\n$0\r\n", b""])]) == b"*3\r\n$1\r\nA\r\n$1\r\nb\r\n$0\r\n\r\n"
    )


@pytest.mark.parametrize("sizes", [(31, 33), (16, 48), (64, 0), (33,)], ids=str)
def test_an_odd_id_does_not_make_its_neighbours_key_another(sizes: tuple[int, ...]) -> None:
    claims = [Claim(os.urandom(size), bytes(32), os.urandom(16), 1.0, 1.0, 1.0) for size in sizes]
    with pytest.raises(ValueError, match="an id has 32 bytes"):
        next(Protocol("p").claim(claims))


def _plain_keys(commands: list[Complete]) -> list[str]:
    return ["p:" + command.id.hex() for command in commands]


def _plain(command: Complete) -> list[bytes]:
    fence = packed._TOKEN.pack(command.token) + command.nonce
    return [fence, command.result or b""]
