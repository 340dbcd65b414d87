"""What a live attempt holds: shared by the flow, the renewer and the operation that a handler sees."""

from __future__ import annotations

from collections.abc import Callable

from retryproof.core.commands import Acquired, Checkpoint, Claim, Complete, Release, Renew


class Hold:
    """One attempt's claim. Times are the pump's monotonic seconds, counted from before the claim was sent (C6)."""

    __slots__ = (
        "attempt",
        "birth",
        "checkpoints",
        "deadline",
        "first_seen",
        "id",
        "lease",
        "lost",
        "max_run",
        "nonce",
        "on_lost",
        "on_overrun",
        "on_settled",
        "since",
        "token",
        "trace",
    )

    def __init__(self, claim: Claim, acquired: Acquired, since: float, max_run: float = float("inf")) -> None:
        self.id = claim.id
        self.nonce = claim.nonce
        self.token = acquired.token
        self.attempt = acquired.attempt
        self.first_seen = acquired.first_seen
        self.birth = acquired.birth
        self.checkpoints = dict(acquired.checkpoints)
        self.trace = acquired.trace
        self.lease = claim.lease
        self.since = since
        self.deadline = since + claim.lease
        self.lost = False
        self.max_run = max_run
        self.on_lost: Callable[[], None] | None = None
        """Called once, from the keeper's thread, when another attempt took over."""
        self.on_overrun: Callable[[], None] | None = None
        """Called once, from the keeper's thread, when renewal ends at `max_run`."""
        self.on_settled: Callable[[bool], None] | None = None
        """Called from the keeper's thread when what lingered was stored (True) or fenced off (False)."""

    def complete(self, result: bytes | None) -> Complete:
        """The command that settles this attempt."""
        return Complete(self.id, self.nonce, self.token, result)

    def release(self) -> Release:
        """The command that gives this attempt back."""
        return Release(self.id, self.nonce, self.token)

    def renew(self, *, alone: bool = True) -> Renew:
        """The command that extends this attempt's lease."""
        return Renew(self.id, self.nonce, self.token, self.lease, alone)

    def checkpoint(self, name: str, value: bytes) -> Checkpoint:
        """The command that keeps a step's result."""
        return Checkpoint(self.id, self.nonce, self.token, name, value)

    def renewed(self, sent: float) -> None:
        """Count the lease from when the renewal was sent."""
        self.deadline = max(self.deadline, sent + self.lease)

    def lose(self) -> None:
        """Remember that another attempt took over, and tell whoever runs this one. Called once or more."""
        first, self.lost = not self.lost, True
        if first and self.on_lost is not None:
            self.on_lost()
