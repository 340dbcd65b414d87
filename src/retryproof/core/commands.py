"""What the protocol asks for, and what it is told: plain values between the state machine, the pumps and the stores.

A store sees the commands from `Claim` to `Checkpoint`, in batches, and answers each with one of the replies below.
Ids are 32 bytes, nonces 16; `token` is the fencing token; times are microseconds of the store's clock since the epoch;
durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from retryproof.core.value import value

if TYPE_CHECKING:
    from retryproof.core.hold import Hold
    from retryproof.core.record import Record

NOTHING: Mapping[str, bytes] = MappingProxyType({})


# Commands to a store


@value
class Claim:
    """Take the operation, or say why not. Repeated with the same nonce it gives the same answer (C3).

    fingerprint: at most 64 bytes; compared byte for byte.
    tenant: 16 bytes that name the tenant, or none; for purging.
    trace: the caller's trace context (W3C traceparent), or "".
    on_abandoned: what becomes of an attempt that died; `settle` is an operator's, who takes over whatever is known.
    alone: 2 when this process holds no other operation, 1 when it holds none that was taken over, else 0 (C15).
    """

    id: bytes
    fingerprint: bytes
    nonce: bytes
    lease: float
    retention: float
    unsettled_retention: float
    on_abandoned: Literal["rerun", "refuse", "settle"] = "rerun"
    max_attempts: int = 5
    tenant: bytes = b""
    trace: str = ""
    alone: int = 2


@value
class Complete:
    """Settle the operation with its result; None makes a tombstone: done, with nothing to replay.

    listed: it is in the completer's worklist, and is to be removed from it (T3).
    """

    id: bytes
    nonce: bytes
    token: int
    result: bytes | None
    listed: bool = False


@value
class Release:
    """Give the operation back: this attempt failed and said so, or nothing ran under it.

    settles: an operator says that no attempt had its effect, those included that ended unknown: attempts and deaths are
    counted from the start again (C12, C15).
    """

    id: bytes
    nonce: bytes
    token: int
    settles: bool = False


@value
class Renew:
    """Hold the operation for `lease` seconds from now; `alone` False says that its process runs others beside it."""

    id: bytes
    nonce: bytes
    token: int
    lease: float
    alone: bool = True


@value
class Checkpoint:
    """Keep a value under a name for later attempts; a name kept before is overwritten."""

    id: bytes
    nonce: bytes
    token: int
    name: str
    value: bytes


# Commands to the pump


@value
class Run:
    """Run the caller's work under this hold; answered with a WorkOutcome, or with NotBegun."""

    hold: Hold


@value
class Pause:
    """Wait; `waiting` says that a duplicate waits for the running attempt and may be refused or leave."""

    seconds: float
    waiting: bool = False


@value
class Look:
    """Read the record as it stands; answered with Found."""

    id: bytes


@value
class Disown:
    """Undo a claim whose answer was lost, in the background: its caller has gone."""

    claim: Claim


@value
class Linger:
    """Go on renewing and settling in the background until it is stored or fenced off (C10)."""

    hold: Hold
    last: Complete | Release


StoreCommand = Claim | Complete | Release | Renew | Checkpoint
Command = StoreCommand | Run | Pause | Look | Disown | Linger


# Replies to a claim


@value
class Acquired:
    """Held until the lease ends. `birth` is the nonce of the first claim ever; derived ids come from it (C13)."""

    token: int
    attempt: int
    first_seen: int
    birth: bytes
    checkpoints: Mapping[str, bytes] = field(default_factory=lambda: NOTHING)
    trace: str = ""


@value
class Running:
    """Somebody else holds it for `left` more seconds."""

    left: float


@value
class Finished:
    """Settled; result None is a tombstone. `stored` False: this process holds the result, for a store out of reach."""

    result: bytes | None
    attempt: int
    first_seen: int
    trace: str = ""
    stored: bool = True


@value
class Mismatch:
    """The record was made by other input, whose fingerprint this is."""

    fingerprint: bytes


@value
class Abandoned:
    """An attempt died and no other may run: `refused` by the policy, `poisoned` after too many, or `committed`.

    committed: its work was committed in the caller's transaction, and its result was not (T1).
    """

    reason: Literal["refused", "poisoned", "committed"]
    attempt: int


ClaimReply = Acquired | Running | Finished | Mismatch | Abandoned


# Replies to the fenced commands


@value
class Done:
    """It is stored."""


@value
class Lost:
    """Token or nonce are not current, or the operation is settled otherwise: nothing was changed."""


DONE = Done()
LOST = Lost()
FenceReply = Done | Lost


# Replies from the pump


@value
class Unreachable:
    """The store gave no answer; what was asked may have been done, unless `sent` says that it never left."""

    error: Exception
    sent: bool = True


@value
class Found:
    """The record as it stands, or None."""

    record: Record | None


@value
class Returned:
    """The work is done; its encoded result, or None for one that is not kept."""

    result: bytes | None


@value
class Committed:
    """The work is done, and its encoded result is stored: both were one commit in the caller's own transaction (T1)."""

    result: bytes | None


@value
class Raised:
    """The work failed; `unknown` says that its effect may have happened all the same."""

    unknown: bool = False


@value
class Cancelled:
    """The work was cancelled."""


@value
class Stopped:
    """The work was told to stop, by a shutdown or a time limit: whether it had its effect is not known.

    Like Cancelled, but never released, whatever the policy says of cancellation.
    """


@value
class LeaseLost:
    """The lease was lost while the work ran, and the work was cancelled."""


@value
class NotBegun:
    """The work was not called: in the step that was to call it, `hold.may_begin` said no (C6)."""


@value
class Paused:
    """The pause is over; `on` False says that there is no more waiting: too many wait, or the client has left."""

    on: bool = True


WorkOutcome = Returned | Committed | Raised | Cancelled | Stopped | LeaseLost
"""What came of the work."""

NOT_BEGUN = NotBegun()

Reply = ClaimReply | FenceReply | Unreachable | Found | WorkOutcome | NotBegun | Paused | None
