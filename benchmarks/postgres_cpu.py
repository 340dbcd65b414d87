#!/usr/bin/env python3
"""Processor time of an operation on PostgreSQL, of the client and of the server apart, beside what is written by hand.

One commit a claim, the same in bare batches, and ours, from new keys, in turns in one process; each figure is the
median of the turns, with the least in brackets. Where other programs take turns on the machine, processor time grows as
well (cold caches), so compare within a run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from statistics import median

import uvloop

if __name__ == "__main__":  # the package benchmarks, not the files in it, is what may be imported
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.ceilings.postgres import BareBatches, PlainPostgres
from benchmarks.figures.engine import PLAIN_POSTGRES_CONNECTIONS, EngineSubject, Ours, prepare, together
from benchmarks.services import Services


def server_seconds(postmaster: int) -> float:
    """Processor time of a server and of its children that live. Linux only."""
    nanoseconds = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if postmaster in (parent, int(folder.name)):
                nanoseconds += int((folder / "schedstat").read_text().split()[0])
        except OSError:  # it has ended
            continue
    return nanoseconds / 1e9


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each turn")
    options = parser.parse_args()
    numbers = itertools.count()
    with Services() as services:
        url = services.url("postgres")
        await prepare(url)
        subjects: list[EngineSubject] = [
            PlainPostgres(url, min(options.tasks, PLAIN_POSTGRES_CONNECTIONS)),
            BareBatches(url),
            Ours(url),
        ]
        for subject in subjects:
            await subject.open()
        taken: dict[str, list[tuple[float, float, float]]] = {subject.name: [] for subject in subjects}
        for turn, subject in itertools.product(range(options.turns + 1), subjects):
            before = server_seconds(services.pid("postgres"))
            sample = await together(
                subject, options.tasks, options.seconds, lambda: f"cpu-{next(numbers)}", replayed=False
            )
            if sample.errors:
                raise RuntimeError(f"{subject.name}: {sample.details}")
            spent = 1e6 * (server_seconds(services.pid("postgres")) - before) / sample.operations
            if turn:  # the first fills caches
                taken[subject.name].append((sample.cpu_microseconds, spent, sample.per_second))
        for subject in subjects:
            await subject.close()
    plain = taken[PlainPostgres.name]
    for name, turns in taken.items():
        client, server, speed = zip(*turns, strict=True)
        fewer = [median(one[side] / other[side] for one, other in zip(plain, turns, strict=True)) for side in (0, 1)]
        print(
            f"{name:20} client {median(client):6.1f} ({min(client):6.1f}) µs, {fewer[0]:5.2f} times less;"
            f" server {median(server):6.1f} ({min(server):6.1f}) µs, {fewer[1]:5.2f} times less; {median(speed):8.0f}/s"
        )


if __name__ == "__main__":
    uvloop.run(main())
