"""The pumps of any steps, in both colours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import pytest

from retryproof.drive import apump, pump

Pump = Callable[[Generator[str, Any, Any], Callable[[str], Any]], Any]


def on_loop(steps: Generator[str, Any, Any], perform: Callable[[str], Any]) -> Any:
    """`apump`, over what answers at once."""

    async def awaited(step: str) -> Any:
        return perform(step)

    return asyncio.run(apump(steps, awaited))


BOTH = pytest.mark.parametrize("pumped", [pump, on_loop], ids=["blocking", "on a loop"])


@BOTH
def test_each_step_is_performed_and_its_answer_sent(pumped: Pump) -> None:
    def steps() -> Generator[str, Any, list[str]]:
        return [(yield "first"), (yield "second")]

    assert pumped(steps(), str.upper) == ["FIRST", "SECOND"]


@BOTH
def test_the_steps_decide_what_an_error_means(pumped: Pump) -> None:
    def steps() -> Generator[str, Any, str]:
        try:
            yield "fails"
        except ValueError as error:
            return f"known: {error}"
        return "nothing was thrown"

    def perform(step: str) -> None:
        raise ValueError(step)

    assert pumped(steps(), perform) == "known: fails"


@BOTH
def test_an_error_that_the_steps_do_not_know_comes_out(pumped: Pump) -> None:
    def perform(step: str) -> None:
        raise ValueError(step)

    def steps() -> Generator[str, Any, None]:
        yield "fails"

    with pytest.raises(ValueError, match="fails"):
        pumped(steps(), perform)


@BOTH
def test_an_interruption_has_the_steps_clean_up_and_goes_on(pumped: Pump) -> None:
    """As it would if they performed the steps themselves."""
    performed: list[str] = []

    def steps() -> Generator[str, Any, None]:
        try:
            yield "interrupted"
        except Exception:  # noqa: BLE001  # what a plan may catch
            performed.append("swallowed")
        finally:
            yield "cleaned up"

    def perform(step: str) -> None:
        performed.append(step)
        if step == "interrupted":
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        pumped(steps(), perform)
    assert performed == ["interrupted", "cleaned up"]
