"""What can go wrong, and what to do about it.

IdempotencyError
├── InProgress          the same operation is running elsewhere; try again after `retry_after` seconds
├── Mismatch            the key was used before, with other input; it never runs
├── OutcomeUnknown      an earlier attempt died and may have had its effect; an operator settles it
├── LeaseLost           another attempt took over; the result of this one is not recorded
├── StoreUnavailable    the store gave no answer; the message says whether anything was begun
├── InvalidKey          the key is missing, malformed or too weak
├── ResultOmitted       the operation is done and never runs again; its result was too large or could not be kept
├── Unreadable          a record written in a format that this version cannot read
├── NoOperation         the current operation was asked for outside an operation
└── ConfigurationError  an option or a use that cannot work; raised when it is given

Each error names the operation by its digest, says what happened and what to do, and can be pickled.
"""

from __future__ import annotations


class IdempotencyError(Exception):
    """The base of all errors; `digest` names the operation (16 hex digits), if it is known."""

    def __init__(self, message: str, *, digest: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.digest = digest
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        """What happened and what to do, without the digest."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} [operation {self.digest}]" if self.digest else self.message

    def __reduce__(self) -> tuple[object, ...]:
        state = {"digest": self.digest, "retry_after": self.retry_after}
        return type(self), (self.message,), state


class InProgress(IdempotencyError):
    """The same operation is running elsewhere; try again after `retry_after` seconds."""


class Mismatch(IdempotencyError):
    """The key was used before with other input."""


class OutcomeUnknown(IdempotencyError):
    """An attempt ended without saying whether it had its effect.

    If a handler raises it, alone or in an exception group, the record stays in progress, and `Policy.on_abandoned`
    decides. If something between the handler and Retryproof catches it, call `operation.outcome_unknown()`. A caller
    that gets it learns that the operation is refused until an operator settles it.
    """


class LeaseLost(IdempotencyError):
    """Another attempt took this operation over."""


class StoreUnavailable(IdempotencyError):
    """The store gave no answer in time; the message says whether anything was begun.

    If `run` raises it before the function begins, nothing was run. If a step, a phase or a commit raises it inside the
    function, the message says what is known. Try again with the same key, never with a new one.
    """


class InvalidKey(IdempotencyError):
    """The key is missing, malformed, or weaker than required."""


class ResultOmitted(IdempotencyError):
    """The operation is done, and its result was not kept."""


class Unreadable(IdempotencyError):
    """A record in a format that this version cannot read. It does not run, and does not count as a mismatch."""


class NoOperation(IdempotencyError):
    """There is no current operation here."""


class ConfigurationError(IdempotencyError):
    """An option or a use that cannot work."""
