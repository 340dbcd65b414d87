"""`retryproof inbox purge`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.operated import purge_all
from retryproof.cli.output import Output
from retryproof.transaction.inbox_operator import InboxOperator


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--older-than", type=click.FloatRange(0.0), required=True, metavar="SECONDS", help="Since they came.")
@click.option("--dead", is_flag=True, help="Dead letters, instead of messages that were taken.")
@json_option
def purge(url: str, older_than: float, dead: bool, output: Output) -> None:
    """Forget old messages, in bounded passes.

    A message that the broker delivers again after it was forgotten takes effect again: SECONDS must exceed the broker's
    retention, and the age at which its dead letters may be replayed.
    """

    purge_all(
        url,
        output,
        lambda: InboxOperator(url),
        lambda inbox: inbox.purge_dead(older_than) if dead else inbox.purge(older_than),
    )
