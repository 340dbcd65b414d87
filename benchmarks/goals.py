"""The goals, one row each: which ratio of which figure, and how much it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures.roundtrips import RoundTrips
from benchmarks.measure import Figure, Ratio

LAYERED = "ours, Redis"


@dataclass(frozen=True, slots=True)
class Goal:
    """`subject` over `base` in `figure` is to be at least `least`; `no_errors` forbids any error of ours besides.

    by_cpu: the ratio of processor time counts, not that of operations a second.
    """

    figure: str
    base: str
    least: float
    subject: str = "ours"
    no_errors: bool = False
    by_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    wanted: str
    measured: str
    passed: bool | None
    """None: not measured in this run."""

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "wanted": self.wanted, "measured": self.measured, "passed": self.passed}


GOALS = (
    Goal("http new 32", "ceiling", 0.95, LAYERED, no_errors=True),
    Goal("http new 32", "ceiling", 0.95, LAYERED, by_cpu=True),
    Goal("http replay 32", "ceiling", 0.9, LAYERED, no_errors=True),
    Goal("http new 256", "ceiling", 0.9, LAYERED, no_errors=True),
    Goal("http replay 256", "ceiling", 0.9, LAYERED, no_errors=True),
    Goal("http new 32", "ceiling, same endings", 0.95, LAYERED, by_cpu=True),
    Goal("http new 256", "ceiling, same endings", 0.95, LAYERED, by_cpu=True),
    Goal("http collector 32", "ceiling, tuned", 0.95, f"{LAYERED}, tuned"),
    Goal("http collector 32", "ceiling, same endings, tuned", 0.95, f"{LAYERED}, tuned"),
    Goal("http new 32", "idemkit", 2.0, LAYERED),
    Goal("http replay 32", "idemkit", 3.0, LAYERED),
    Goal("engine redis new 32", "bare coalesced script", 0.9),
    Goal("engine redis new 256", "bare coalesced script", 0.9),
    Goal("engine redis new 32", "plain calls", 4.0),
    Goal("engine redis new 256", "plain calls", 6.0),
    Goal("redis server new", "bare script", 0.8),
    Goal("redis server replay", "bare script", 0.75),
    Goal("engine postgres new 64", "one commit a claim", 6.0),
    Goal("engine postgres new 256", "one commit a claim", 9.0),
    Goal("engine sqlite new 32", "one commit a claim", 7.0),
    Goal("engine sqlite new 256", "one commit a claim", 10.0),
    Goal("engine redis new 1", "plain calls", 0.9),
    Goal("engine postgres new 1", "one commit a claim", 0.9),
    Goal("engine sqlite new 1", "one commit a claim", 0.9),
    Goal("inbox", "one a transaction, by hand", 25.0, no_errors=True),
    Goal("outbox relay", "lease loop", 0.9),
    Goal("outbox relay", "ours", 1.0, "ours, one key"),
    Goal("outbox enqueue", "hand-written", 0.9),
    Goal("phases", "fenced by hand", 0.9),
    Goal("outbox growth", "500 keys", 0.8, "100,000 keys"),
    Goal("outbox growth", "500 keys", 0.8, "100,000 keys, 1 million pending"),
    Goal("held transaction", "before", 0.8, "last ten seconds of the minute", no_errors=True),
)

# One round trip to claim and one to complete; one to replay.
ROUND_TRIPS = {
    "redis ours new": 2.0,
    "redis ours replay": 1.0,
    "postgres ours new": 2.0,
    "postgres ours replay": 1.0,
}


def judge(figures: Sequence[Figure], round_trips: Sequence[RoundTrips]) -> list[Verdict]:
    by_name = {figure.name: figure for figure in figures}
    trips_by_name = {counted.name: counted for counted in round_trips}
    verdicts = [_ratio_verdict(goal, by_name) for goal in GOALS]
    verdicts += [_trip_verdict(name, wanted, trips_by_name.get(name)) for name, wanted in ROUND_TRIPS.items()]
    return verdicts


def _ratio_verdict(goal: Goal, figures: Mapping[str, Figure]) -> Verdict:
    what = f"{goal.figure}: {goal.subject} / {goal.base}{', by CPU' if goal.by_cpu else ''}"
    wanted = f"≥ {goal.least:g}" + (", no error" if goal.no_errors else "")
    figure = figures.get(goal.figure)
    ratio: Ratio | None = figure.ratio(goal.subject, goal.base) if figure else None
    if figure is None or ratio is None:
        return Verdict(what, wanted, "not measured", None)
    errors = figure.errors(goal.subject)
    cpu = figure.cpu_ratio(goal.subject, goal.base)
    measured = str(ratio) + (f", by CPU {cpu:.2f}" if cpu else "") + (f", {errors} errors" if errors else "")
    reached = cpu if goal.by_cpu else ratio.middle
    if reached is None:
        return Verdict(what, wanted, "not measured", None)
    return Verdict(what, wanted, measured, reached >= goal.least and not errors)


def _trip_verdict(name: str, wanted: float, counted: RoundTrips | None) -> Verdict:
    what = f"round trips an operation: {name}"
    if counted is None:
        return Verdict(what, f"= {wanted:g}", "not measured", None)
    measured = f"{counted.round_trips:g} on the wire, {counted.server_count:g} {counted.counted}"
    return Verdict(what, f"= {wanted:g}", measured, max(counted.round_trips, counted.server_count) <= wanted)
