"""`retryproof inbox`: look at an inbox, forget what is old, and decide about its dead letters."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.inbox_drop import drop
from retryproof.cli.inbox_list import list_dead
from retryproof.cli.inbox_purge import purge
from retryproof.cli.inbox_stats import stats


@click.group(epilog=exits.HELP)
def inbox() -> None:
    """How an inbox stands, and its dead letters: messages that came under an id used before, with another payload."""


for command in (list_dead, drop, purge, stats):
    inbox.add_command(command)
