"""`retryproof inbox drop`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from retryproof.cli import exits
from retryproof.cli.command import apart, json_option, no_url
from retryproof.cli.inbox_command import with_inbox
from retryproof.cli.operated import tell_of_letters
from retryproof.cli.output import Output


@click.command(epilog=exits.HELP)
@click.argument("targets", metavar="[URL] ID...", nargs=-1, envvar="RETRYPROOF_STORE")
@json_option
def drop(targets: Sequence[str], output: Output) -> None:
    """Forget dead letters, by their ids as `inbox list` shows them; for all that are old take `inbox purge --dead`."""
    urls, names = apart(targets)
    if len(urls) > 1 or not names:
        raise click.UsageError("Give one URL at most, and the ids of dead letters.")
    url = urls[0] if urls else no_url()
    count = with_inbox(url, lambda operator: operator.drop(names))
    tell_of_letters(url, output, "dropped", count, names)
