"""`retryproof outbox adopt`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import Refused, json_option, url_argument
from retryproof.cli.outbox_command import with_operator
from retryproof.cli.output import Output
from retryproof.core.address import redacted
from retryproof.transaction.operator import Operator


@click.command(epilog=exits.HELP)
@url_argument
@json_option
def adopt(url: str, output: Output) -> None:
    """Have messages sent that came from a backup of another PostgreSQL cluster.

    They may have been sent already, after the backup was made: receivers that go by ids see that, others do not.
    """

    async def work(operator: Operator) -> int:
        if (await operator.stats()).relays:
            raise Refused("Relays are alive; stop them first.")
        return await operator.adopt()

    count = with_operator(url, work)
    output.answer({"store": redacted(url), "adopted": count}, f"adopted: {count}")
