"""`retryproof outbox purge`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.outbox_command import with_operator
from retryproof.cli.output import Output
from retryproof.cli.redact import redacted
from retryproof.transaction.operator import Operator


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--older-than", type=click.FloatRange(0.0), required=True, metavar="SECONDS", help="Since given up.")
@json_option
def purge(url: str, older_than: float, output: Output) -> None:
    """Forget old dead letters, in bounded passes."""

    async def work(operator: Operator) -> int:
        purged = 0
        while removed := await operator.purge(older_than):
            purged += removed
            tell(f"{purged} purged")
        return purged

    with output.progress("purging") as tell:
        count = with_operator(url, work)
    output.answer({"store": redacted(url), "purged": count}, f"purged: {count}")
