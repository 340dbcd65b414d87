"""Commands and replies: plain values between the state machine, the code that performs commands, and the stores.

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
    """Take the operation, or say why not. A repeated claim with the same nonce gets the same answer (C3).

    fingerprint: at most 64 bytes; compared byte for byte.
    tenant: 16 bytes that name the tenant, or none; for purging.
    trace: the caller's trace context (W3C traceparent), or "".
    on_abandoned: what happens after an attempt died; `settle` is for an operator, who takes over in any state.
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
    """Settle the operation with its result. None makes a tombstone: it is done, and there is nothing to replay.

    listed: it is in the completer's worklist, and this command has to remove it (T3).
    """

    id: bytes
    nonce: bytes
    token: int
    result: bytes | None
    listed: bool = False


@value
class Release:
    """Release the operation: this attempt failed and said so, or it ran nothing.

    settles: an operator says that no attempt had its effect, including attempts that ended unknown. Attempts and deaths
    are counted from the start again (C12, C15).
    """

    id: bytes
    nonce: bytes
    token: int
    settles: bool = False


@value
class Renew:
    """Hold the operation for `lease` seconds from now; `alone` is False if its process runs other operations too."""

    id: bytes
    nonce: bytes
    token: int
    lease: float
    alone: bool = True


@value
class Checkpoint:
    """Store a value under a name for later attempts; a value with the same name is replaced."""

    id: bytes
    nonce: bytes
    token: int
    name: str
    value: bytes


# Commands to the pump, which performs them for the state machine


@value
class Run:
    """Run the caller's work under this hold. The reply is a WorkOutcome, or NotBegun."""

    hold: Hold


@value
class Pause:
    """Wait. `waiting`: a duplicate waits for the running attempt, and may be refused or leave."""

    seconds: float
    waiting: bool = False


@value
class Look:
    """Read the record as it is now. The reply is Found."""

    id: bytes


@value
class Disown:
    """Release a claim whose answer was lost, in the background, because its caller has gone."""

    claim: Claim


@value
class Linger:
    """Continue to renew and settle in the background until the result is stored or fenced off (C10)."""

    hold: Hold
    last: Complete | Release


StoreCommand = Claim | Complete | Release | Renew | Checkpoint
Command = StoreCommand | Run | Pause | Look | Disown | Linger


# Replies to a claim


@value
class Acquired:
    """Held until the lease ends. `birth` is the nonce of the very first claim; derived ids come from it (C13)."""

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
    """Settled; result None is a tombstone. `stored` False: only this process has the result, as the store is down."""

    result: bytes | None
    attempt: int
    first_seen: int
    trace: str = ""
    stored: bool = True


@value
class Mismatch:
    """The record has another input, with this fingerprint."""

    fingerprint: bytes


@value
class Abandoned:
    """An attempt died and no other may run: `refused` by the policy, `poisoned` after too many deaths, or `committed`.

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
    """Token or nonce is not current, or the operation was settled in another way: nothing was changed."""


DONE = Done()
LOST = Lost()
FenceReply = Done | Lost


# Replies from the pump


@value
class Unreachable:
    """The store gave no answer. The command may have been done, unless `sent` is False: then it was never sent."""

    error: Exception
    sent: bool = True


@value
class Found:
    """The record as it is now, or None."""

    record: Record | None


@value
class Returned:
    """The work is done, with its encoded result, or None for a result that is not kept."""

    result: bytes | None


@value
class Committed:
    """The work is done, and its encoded result is stored: both were one commit in the caller's own transaction (T1)."""

    result: bytes | None


@value
class Raised:
    """The work failed; `unknown`: its effect may have happened all the same."""

    unknown: bool = False


@value
class Cancelled:
    """The work was cancelled."""


@value
class Stopped:
    """A shutdown or a time limit stopped the work: nobody knows whether it had its effect.

    Like Cancelled, but it is never released, whatever the policy says about cancellation.
    """


@value
class LeaseLost:
    """The lease was lost while the work ran, and the work was cancelled."""


@value
class NotBegun:
    """The work was not called, because `hold.may_begin` said no in the step that should call it (C6)."""


@value
class Paused:
    """The pause is over. `on` False: stop waiting, because too many callers wait or the client has left."""

    on: bool = True


WorkOutcome = Returned | Committed | Raised | Cancelled | Stopped | LeaseLost
"""How the work ended."""

NOT_BEGUN = NotBegun()

Reply = ClaimReply | FenceReply | Unreachable | Found | WorkOutcome | NotBegun | Paused | None
