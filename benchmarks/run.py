#!/usr/bin/env python3
"""Takes every figure, prints the tables and writes benchmarks/results/latest.json.

Exit status: 0, also where a goal is missed (a figure is not a test); 1 with --strict where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The package benchmarks, not the files in it, is what may be imported.
sys.path[0] = str(ROOT)

import uvloop  # noqa: E402 - the path above has to come first

from benchmarks import goals, report  # noqa: E402
from benchmarks.figures import asgi, beside, engine, growth, http, inbox, outbox, phases, records, roundtrips  # noqa: E402
from benchmarks.figures.http import HttpSubject  # noqa: E402
from benchmarks.measure import Figure, OutOfTime, Pace  # noqa: E402
from benchmarks.peers import PEERS, PeerMissing, peer_python  # noqa: E402
from benchmarks.services import Services  # noqa: E402

FAMILIES = (
    "http",
    "collector",
    "asgi",
    "engine",
    "threads",
    "inbox",
    "outbox",
    "phases",
    "beside",
    "growth",
    "held",
    "records",
    "roundtrips",
)
ON_POSTGRES = {
    "inbox": inbox.figures,
    "outbox": outbox.figures,
    "phases": phases.figures,
    "growth": growth.figures,
    "held": growth.held_figures,
    "beside": beside.figures,
}
LIMIT_SECONDS = 960.0
# What HTTP may take of the limit; the engines have the rest.
HTTP_SHARE = 0.38
RESULTS = Path(__file__).parent / "results"


def http_subjects(services: Services, stores: list[str], *, ours: bool, peers: bool) -> list[HttpSubject]:
    redis = services.url("redis")
    subjects = [HttpSubject("no layer", "none"), HttpSubject("ceiling", "ceiling", redis)]
    subjects.append(HttpSubject("ceiling, same endings", "ceiling-in-last-send", redis))
    if ours:
        urls = {"memory": "memory://", "sqlite": f"sqlite:///{services.sqlite_path('http.db')}", "redis": redis}
        names = {"memory": "ours, memory", "sqlite": "ours, SQLite", "redis": goals.LAYERED}
        if "postgres" in stores:
            urls["postgres"], names["postgres"] = services.url("postgres"), "ours, PostgreSQL"
        subjects += [HttpSubject(names[store], "ours", urls[store]) for store in stores]
    for peer in PEERS if peers else ():
        try:
            subjects.append(HttpSubject(peer, peer, redis, peer_python(peer)))
        except PeerMissing as error:
            print(f"  {error}", file=sys.stderr)
    return subjects


async def take(options: argparse.Namespace, services: Services) -> tuple[list[Figure], list[roundtrips.RoundTrips]]:
    began = time.monotonic()
    figures: list[Figure] = []
    trips: list[roundtrips.RoundTrips] = []
    ours, stores = options.ours, options.stores
    if ours and "postgres" in stores:
        await engine.prepare(services.url("postgres"))
    if "roundtrips" in options.only:
        trips += await roundtrips.redis_round_trips(services, ours=ours) if "redis" in stores else []
        trips += await roundtrips.postgres_round_trips(services, ours=ours) if "postgres" in stores else []
    if "asgi" in options.only:
        subjects = http_subjects(services, stores, ours=ours, peers=False)
        figures += await asgi.figures(subjects, Pace.of(options.quick, options.limit))
    if "http" in options.only:
        share = HTTP_SHARE if "engine" in options.only else 1.0
        pace = Pace.of(options.quick, options.limit * share)
        subjects = http_subjects(services, stores, ours=ours, peers=options.peers)
        figures += await http.figures(subjects, pace, options.connections)
    pace = Pace.of(options.quick, options.limit - (time.monotonic() - began))
    if "collector" in options.only and "redis" in stores:
        subjects = http_subjects(services, ["redis"], ours=ours, peers=False)
        figures += await http.collector_figures(subjects, pace)
    if "engine" in options.only:
        for store in stores:
            figures += await engine.STORES[store](services, pace, ours=ours)
    if "records" in options.only and "redis" in stores:
        figures += await records.figures(services, pace, ours=ours)
    if "threads" in options.only and "sqlite" in stores:
        figures += await engine.thread_figures(services, pace, ours=ours)
    for name, family in ON_POSTGRES.items():
        if name in options.only and ours and "postgres" in stores and (options.peers or name != "beside"):
            pace = Pace.of(options.quick, options.limit - (time.monotonic() - began))
            try:
                figures += await family(services, pace)
            except OutOfTime:
                print(f"  {name}: left out, the run's limit has passed", file=sys.stderr)
    return figures, trips


def listed(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of these."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(allowed)}")
        return words

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stores = tuple(engine.STORES)
    parser.add_argument("--only", type=listed(FAMILIES), default=list(FAMILIES), metavar=",".join(FAMILIES))
    parser.add_argument("--stores", type=listed(stores), default=list(stores), metavar=",".join(stores))
    parser.add_argument("--connections", default=http.CONNECTIONS, metavar="32,256,1",
                        type=lambda text: tuple(int(word) for word in text.split(",")))  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="shorter samples, three repetitions instead of five")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave all peers out")
    parser.add_argument("--no-ours", dest="ours", action="store_false", help="measure the ceilings and the peers alone")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds after which nothing more is begun")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a measured goal is missed")
    parser.add_argument("--output", type=Path, default=RESULTS / "latest.json")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    with Services() as services:
        figures, trips = uvloop.run(take(options, services))
        about = report.environment(services.versions())
    verdicts = goals.judge(figures, trips)
    report.show(figures, trips, verdicts)
    report.write(options.output, figures, trips, verdicts, about)
    print(f"written to {options.output}")
    return int(options.strict and any(verdict.passed is False for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
