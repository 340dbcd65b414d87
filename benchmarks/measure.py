"""How a figure is taken: subjects in turn, several times over, and ratios between neighbours in time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One short run of one subject."""

    operations: int
    seconds: float
    cpu_seconds: float
    errors: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def cpu_microseconds(self) -> float:
        """Processor time of the measured process for one operation: steadier than throughput on a shared machine."""
        return 1e6 * self.cpu_seconds / self.operations if self.operations else 0.0


Run = Callable[[float], Awaitable[Sample]]
"""Takes the seconds it should last."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The samples of all subjects of one comparison, in the order they were taken."""

    name: str
    method: str
    samples: Mapping[str, list[Sample]]
    notes: tuple[str, ...] = ()

    def ratio(self, subject: str, base: str) -> Ratio | None:
        """The median of the ratios within each repetition, so that a slow minute slows both sides."""
        if subject not in self.samples or base not in self.samples:
            return None
        pairs = zip(self.samples[subject], self.samples[base], strict=True)
        ratios = [a.per_second / b.per_second for a, b in pairs if b.per_second]
        return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None

    def cpu_ratio(self, subject: str, base: str) -> float | None:
        """The same by processor time an operation: what the ratio would be if nothing else disturbed either."""
        if subject not in self.samples or base not in self.samples:
            return None
        pairs = zip(self.samples[subject], self.samples[base], strict=True)
        ratios = [b.cpu_microseconds / a.cpu_microseconds for a, b in pairs if a.cpu_microseconds]
        return median(ratios) if ratios else None

    def errors(self, subject: str) -> int:
        return sum(sample.errors for sample in self.samples.get(subject, ()))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "notes": list(self.notes),
            "subjects": {name: _summary(samples) for name, samples in self.samples.items()},
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f}–{self.high:.2f})"


def _summary(samples: list[Sample]) -> dict[str, Any]:
    return {
        "per_second": round(median(sample.per_second for sample in samples), 1),
        "per_second_samples": [round(sample.per_second, 1) for sample in samples],
        "cpu_microseconds": round(median(sample.cpu_microseconds for sample in samples), 1),
        "operations": sum(sample.operations for sample in samples),
        "errors": sum(sample.errors for sample in samples),
        "details": dict(samples[-1].details),
    }


@dataclass(slots=True)
class Pace:
    """How long and how often to measure, and when to stop for good.

    Many short samples rather than a few long ones: on a shared machine a disturbance lasts seconds, and then spoils
    a few repetitions of all subjects instead of all repetitions of one.
    """

    seconds: float
    repetitions: int
    deadline: float

    @classmethod
    def of(cls, quick: bool, limit: float) -> Pace:
        deadline = time.monotonic() + limit
        return cls(0.4, 3, deadline) if quick else cls(0.5, 7, deadline)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline


class OutOfTime(Exception):
    """The run's own limit has passed before the figure had one repetition."""


async def interleave(
    name: str, method: str, runs: Mapping[str, Run], pace: Pace, notes: tuple[str, ...] = ()
) -> Figure:
    """A/B/C/A/B/C…: after one short warm-up of each; stops early, after a whole repetition, at the run's limit."""
    samples: dict[str, list[Sample]] = {subject: [] for subject in runs}
    if pace.over:
        raise OutOfTime(name)
    for run in runs.values():
        await run(pace.seconds / 4)
    for repetition in range(pace.repetitions):
        if repetition and pace.over:
            notes += (f"stopped after {repetition} of {pace.repetitions} repetitions: the run's limit has passed",)
            break
        for subject, run in runs.items():
            samples[subject].append(await run(pace.seconds))
    return Figure(name, method, samples, notes)
