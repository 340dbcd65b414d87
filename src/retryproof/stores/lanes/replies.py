"""The replies of all coalescers to their callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from retryproof.core.commands import Acquired, Claim, Finished, Mismatch, Reply, Running, Unreachable
from retryproof.core.errors import IdempotencyError, StoreUnavailable

MAX_WAITING = 10_000
"""How many commands of a kind may wait for a slow store; any more are refused at once."""

Orphaned = Callable[[Claim, Reply], None]
"""Called with a claim that nobody waits for, and its answer, or None if there was none."""
Heard = Callable[[], None]
"""Called when the store has answered a batch."""
clock = time.monotonic


def overdue(name: str, timeout: float, *, sent: bool) -> Unreachable:
    """The store did not answer in time; or the command was not sent in time, and never will be."""
    return Unreachable(StoreUnavailable(f"The {name} store did not answer within {timeout:g} s; try again."), sent)


def overfull(name: str) -> Unreachable:
    """Too much is waiting for the store."""
    return Unreachable(StoreUnavailable(f"Too many operations wait for the {name} store; try again later."), sent=False)


def interrupted(name: str) -> Unreachable:
    """The call was aborted; the command may have been done."""
    return Unreachable(StoreUnavailable(f"A call of the {name} store was interrupted; try again."))


def is_orphan(command: object, reply: Reply) -> bool:
    """Whether this is a claim that was or may have been applied, and whose cancelled caller got no answer.

    A caller that learnt of a time-out does not count: it asks again with the same nonce, or disowns the claim itself.
    """
    if isinstance(reply, Unreachable):
        return reply.sent and isinstance(command, Claim)
    return isinstance(reply, Acquired) and isinstance(command, Claim)


def not_heard() -> None:
    """Do nothing when the store has answered."""


def as_reply(name: str, answer: Any) -> Reply:
    """A store's answer as a reply: an exception means that it gave none."""
    if not isinstance(answer, Exception):
        reply: Reply = answer
        return reply
    if isinstance(answer, IdempotencyError):
        return Unreachable(answer)
    error = StoreUnavailable(f"The {name} store failed ({type(answer).__name__}); try again.")
    error.__cause__ = answer
    return Unreachable(error)


def as_replies(name: str, answers: Sequence[Any]) -> Sequence[Reply]:
    """`as_reply` of each of a batch, where there is nearly never an exception."""
    if not any(issubclass(kind, Exception) for kind in set(map(type, answers))):
        return answers
    return [as_reply(name, answer) for answer in answers]


def twin_reply(reply: Reply, lease: float) -> Reply | None:
    """The answer to a twin of a claim with this answer; None: the twin must ask for itself."""
    match reply:
        case Acquired():
            return Running(lease)
        case Running() | Finished() | Mismatch():
            return reply
        case _:
            return None


def are_twins(one: object, other: object) -> bool:
    """Whether two commands for one id are claims of the same input, so that one answer decides both."""
    return isinstance(one, Claim) and isinstance(other, Claim) and one.fingerprint == other.fingerprint
