"""What a conclusion means outside: an event for listeners, an error for callers."""

from __future__ import annotations

from retryproof.core import errors
from retryproof.core.flow import Busy, Completed, Conclusion, Down, Failed, Foreign, Mismatched, Refused, Replayed
from retryproof.observe.events import Event, Kind

WHY_UNKNOWN = {
    "refused": "an attempt died",
    "poisoned": "too many attempts died",
    "committed": "its transaction was committed without its result",
}
"""What stands behind an operation whose outcome is unknown, by the reason of the refusal."""


_FRESH = Kind.FRESH  # by its name it takes Python 3.11 longer than all the rest


def kind_of(conclusion: Conclusion) -> Kind:
    """The kind of event for a conclusion."""
    if type(conclusion) is Completed:
        if conclusion.gone:
            return Kind.NEVER_STORED
        return _FRESH if conclusion.stored else Kind.UNSTORED
    match conclusion:
        case Completed():
            raise TypeError(f"{conclusion!r} is of a class of its own.")
        case Replayed(overtaken=overtaken):
            return Kind.LEASE_LOST if overtaken else Kind.REPLAYED
        case Busy(overtaken=overtaken):
            return Kind.LEASE_LOST if overtaken else Kind.IN_PROGRESS
        case Failed(released=released):
            return Kind.FAILED if released else Kind.UNKNOWN
        case Mismatched():
            return Kind.MISMATCH
        case Refused():
            return Kind.ABANDONED
        case Down(errors.Unreadable()):
            return Kind.UNREADABLE
        case Down():
            return Kind.STORE_ERROR
        case Foreign():
            return Kind.UNREADABLE


def is_outage(down: Down) -> bool:
    """Not a store that was never set up: it would stay open for good. Nor a record that cannot be read: the operation
    may be done (C21).
    """
    return not isinstance(down.error, errors.ConfigurationError | errors.Unreadable)


def event_of(conclusion: Conclusion, kind: Kind, digest: str, where: str, seconds: float) -> Event:
    """The event for a conclusion."""
    attempt, trace, note, error = 0, "", "", None
    if isinstance(conclusion, Completed) and conclusion.gone:
        note = "the record is gone"
    match conclusion:
        case Completed(hold) | Failed(hold):
            attempt, trace = hold.attempt, hold.trace
        case Replayed(finished):
            attempt, trace = finished.attempt, finished.trace
            note = "" if finished.stored else "unstored"
        case Refused(reason, number):
            attempt, note = number, reason
        case Down(cause, overtaken):
            error, note = cause, "overtaken" if overtaken else ""
        case _:
            pass
    return Event(
        kind=kind, digest=digest, where=where, attempt=attempt, seconds=seconds, error=error, trace=trace, note=note
    )


def error_of(conclusion: Conclusion, digest: str) -> errors.IdempotencyError:
    """The error for a conclusion without a result: what it means, and what to do."""
    match conclusion:
        case Busy(left, True):
            return errors.LeaseLost(
                "Another attempt took this operation over and is not done yet; ask again for its result.",
                digest=digest,
                retry_after=left,
            )
        case Busy(left):
            return errors.InProgress(
                "The same operation is running elsewhere; try again with the same key.", digest=digest, retry_after=left
            )
        case Mismatched():
            return errors.Mismatch(
                "The key was used before with other input; use a new key for a new operation.", digest=digest
            )
        case Refused(reason, number):
            why = WHY_UNKNOWN[reason]
            return errors.OutcomeUnknown(
                f"Whether this operation had its effect is unknown: {why} (attempt {number}). Find out, then settle it "
                "with `retryproof keys settle`.",
                digest=digest,
            )
        case Failed(hold):
            return errors.OutcomeUnknown(
                f"Whether this operation had its effect is unknown (attempt {hold.attempt}): its work said so, or its "
                "record is gone. Find out, then settle it with `retryproof keys settle`.",
                digest=digest,
            )
        case Down(errors.ConfigurationError() | errors.Unreadable() as error):
            return error
        case Down(error, True):
            lost = errors.LeaseLost(
                "Another attempt took this operation over, and the store did not say what came of it; ask again with "
                "the same key.",
                digest=digest,
                retry_after=1.0,
            )
            lost.__cause__ = error
            return lost
        case Down(error):
            unavailable = errors.StoreUnavailable(
                f"{error.message if isinstance(error, errors.IdempotencyError) else error}",
                digest=digest,
                retry_after=1.0,
            )
            unavailable.__cause__ = error
            return unavailable
        case Foreign(fingerprint):
            return errors.Unreadable(
                f"The record's fingerprint was made by an algorithm ({fingerprint[:2].hex()}) that is not known here; "
                "it is neither run nor called a mismatch. Upgrade, or use the fingerprint option that made it.",
                digest=digest,
            )
        case _:
            raise TypeError(f"{conclusion!r} is no error")
