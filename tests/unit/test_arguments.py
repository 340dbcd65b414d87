"""Fingerprints of arguments (F3)."""

import dataclasses
import enum
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retryproof.core.arguments import arguments
from retryproof.core.errors import ConfigurationError
from retryproof.core.fingerprint import Method, version_of


class Currency(enum.Enum):
    EUR = "EUR"
    USD = "USD"


class Code(enum.StrEnum):
    EUR = "EUR"


@dataclasses.dataclass
class Credit:
    amount: Any
    note: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class Debit:
    amount: Any


def test_f3_the_order_of_arguments_and_of_dicts_does_not_count() -> None:
    one = arguments({"a": 1, "b": {"x": 1, "y": 2}})
    assert one == arguments({"b": {"y": 2, "x": 1}, "a": 1})
    assert version_of(one) == (1, Method.ARGUMENTS)


def test_f3_the_order_of_sets_does_not_count_in_any_process() -> None:
    program = (
        "from retryproof.core.arguments import arguments;"
        "print(arguments({'names': {'a', 'b', 'c', 'd', 'e'}, 'map': {2: {'x'}, 1: {'y'}}}).hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


DISTINCT: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2**70,
    2**70 + 1,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "1",
    "nan",
    "\ud83d\ude00",
    "\U0001f600",
    b"",
    b"1",
    [],
    [1],
    ["1"],
    {},
    {"1": 1},
    {1: 1},
    {"$bytes": ""},
    {"$$bytes": ""},
    {"$float": "nan"},
    set(),
    {1},
    Decimal("1.50"),
    Decimal("1.5"),
    UUID(int=1),
    str(UUID(int=1)),
    date(2026, 1, 1),
    datetime(2026, 1, 1),  # noqa: DTZ001 - told apart from the aware one
    datetime(2026, 1, 1, tzinfo=UTC),
    "2026-01-01",
    time(0, 0),
    timedelta(0),
    Currency.EUR,
    Currency.USD,
    Code.EUR,
    "EUR",
    Credit(1),
    Debit(1),
    Credit(2),
    {"amount": 1},
]


def test_f3_different_values_have_different_fingerprints() -> None:
    assert len({arguments({"value": value}) for value in DISTINCT}) == len(DISTINCT)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(max_size=3))
names = st.text("$ab", max_size=3)
nested = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3))
)


@given(nested, nested)
def test_f3_no_two_values_collide(one: Any, other: Any) -> None:
    # repr tells True from 1, as the fingerprint does, but keeps the order of a dict, which does not count.
    if arguments({"value": one}) == arguments({"value": other}):
        assert one == other
    elif repr(one) == repr(other):
        pytest.fail("equal values have different fingerprints")


def test_f3_fields_that_do_not_compare_do_not_count() -> None:
    assert arguments({"value": Credit(1, "a")}) == arguments({"value": Credit(1, "b")})


def recursive() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [object(), [object()], Credit(object()), {"x": {1: object()}}, Credit, recursive()])
def test_f3_a_value_without_a_stable_form_is_an_error_that_names_its_parameter(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="'session'"):
        arguments({"amount": 1, "session": value})


def test_f3_a_number_with_too_many_digits_is_an_error_that_names_its_parameter() -> None:
    with pytest.raises(ConfigurationError, match="'n'"):
        arguments({"n": 10**5000})


def test_f3_nesting_past_the_limit_is_an_error_that_names_its_parameter() -> None:
    value: Any = 1
    for _ in range(200):
        value = [value]
    with pytest.raises(ConfigurationError, match=r"'tree'.*nested"):
        arguments({"tree": value})
