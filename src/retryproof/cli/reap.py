"""`retryproof reap`: delete records whose time is over (C19)."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, opened, url_argument
from retryproof.cli.output import Output
from retryproof.cli.shown import as_document, moment
from retryproof.core.address import redacted
from retryproof.core.keys import short_digest
from retryproof.core.record import Record
from retryproof.reaper import LIMIT, Totals, reap_all


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--once", is_flag=True, help="One pass only.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=LIMIT, show_default=True, help="Records a pass.")
@json_option
def reap(url: str, once: bool, limit: int, output: Output) -> None:
    """Delete records of the store at URL that are past their retention, in bounded passes beside the traffic.

    An operation that ends without an outcome is listed on standard error, and reported as an event, before it is
    deleted: nobody has settled whether it had its effect. Run this from a timer, in as many places as you like. Redis
    and Valkey delete settled records by themselves.
    """
    ended: list[Record] = []
    with opened(url) as store, output.progress("reaping") as tell:

        def told(totals: Totals) -> None:
            tell(f"{totals.settled + totals.unsettled} removed in {totals.passes} passes")

        def list_it(record: Record) -> None:
            first_seen = moment(record.first_seen)
            output.note(
                f"{short_digest(record.id)} ends without an outcome: attempt {record.attempt}, first {first_seen}"
            )
            ended.append(record)

        totals = reap_all(store, limit=limit, passes=1 if once else None, on_ended=list_it, on_pass=told)
    document = {
        "store": redacted(url),
        "passes": totals.passes,
        "settled": totals.settled,
        "unsettled": totals.unsettled,
        "more": totals.more,
        "ended": [as_document(record) for record in ended],
    }
    passes = "1 pass" if totals.passes == 1 else f"{totals.passes} passes"
    lines = [f"Removed {totals.settled} settled and {totals.unsettled} unsettled in {passes}."]
    if totals.more:
        lines.append("There is more: run it again, or without --once.")
    output.answer(document, *lines)
