"""Errors name the operation, say what to do, and travel between processes."""

import copy
import inspect
import pickle

import pytest

from retryproof import errors

ALL = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, errors.IdempotencyError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_and_copying(kind: type[errors.IdempotencyError]) -> None:
    error = kind("what happened; what to do", digest="00112233aabbccdd", retry_after=1.5)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.message, again.digest, again.retry_after) == (error.message, error.digest, 1.5)
        assert str(again) == str(error)


def test_an_error_names_the_operation_where_one_is_known() -> None:
    assert str(errors.InProgress("running elsewhere", digest="00ff")) == "running elsewhere [operation 00ff]"
    assert str(errors.InProgress("running elsewhere")) == "running elsewhere"


def test_the_message_stands_without_the_digest() -> None:
    assert errors.Mismatch("used before", digest="00ff").message == "used before"


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert {kind.__name__ for kind in ALL} <= set(errors.__doc__.replace("├──", "").replace("└──", "").split())


def test_every_error_has_one_base() -> None:
    assert all(kind.__mro__[1] is errors.IdempotencyError for kind in ALL if kind is not errors.IdempotencyError)
