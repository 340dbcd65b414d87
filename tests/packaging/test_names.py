"""The public names are a contract: they may be added to, and never go or move."""

import importlib

import pytest

from tests.packaging.names import NAMES

ERRORS = {
    "ConfigurationError",
    "IdempotencyError",
    "InProgress",
    "InvalidKey",
    "LeaseLost",
    "Mismatch",
    "NoOperation",
    "OutcomeUnknown",
    "ResultOmitted",
    "StoreUnavailable",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_public_name_stays_where_it_is(module: str) -> None:
    found = importlib.import_module(module)
    assert {name for name in NAMES[module] if not hasattr(found, name)} == set()


@pytest.mark.parametrize("module", [module for module in NAMES if not module.endswith((".asgi", ".httpx"))])
def test_what_a_package_exports_is_there_and_includes_the_contract(module: str) -> None:
    found = importlib.import_module(module)
    assert NAMES[module] <= set(found.__all__)
    assert [name for name in found.__all__ if not hasattr(found, name)] == []


def test_the_errors_are_all_below_one_base() -> None:
    errors = importlib.import_module("retryproof").errors
    assert {name for name in ERRORS if not issubclass(getattr(errors, name), errors.IdempotencyError)} == set()
