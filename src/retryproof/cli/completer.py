"""`retryproof completer`: finish phased operations that were abandoned (T3)."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from retryproof.cli import exits
from retryproof.cli.command import Usage, find_modules_here, json_option
from retryproof.cli.output import Output, Tell, add_row, table
from retryproof.cli.shown import moment
from retryproof.core.keys import short_digest
from retryproof.phased.completer import Completer, Round
from retryproof.phased.functions import BlockingPhased, Phased
from retryproof.sql.worklist import WorklistEntry


@click.command(epilog=exits.HELP)
@click.argument("target", metavar="MODULE:OBJECT")
@click.option("--batch", type=click.IntRange(1, 1_000), default=16, show_default=True, help="Operations at a time.")
@click.option("--poll", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Seconds between looks.")
@click.option(
    "--give-up-after",
    type=click.FloatRange(1.0),
    default=7 * 86400.0,
    show_default=True,
    help="Seconds after which what goes on failing is left to an operator.",
)
@click.option("--revive", is_flag=True, help="First make due what was given up.")
@click.option("--once", is_flag=True, help="One look only.")
@click.option("--list", "listing", is_flag=True, help="Show what is under way, and why it failed last; run nothing.")
@json_option
def completer(
    target: str,
    batch: int,
    poll: float,
    give_up_after: float,
    revive: bool,
    once: bool,
    listing: bool,
    output: Output,
) -> None:
    """Continue phased operations that died or failed, from their last recovery point, until SIGTERM or Ctrl-C.

    MODULE:OBJECT is a Phased or a BlockingPhased, a function that makes one, or one that returns an async context
    manager over one. Run as many as you like. Before it ends, it finishes the operations that it runs.
    """
    if listing:
        entries = asyncio.run(_entries(target))
        lines = [_table(entries)] if entries else []
        output.answer({"operations": [_document(entry) for entry in entries]}, f"{len(entries)} under way.", *lines)
        return
    with output.progress("completing") as tell:
        totals = asyncio.run(_run(target, batch, poll, give_up_after, revive=revive, once=once, tell=tell))
    output.answer(totals, ", ".join(f"{name} {count}" for name, count in totals.items()) + ".")


async def _run(
    target: str, batch: int, poll: float, give_up_after: float, *, revive: bool, once: bool, tell: Tell
) -> dict[str, int]:
    totals: Counter[str] = Counter(dict.fromkeys(asdict(Round()), 0))

    def told(found: Round) -> None:
        totals.update(asdict(found))
        tell(f"{totals['completed']} completed, {totals['failed']} failed")

    async with _opened(target) as phased:
        working = Completer(phased, batch=batch, poll=poll, give_up_after=give_up_after)
        if revive:
            await working.revive()
        if once:
            told(await working.run_once())
        else:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, working.stop)
            await working.run(told)
    return dict(totals)


async def _entries(target: str) -> list[WorklistEntry]:
    async with _opened(target) as phased:
        return await Completer(phased).entries(1_000)


@asynccontextmanager
async def _opened(target: str) -> AsyncIterator[Phased | BlockingPhased]:
    """The named Phased. A context manager is entered; otherwise the engine is closed at the end."""
    found = _load(target)
    if callable(found):
        found = _made(target, found)
    if isinstance(found, AbstractAsyncContextManager):
        async with found as phased:
            yield _checked(target, phased)
        return
    phased = _checked(target, found)
    try:
        yield phased
    finally:
        if isinstance(phased, Phased):
            await phased.engine.aclose()
        else:
            phased.engine.close()


def _load(target: str) -> Any:
    module, separator, name = target.partition(":")
    if not separator or not module or not name:
        raise Usage(f"{target!r} is no MODULE:OBJECT, such as app:phased.")
    find_modules_here()
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            raise Usage(f"There is no module {module!r} here.") from error
        raise
    except AttributeError as error:
        raise Usage(f"The module {module!r} has no {name!r}.") from error


def _made(target: str, factory: Callable[..., Any]) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise Usage(
            f"{target} needs arguments; give a Phased, or a function without arguments that makes one."
        ) from error
    return factory()


def _checked(target: str, found: Any) -> Phased | BlockingPhased:
    if not isinstance(found, Phased | BlockingPhased):
        raise Usage(f"{target} is {type(found).__name__}, and no Phased.")
    return found


def _document(entry: WorklistEntry) -> dict[str, Any]:
    return {
        "operation": short_digest(entry.id),
        "function": entry.function,
        "tries": entry.tries,
        "listed_at": moment(entry.listed_at),
        "due_at": moment(entry.due_at),
        "reason": entry.reason,
    }


def _table(entries: list[WorklistEntry]) -> Table:
    shown = table("operation", "function", "tries", "listed", "reason")
    for entry in entries:
        row = (short_digest(entry.id), entry.function, entry.tries, moment(entry.listed_at), entry.reason or "")
        add_row(shown, row, "yellow" if entry.reason else "")
    return shown
