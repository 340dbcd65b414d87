"""What the explorer is run on: few callers each, chosen so that together they take every entry of the table."""

from tests.interleavings.callers import Caller, policy
from tests.interleavings.explorer import Scenario

TWICE = tuple(Caller(name) for name in "AB")
REFUSE = tuple(Caller(name, policy(on_abandoned="refuse")) for name in "AB")
BRIEF = policy(complete_timeout=0.0)
BRIEFLY = tuple(Caller(name, BRIEF) for name in "AB")
WAITING = policy(complete_timeout=0.0, wait=10.0)

PAIRS: dict[str, Scenario] = {
    "the same request twice": Scenario(TWICE, faults=1, lapses=1),
    "past two leases": Scenario(TWICE, faults=0, lapses=2),
    "in one process, with a store out of reach": Scenario(BRIEFLY, faults=2, lapses=1, together=True),
    "with steps and renewals": Scenario(TWICE, faults=0, lapses=1, steps=2, renewals=True),
    "a step whose reply is lost": Scenario(TWICE, faults=1, lapses=1, steps=1),
    "in the caller's own transaction": Scenario(TWICE, faults=1, lapses=1, commits=True),
    "past the retention": Scenario(TWICE, faults=1, lapses=0, expiries=1),
    "a store that loses the record": Scenario(TWICE, faults=0, lapses=1, losses=1),
    "a policy that refuses": Scenario(REFUSE, faults=1, lapses=1),
    "one that waits": Scenario((Caller("A"), Caller("B", policy(wait=10.0))), faults=0, lapses=1),
    "one that refuses beside others": Scenario(
        (*TWICE, Caller("C", policy(on_abandoned="refuse"))), faults=0, lapses=1
    ),
    "a claim without an answer": Scenario(TWICE, faults=2, lapses=1),
    "one released when cancelled": Scenario(
        (Caller("A", policy(release_on_cancel=True)), Caller("B")), faults=1, lapses=1
    ),
    "other input": Scenario((Caller("A"), Caller("B", fingerprint=b"\1\1other")), faults=1, lapses=1),
    "input of an earlier version": Scenario(
        (Caller("A"), Caller("B", fingerprint=b"\1\2new", known=(b"\1\1same",))), faults=1, lapses=1
    ),
    "other input of an earlier version": Scenario(
        (Caller("A"), Caller("B", fingerprint=b"\1\2new", known=(b"\1\1other",))), faults=0, lapses=1
    ),
    "input of an unknown version": Scenario((Caller("A"), Caller("B", fingerprint=b"\1\2new")), faults=1, lapses=0),
    "no input beside some": Scenario((Caller("A"), Caller("B", fingerprint=b"")), faults=0, lapses=1),
}
"""Two callers, or three to whom little happens: seconds."""

TRIOS: dict[str, Scenario] = {
    "the same request three times": Scenario((*TWICE, Caller("C")), faults=1, lapses=1),
    "past two leases": Scenario((*TWICE, Caller("C")), faults=0, lapses=2),
    "past the retention": Scenario((*TWICE, Caller("C")), faults=0, lapses=0, expiries=1),
    "policies that refuse": Scenario((*REFUSE, Caller("C", policy(on_abandoned="refuse"))), faults=1, lapses=1),
    "one with other input": Scenario((*TWICE, Caller("C", fingerprint=b"\1\1other")), faults=1, lapses=1),
    "one that waits": Scenario((*TWICE, Caller("C", policy(wait=10.0))), faults=0, lapses=1),
    "two that wait, and a late claim": Scenario(
        (Caller("A", BRIEF), Caller("B", WAITING), Caller("C", WAITING)), faults=1, lapses=0
    ),
    "two with steps, past two leases": Scenario(TWICE, faults=0, lapses=2, steps=2, renewals=True),
    "two with steps, and one fault": Scenario(TWICE, faults=1, lapses=1, steps=2, renewals=True),
    "two, two faults": Scenario(TWICE, faults=2, lapses=1),
}
"""Three callers, or two to whom more happens: two minutes or so on one core."""
