"""`retryproof demo`: the same orders over the same bad network, first without the middleware, then with it."""

from __future__ import annotations

import asyncio
import json as jsonlib
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from retryproof.demo import clients, process, report
from retryproof.testing.link import FaultLink

T = TypeVar("T")
NOWHERE = 9  # discard (RFC 863), where nobody listens nowadays
FAULTS = ("lose_reply", "delay", "duplicate", "cut_after", "reset")


def make_unreliable(link: FaultLink) -> None:
    """Set the faults of the network: about a third of all requests have one."""
    link.delay(0.05, probability=0.1)
    link.lose_reply(probability=0.08)
    link.duplicate(after=0.02, probability=0.06)
    link.cut_after(60, direction="request", probability=0.04)
    link.cut_after(60, direction="reply", probability=0.04)
    link.reset(probability=0.04)


def run_demo(
    *,
    charges: int = 300,
    seconds: float = 60.0,
    seed: int | None = None,
    console: Console | None = None,
    json: bool = False,
    files: Path | None = None,
) -> int:
    """Run both halves, print the results, and return the exit code.

    charges: how many orders there are. seconds: how long the clients of each half may take; later orders are lost.
    seed: gives the same orders, faults and kills again (their timing still differs). console: the output for people.
    json: the numbers on standard output, the rest on standard error. files: an empty directory for the ledgers.
    0: with the middleware, nothing was charged twice or lost. 1: something was. 2: the run with the middleware passed,
    but so did the run without it, so that nothing is proved. 3: the server did not start, or ended by itself.
    """
    if charges < 1 or seconds <= 0:
        raise ValueError("charges and seconds must be more than zero")
    # A line for each of a thousand requests would hide the rest, if the program logs at INFO.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    shown = console or Console(stderr=json)
    shown.print(
        f"[bold]{charges} charges[/] by {clients.CONCURRENT} clients at a time, over a network that loses replies, "
        f"delays, duplicates and cuts requests, to a server that is killed again and again (seed {seed}).",
        highlight=False,
    )
    try:
        without, layered = run_both(shown, files, charges=charges, seconds=seconds, seed=seed)
    except process.ServerFailed as error:
        shown.print(str(error), markup=False)
        return 3
    code = 1 if layered.harmed else 0 if without.harmed else 2
    shown.print(report.table(without, layered))
    shown.print(report.verdict(without, layered), highlight=False)
    if json:
        figures = {"seed": seed, "ok": code == 0, "without": asdict(without), "with": asdict(layered)}
        sys.stdout.write(jsonlib.dumps(figures, indent=2) + "\n")
    else:
        report.by_hand(shown)
    return code


def run_both(
    console: Console, files: Path | None, *, charges: int, seconds: float, seed: int
) -> tuple[report.Figures, report.Figures]:
    """Run without the middleware, then with it."""
    with progress_bar(console) as progress, ExitStack() as stack:
        directory = files or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retryproof-demo-")))

        def half(idempotent: bool) -> report.Figures:
            task = progress.add_task("with Retryproof" if idempotent else "without Retryproof", total=charges, kills=0)
            own = directory / ("with" if idempotent else "without")
            own.mkdir(parents=True)

            def watch(done: int, kills: int) -> None:
                progress.update(task, completed=done, kills=kills)

            return asyncio.run(
                run_half(own, idempotent=idempotent, charges=charges, seconds=seconds, seed=seed, watch=watch)
            )

        return half(idempotent=False), half(idempotent=True)


async def run_half(
    files: Path, *, idempotent: bool, charges: int, seconds: float, seed: int, watch: Callable[[int, int], None]
) -> report.Figures:
    """One run from an empty directory to its numbers; `watch` learns of clients that are done, and of kills."""
    random = Random(seed)
    wanted = clients.orders(random, charges)
    plan = process.deaths(random, charges)
    # Until a server listens, the link has no target, as after every kill.
    with FaultLink("127.0.0.1", NOWHERE, random=random) as link:
        make_unreliable(link)
        up = asyncio.Event()
        done = 0

        def moved(port: int) -> None:
            link.target = ("127.0.0.1", port)
            up.set()
            watch(done, server.kills.total())

        def advance() -> None:
            nonlocal done
            done += 1
            watch(done, server.kills.total())

        server = process.Server(files, idempotent=idempotent, moved=moved)
        living = asyncio.ensure_future(server.live(plan))
        try:
            await first_of(up.wait(), living)
            began = time.monotonic()
            traffic = await first_of(clients.buy(link.url, wanted, seconds=seconds, advance=advance), living)
            took = time.monotonic() - began
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
        faults = sum(link.stats[name] for name in FAULTS)
    return report.count(server.database, wanted, traffic, server.kills, faults, took)


async def first_of(work: Coroutine[Any, Any, T], living: asyncio.Future[None]) -> T:
    """The work's result, or the server's failure: if it ends by itself, nobody should wait for it."""
    working = asyncio.ensure_future(work)
    try:
        either: list[asyncio.Future[Any]] = [working, living]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            living.result()
        return await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def progress_bar(console: Console) -> Progress:
    """Progress: clients that are done, and how often the server was killed."""
    return Progress(
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("kill -9: {task.fields[kills]}"),
        TimeElapsedColumn(),
        console=console,
    )
