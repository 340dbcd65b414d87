"""`retryproof outbox purge`."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option, url_argument
from retryproof.cli.operated import purge_all
from retryproof.cli.output import Output
from retryproof.transaction.operator import Operator


@click.command(epilog=exits.HELP)
@url_argument
@click.option("--older-than", type=click.FloatRange(0.0), required=True, metavar="SECONDS", help="Since given up.")
@json_option
def purge(url: str, older_than: float, output: Output) -> None:
    """Forget old dead letters, in bounded passes."""

    purge_all(url, output, lambda: Operator(url), lambda outbox: outbox.purge(older_than))
