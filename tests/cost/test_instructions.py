"""What an operation costs in Python's instructions, which no busy machine changes (see benchmarks/instructions.py)."""

from __future__ import annotations

import sys

import pytest

from benchmarks import instructions

pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the limits were taken on Python 3.11")


@pytest.mark.parametrize("name", instructions.LIMITS)
async def test_an_operation_takes_no_more_instructions_than_it_did(name: str) -> None:
    (subject,) = [one for one in instructions.subjects() if one.name == name]
    ours, least = await instructions.compared(subject)
    assert ours.instructions / least.instructions <= instructions.LIMITS[name]


async def test_work_that_is_added_is_seen() -> None:
    """Else the limits would hold nothing."""
    (subject,) = [one for one in instructions.subjects() if one.name == "engine, replay"]

    async def heavier(number: int) -> None:
        await subject.ours(number)
        for _ in range(200):
            pass

    usual, more = await instructions.count(subject.ours, 1), await instructions.count(heavier, 1)
    assert more.instructions > usual.instructions + 200
