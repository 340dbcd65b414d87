"""The results, counted in the ledger, and how to try it by hand."""

import shlex
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from retryproof.demo.clients import Order, Traffic
from retryproof.demo.process import Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The numbers of one run. `twice` and `lost` count orders, `made` counts charges."""

    wanted: int
    made: int
    twice: int
    lost: int
    sent: int
    replayed: int
    kills: int
    kills_after: int
    faults: int
    seconds: float

    @property
    def harmed(self) -> bool:
        """Whether any order was charged twice, or not at all."""
        return self.made != self.wanted or self.twice > 0 or self.lost > 0


def count(
    database: Path, wanted: Iterable[Order], traffic: Traffic, kills: Counter[Moment], faults: int, seconds: float
) -> Figures:
    """Read the ledger's file, when the run is over.

    An order is lost if it has no charge, or if the charge on its client's receipt is not in the ledger.
    """
    with closing(sqlite3.connect(database)) as connection:
        booked = dict(connection.execute("SELECT id, order_number FROM charges"))
    charges = Counter(booked.values())
    orders = [order.number for order in wanted]
    false = {order for order, receipt in traffic.receipts.items() if booked.get(receipt) != order}
    return Figures(
        wanted=len(orders),
        made=len(booked),
        twice=sum(charges[order] > 1 for order in orders),
        lost=sum(charges[order] == 0 or order in false for order in orders),
        sent=traffic.sent,
        replayed=traffic.replayed,
        kills=kills.total(),
        kills_after=kills["after"],
        faults=faults,
        seconds=round(seconds, 1),
    )


def table(without: Figures, layered: Figures) -> Table:
    """Both runs side by side."""
    shown = Table(title="The same clients, network and kills, counted in the ledger", title_justify="left")
    shown.add_column("")
    shown.add_column("without Retryproof", justify="right")
    shown.add_column("with Retryproof", justify="right")
    runs = (without, layered)
    shown.add_row("charges wanted", *(str(run.wanted) for run in runs))
    shown.add_row("charges made", *(judged(run.made, run.made == run.wanted) for run in runs))
    shown.add_row("charged twice", *(judged(run.twice, run.twice == 0) for run in runs))
    shown.add_row("lost", *(judged(run.lost, run.lost == 0) for run in runs), end_section=True)
    shown.add_row("requests sent", *(str(run.sent) for run in runs))
    shown.add_row("answers replayed", *(str(run.replayed) for run in runs))
    shown.add_row("faults of the network", *(str(run.faults) for run in runs))
    shown.add_row("server kills (kill -9)", *(str(run.kills) for run in runs))
    shown.add_row("  of these between charge and answer", *(str(run.kills_after) for run in runs))
    shown.add_row("seconds", *(f"{run.seconds:.1f}" for run in runs))
    return shown


def judged(number: int, good: bool) -> str:
    """A number, coloured by its meaning."""
    return f"[bold {'green' if good else 'red'}]{number}[/]"


def verdict(without: Figures, layered: Figures) -> str:
    """The meaning of the results, in a sentence."""
    if layered.harmed:
        return (
            f"[bold red]Retryproof failed:[/] {layered.twice} orders were charged twice and {layered.lost} lost. "
            "Please report it, with the seed."
        )
    if not without.harmed:
        return "With Retryproof nothing was doubled or lost; without it neither, so this run proves nothing. Try again."
    return (
        f"Without Retryproof {without.twice} of {without.wanted} orders were charged more than once; with it, each of "
        f"the {layered.wanted} exactly once."
    )


def server_command(port: int) -> str:
    """The command that starts the API by hand, with this Python."""
    python = Path(sys.executable)
    try:
        shown = python.relative_to(Path.cwd())
    except ValueError:
        shown = python
    return f"{shlex.quote(str(shown))} -m uvicorn --factory retryproof.demo.app:create_app --port {port}"


def curl_commands(url: str) -> list[tuple[str, str]]:
    """What to try by hand, and what happens."""

    def charge(amount: int) -> str:
        return (
            f"curl -i {url}/charges -H 'Idempotency-Key: my-first-key' -H 'Content-Type: application/json' "
            f'-d \'{{"order": "1", "customer": "ada", "amount": {amount}}}\''
        )

    return [
        (charge(1200), "201: a charge"),
        (charge(1200), "the same answer again, with Idempotency-Replayed: true"),
        (charge(9900), "422 key-reused: a key stands for one request"),
        (f"curl {url}/charges", "the ledger: one charge"),
    ]


def by_hand(console: Console, port: int = 8000) -> None:
    """Print how to try it."""
    console.print("\n[bold]Try it by hand[/]: start the API (it writes payments.db here), and in another terminal ask.")
    say(console, server_command(port))
    for command, answer in curl_commands(f"http://127.0.0.1:{port}"):
        console.print(f"[dim]# {answer}[/]", highlight=False)
        say(console, command)


def say(console: Console, command: str) -> None:
    """A command on a line of its own, complete, so that it can be copied."""
    console.print(command, markup=False, highlight=False, soft_wrap=True)
