"""What callers and listeners are told of conclusions that are no result."""

from retryproof.conclusions import error_of, kind_of
from retryproof.core import errors
from retryproof.core.flow import Down

DIGEST = "0123456789abcdef"


def test_c21_an_unreadable_record_is_an_error_of_its_own() -> None:
    unreadable = errors.Unreadable("written by a later version")
    assert error_of(Down(unreadable), DIGEST) is unreadable
    assert kind_of(Down(unreadable)) == "unreadable"


def test_c10_a_store_that_is_out_of_reach_ran_nothing() -> None:
    cause = OSError("gone")
    error = error_of(Down(cause), DIGEST)
    assert isinstance(error, errors.StoreUnavailable)
    assert (error.digest, error.retry_after, error.__cause__) == (DIGEST, 1.0, cause)


def test_c8_an_attempt_that_was_overtaken_is_not_told_that_nothing_ran() -> None:
    """It ran, and another attempt ran or runs as well: the same key gives the answer, a new one a second effect."""
    error = error_of(Down(OSError("gone"), overtaken=True), DIGEST)
    assert isinstance(error, errors.LeaseLost)
    assert "the same key" in str(error)
