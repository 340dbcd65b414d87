"""How long an operation may take, how long it is kept, and what happens after an attempt died."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from retryproof.core.errors import ConfigurationError

OnAbandoned = Literal["rerun", "refuse"]
OnLeaseLost = Literal["cancel", "continue"]

MAX_SECONDS = 100 * 365 * 86_400.0
"""A bound on every duration, so that a time in microseconds fits 64 bits in every store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The options of operations. Durations are seconds, sizes bytes. Values are checked when a policy is made.

    lease: how long a claim is held before it must be renewed. After that time, another attempt may take over from a
        dead holder.
    max_run: how long a lease is renewed.
    retention: how long a settled record is kept and replayed.
    unsettled_retention: how long a record without an outcome is kept.
    wait: how long a duplicate waits for the running attempt; with 0 it gets its answer at once.
    poll: how often a waiting duplicate looks.
    max_waiters: how many duplicates may wait at once in one engine; any more get their answer at once.
    on_abandoned: `rerun` repeats what a dead attempt did, except for what the caller's transaction, phases, steps or
        derived keys cover; `refuse` answers "outcome unknown" until an operator settles the operation.
    max_attempts: how many attempts may die alone; then the operation is refused as poison.
    unknown_on: exceptions after which nobody knows whether the effect happened, such as a read time-out of a payment.
        If the work raises one, the record stays in progress, as after `errors.OutcomeUnknown`.
    release_on_cancel: whether a cancelled function may run again at once; its effect may have happened.
    on_lease_lost: whether a handler whose lease was lost is cancelled.
    max_result: a larger result is not stored; a replay says that it was omitted.
    complete_timeout: how long to retry storing a result before the caller gets it unstored.
    store_timeout: how long one call of the store may take.
    max_unstored: bytes of results that an opened store may keep while the store itself is out of reach; above that, no
        new operation begins. The policy of the first engine that opens the store counts.
    """

    lease: float = 10.0
    max_run: float = 900.0
    retention: float = 86_400.0
    unsettled_retention: float = 2_592_000.0
    wait: float = 0.0
    poll: float = 0.1
    max_waiters: int = 1_000
    on_abandoned: OnAbandoned = "rerun"
    max_attempts: int = 5
    unknown_on: tuple[type[BaseException], ...] = ()
    release_on_cancel: bool = False
    on_lease_lost: OnLeaseLost = "cancel"
    max_result: int = 1_048_576
    complete_timeout: float = 5.0
    store_timeout: float = 2.0
    max_unstored: int = 67_108_864

    def __post_init__(self) -> None:
        for name in ("lease", "max_run", "retention", "unsettled_retention", "poll", "store_timeout"):
            _check_seconds(name, getattr(self, name), zero=False)
        for name in ("wait", "complete_timeout"):
            _check_seconds(name, getattr(self, name), zero=True)
        for name, least in (("max_waiters", 0), ("max_attempts", 1), ("max_result", 0), ("max_unstored", 0)):
            _check_count(name, getattr(self, name), least)
        _check_exceptions("unknown_on", self.unknown_on)
        _check_choice("on_abandoned", self.on_abandoned, get_args(OnAbandoned))
        _check_choice("on_lease_lost", self.on_lease_lost, get_args(OnLeaseLost))
        if self.lease < 0.01:
            raise ConfigurationError(f"Policy(lease={self.lease}) is under 10 ms, too short to renew; give more.")
        if self.lease > self.retention:
            raise ConfigurationError(
                f"Policy(lease={self.lease}, retention={self.retention}): a record must outlive the lease; "
                "raise retention or shorten the lease."
            )
        if self.lease > self.unsettled_retention:
            raise ConfigurationError(
                f"Policy(lease={self.lease}, unsettled_retention={self.unsettled_retention}): a record must outlive "
                "the lease; raise unsettled_retention."
            )
        if self.max_run > self.unsettled_retention:
            raise ConfigurationError(
                f"Policy(max_run={self.max_run}, unsettled_retention={self.unsettled_retention}): an attempt that "
                "still runs must not be reaped; raise unsettled_retention or shorten max_run."
            )
        if self.lease > self.max_run:
            raise ConfigurationError(
                f"Policy(lease={self.lease}, max_run={self.max_run}): max_run bounds how long a lease is renewed and "
                "must not be shorter than one lease."
            )


def _check_seconds(name: str, value: object, *, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigurationError(f"Policy({name}={value!r}) must be a number of seconds.")
    if value < 0 or (value == 0 and not zero):
        raise ConfigurationError(f"Policy({name}={value!r}) must be {'zero or more' if zero else 'more than zero'}.")
    if value > MAX_SECONDS:
        raise ConfigurationError(f"Policy({name}={value!r}) must be a hundred years at most.")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"Policy({name}={value!r}) must be a whole number, {least} or more.")


def _check_exceptions(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(
        isinstance(one, type) and issubclass(one, BaseException) for one in value
    ):
        raise ConfigurationError(
            f"Policy({name}={value!r}) must be a tuple of exception types, such as (TimeoutError,)."
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"Policy({name}={value!r}) must be one of {', '.join(map(repr, choices))}.")
