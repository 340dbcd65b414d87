"""What a twin is told whose operation this very process still holds, before its claim may leave (C10). Pure.

A claim that leaves while this process holds the operation can only do harm. Where the lease is live, the answer is
known. Where the store was out of reach for longer than a lease, or hung with the claim in its queue, the claim would
take over what this process still runs, or whose result it still holds. So the hold is heard first: what lingers is
settled, a lease that may be over is renewed; and the claim leaves when the store has said that the hold is no more.

    the hold           said first to the store    Done         Lost     no answer
    lease live         nothing                    (told Running without a word to the store)
    lease over         Renew                      Running      claim    Running: this process runs it, come what may
    result lingers     Complete                   claim        claim    Finished, from memory
    failure lingers    Release                    claim        claim    Unreachable: nothing was claimed

Other input is a Mismatch wherever the hold answers. Past `max_run` a hold that does not linger speaks no more (C6).
"""

from __future__ import annotations

from retryproof.core.commands import Claim, Complete, Finished, Mismatch, Release, Renew, Reply, Running, Unreachable
from retryproof.core.hold import Hold

Last = Complete | Release
"""What lingers: the command that settles an attempt, for which the store gave no answer yet."""


def first(hold: Hold, last: Last | None, now: float) -> Last | Renew | None:
    """What the store has to be told before a twin's claim may leave; None where `told` knows without it."""
    if last is not None:
        return last
    return None if now < hold.deadline or not hold.speaks else hold.renew()


def told(hold: Hold, last: Last | None, claim: Claim, heard: Reply, now: float) -> Reply:
    """What the twin is told; None: its claim may leave.

    heard: what the store said to `first`, or None where there was nothing to say.
    """
    if last is None:
        if not hold.speaks or (now >= hold.deadline and not isinstance(heard, Unreachable)):
            return None
        # Not Unreachable, which a route that fails open takes for leave to run it beside itself.
        answer: Reply = Running(max(0.0, hold.deadline - now))
    elif not isinstance(heard, Unreachable):
        return None
    elif isinstance(last, Complete):
        answer = Finished(last.result, hold.attempt, hold.first_seen, hold.trace, stored=False)
    else:
        answer = heard
    return answer if claim.fingerprint == hold.fingerprint else Mismatch(hold.fingerprint)
