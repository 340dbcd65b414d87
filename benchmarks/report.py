"""The table for people and the JSON for later."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count, getloadavg
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures.roundtrips import RoundTrips
from benchmarks.goals import Verdict
from benchmarks.measure import Figure

_PACKAGES = ("retryproof", "redis", "hiredis", "asyncpg", "psycopg", "fastapi", "uvicorn", "uvloop", "httptools")
# Columns where the output goes to a file: no row is folded.
PLAIN_WIDTH = 150
_MARKS = {True: "[green]reached[/]", False: "[red]missed[/]", None: "[dim]–[/]"}


def environment(servers: Mapping[str, str]) -> dict[str, Any]:
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processors": cpu_count(),
        "load_average": getloadavg()[0],
        "servers": dict(servers),
        "packages": packages,
    }


def write(
    path: Path,
    figures: Sequence[Figure],
    round_trips: Sequence[RoundTrips],
    verdicts: Sequence[Verdict],
    about: Mapping[str, Any],
) -> None:
    path.parent.mkdir(exist_ok=True)
    document = {
        "about": dict(about),
        "goals": [verdict.as_json() for verdict in verdicts],
        "round_trips": [counted.as_json() for counted in round_trips],
        "figures": [figure.as_json() for figure in figures],
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def show(figures: Sequence[Figure], round_trips: Sequence[RoundTrips], verdicts: Sequence[Verdict]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    for method, group in _by_method(figures).items():
        console.print(f"\n[bold]Method[/]: {method}")
        console.print(_figure_table(group))
    if round_trips:
        console.print(_trip_table(round_trips))
    console.print(_goal_table(verdicts))


def _by_method(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    groups: dict[str, list[Figure]] = {}
    for figure in figures:
        groups.setdefault(figure.method, []).append(figure)
    return groups


def _figure_table(figures: Sequence[Figure]) -> Table:
    table = Table("figure", "subject")
    for heading in ("per second", "to the first (lowest–highest)", "CPU µs each", "by CPU", "errors"):
        table.add_column(heading, justify="right")
    for figure in figures:
        subjects = figure.as_json()["subjects"]
        base = next(iter(subjects))
        for name, summary in subjects.items():
            shown = figure.name if name == base else ""
            rate, cpu = f"{summary['per_second']:,.0f}", f"{summary['cpu_microseconds']:.3g}"
            ratio, by_cpu = figure.ratio(name, base), figure.cpu_ratio(name, base)
            row = (shown, name, rate, str(ratio or "–"), cpu, f"{by_cpu:.2f}" if by_cpu else "–")
            table.add_row(*row, f"{summary['errors']:,}")
        for note in figure.notes:
            table.add_row("", f"[yellow]{note}[/]")
        table.add_section()
    return table


def _trip_table(round_trips: Sequence[RoundTrips]) -> Table:
    table = Table("one operation at a time", "round trips", "at the server", title="Round trips, counted")
    for counted in round_trips:
        table.add_row(counted.name, f"{counted.round_trips:g}", f"{counted.server_count:g} {counted.counted}")
    return table


def _goal_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("goal", "wanted", "measured: median (lowest–highest)", "", title="Goals")
    for verdict in verdicts:
        table.add_row(verdict.what, verdict.wanted, verdict.measured, _MARKS[verdict.passed])
    return table
