#!/usr/bin/env python3
"""Where the layer's processor time goes: profiles ours in process, by function. Not a figure: a profiler slows."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from pathlib import Path

# The package benchmarks, not the files in it, is what may be imported.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import uvloop  # noqa: E402 - the path above has to come first

from benchmarks.figures import asgi, engine  # noqa: E402
from benchmarks.figures.http import HttpSubject  # noqa: E402
from benchmarks.measure import Run  # noqa: E402
from benchmarks.services import Services  # noqa: E402

SECONDS = 1.5


async def profile(kind: str, url: str, tasks: int, rows: int) -> None:
    if kind.startswith("asgi"):
        app = asgi.CalledApp(HttpSubject("ours", "ours", url))
        await app.open()
        run: Run = asgi.requests(app, asgi.new_keys if kind == "asgi-new" else await asgi.repeated_key(app))
        close = app.close
    else:
        subject = engine.Ours(url)
        await subject.open()
        run = engine.new_operations(subject, tasks) if kind == "engine-new" else await engine.replays(subject, tasks)
        close = subject.close
    await run(0.2)
    profiler = cProfile.Profile()
    profiler.enable()
    sample = await run(SECONDS)
    profiler.disable()
    await close()
    print(f"{sample.operations} operations, {sample.errors} errors")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["engine-new", "engine-replay", "asgi-new", "asgi-replay"])
    parser.add_argument("--store", choices=list(engine.STORES), default="redis")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    with Services() as services:
        match options.store:
            case "memory":
                url = "memory://"
            case "sqlite":
                url = f"sqlite:///{services.sqlite_path('hotspots.db')}"
            case _:
                url = services.url(options.store)
        if options.store == "postgres":
            uvloop.run(engine.prepare(url))
        uvloop.run(profile(options.kind, url, options.tasks, options.rows))


if __name__ == "__main__":
    main()
