"""The claim of a live attempt, which the flow, the renewer and the handler's operation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from retryproof.core.commands import Acquired, Checkpoint, Claim, Complete, Release, Renew

NEVER = float("inf")


class Hold:
    """One attempt's claim. Times are the pump's monotonic seconds (C6).

    since: a time before the claim was first sent; the lease is counted from it. end: when renewal ends.
    where: the endpoint or function, for events.
    listed: the operation is in the completer's worklist.
    on_lost: called once, from the keeper's thread, when another attempt took over.
    on_overrun: called once, from the keeper's thread, when renewal ends at `max_run`.
    on_settled: called from the keeper's thread when a result that waited was stored (True) or fenced off (False).
    stops: when renewal ends; nothing extends the lease afterwards.
    refuses: why the operation takes no transaction any more, "" while it does. Looked at by all that take one.
    due, end, demoted, lingers: the keeper's notes.
    """

    __slots__ = (
        "attempt",
        "birth",
        "checkpoints",
        "deadline",
        "demoted",
        "due",
        "end",
        "fingerprint",
        "first_seen",
        "id",
        "lease",
        "lingers",
        "listed",
        "lost",
        "nonce",
        "on_lost",
        "on_overrun",
        "on_settled",
        "refuses",
        "stops",
        "token",
        "trace",
        "where",
    )

    RENEW_AT = 1 / 3
    """A lease is renewed after this part of it."""

    def __init__(self, claim: Claim, acquired: Acquired, since: float, end: float = float("inf")) -> None:
        self.id = claim.id
        self.fingerprint = claim.fingerprint
        self.nonce = claim.nonce
        self.token = acquired.token
        self.attempt = acquired.attempt
        self.first_seen = acquired.first_seen
        self.birth = acquired.birth
        self.checkpoints: Mapping[str, bytes] = acquired.checkpoints
        self.trace = acquired.trace
        self.lease = lease = claim.lease
        self.deadline = since + lease
        self.lost = False
        self.listed = False
        self.where = self.refuses = ""
        self.on_lost: Callable[[], None] | None = None
        self.on_overrun: Callable[[Hold], None] | None = None
        self.on_settled: Callable[[Hold, bool], None] | None = None
        self.due = since + lease * self.RENEW_AT
        self.stops = self.end = end
        self.demoted = False
        self.lingers = False

    @property
    def speaks(self) -> bool:
        """Whether the lease is still renewed: it is not lost, and `max_run` is not over."""
        return not self.lost and self.due < NEVER

    def complete(self, result: bytes | None) -> Complete:
        """The command that settles this attempt."""
        return Complete(self.id, self.nonce, self.token, result, self.listed)

    def release(self) -> Release:
        """The command that releases this attempt's claim."""
        return Release(self.id, self.nonce, self.token)

    def renew(self, *, alone: bool = True) -> Renew:
        """The command that extends this attempt's lease."""
        return Renew(self.id, self.nonce, self.token, self.lease, alone)

    def checkpoint(self, name: str, value: bytes) -> Checkpoint:
        """The command that stores a step's result."""
        return Checkpoint(self.id, self.nonce, self.token, name, value)

    def may_begin(self, now: float) -> bool:
        """Whether work may begin under this hold: the lease is not lost, and not over by our own count (C6).

        This is checked in the same step that calls the work. A task may start late, and the answer to a claim may come
        after its lease.
        """
        return now < self.deadline and not self.lost

    def renewed(self, sent: float) -> None:
        """Count the lease from when the renewal was sent."""
        self.deadline = max(self.deadline, sent + self.lease)
        self.due = sent + self.lease * self.RENEW_AT

    def lose(self) -> None:
        """Remember that another attempt took over, and tell the code that runs this one. May be called repeatedly."""
        first, self.lost = not self.lost, True
        on_lost = self.on_lost  # read once: when the attempt ends, it removes this in another thread
        if first and on_lost is not None:
            on_lost()
