"""`retryproof keys show`."""

from __future__ import annotations

from typing import Any

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, opened
from retryproof.cli.find import find, lookup_options, sought
from retryproof.cli.output import Output, add_row, duration, table
from retryproof.cli.shown import as_document, pretty, result_of
from retryproof.core.record import SETTLED_BY_HAND


@click.command(epilog=exits.HELP)
@lookup_options
@click.option("--result", is_flag=True, help="Decode and show the stored response or value: it may be confidential.")
@json_option
def show(result: bool, output: Output, **options: Any) -> None:
    """Show one operation: its state, attempts, times, and the names of its checkpoints; never its key."""
    wanted = sought(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
    document = {**as_document(record), "checkpoints": sorted(record.checkpoints)}
    document["result_bytes"] = None if record.result is None else len(record.result)
    if record.committed:
        document["committed"] = "its work was, in a transaction of the caller's, without its result"
    if SETTLED_BY_HAND in record.checkpoints:
        document["settled"] = record.checkpoints[SETTLED_BY_HAND].decode(errors="replace")
    if result:
        document["result"] = result_of(record)
    rows = table("", "")
    rows.show_header = False
    for name, value in document.items():
        if name != "result":
            add_row(rows, (name.replace("_", " "), _cell(name, value)))
    output.answer(document, rows, *([pretty(document["result"])] if result else []))


def _cell(name: str, value: Any) -> str:
    if name in ("lease_left", "retention"):
        return duration(value)
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value in (None, "") else str(value)
