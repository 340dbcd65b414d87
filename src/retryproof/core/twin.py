"""The answer to a twin whose operation this process still holds, before its claim is sent (C10). Pure.

If this process holds an operation, a claim of it can only do harm. If the lease is live, the answer is known. If the
store was out of reach for longer than a lease, or hung with the claim in its queue, the claim would take over an
operation that this process still runs, or whose result it still has. So the store is asked about the hold first: a
result or failure that waits for the store is settled, and a lease that may be over is renewed. The claim is sent when
the store has answered that this process does not hold the operation any more.

    the hold           sent to the store first    Done         Lost     no answer
    lease live         nothing                    (the twin gets Running without asking the store)
    lease over         Renew                      Running      claim    Running: this process still runs it
    result waits       Complete                   claim        claim    Finished, from memory
    failure waits      Release                    claim        claim    Unreachable: nothing was claimed

If the hold answers and the input differs, the answer is Mismatch. After `max_run`, a hold without a waiting result or
failure does not answer any more (C6).
"""

from __future__ import annotations

from retryproof.core.commands import Claim, Complete, Finished, Mismatch, Release, Renew, Reply, Running, Unreachable
from retryproof.core.hold import Hold

Last = Complete | Release
"""The command that settles an attempt and still waits for the store's answer."""


def first(hold: Hold, last: Last | None, now: float) -> Last | Renew | None:
    """The command to send before a twin's claim may be sent; None if `told` decides without it."""
    if last is not None:
        return last
    return None if now < hold.deadline or not hold.speaks else hold.renew()


def told(hold: Hold, last: Last | None, claim: Claim, heard: Reply, now: float) -> Reply:
    """The answer to the twin; None: its claim may be sent.

    heard: the store's answer to `first`, or None if there was no command.
    """
    if last is None:
        if not hold.speaks or (now >= hold.deadline and not isinstance(heard, Unreachable)):
            return None
        # Not Unreachable: after that, a route that fails open would run the operation beside the running one.
        answer: Reply = Running(max(0.0, hold.deadline - now))
    elif not isinstance(heard, Unreachable):
        return None
    elif isinstance(last, Complete):
        answer = Finished(last.result, hold.attempt, hold.first_seen, hold.trace, stored=False)
    else:
        answer = heard
    return answer if claim.fingerprint == hold.fingerprint else Mismatch(hold.fingerprint)
