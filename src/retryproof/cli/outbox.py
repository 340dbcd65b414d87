"""`retryproof outbox`: look at an outbox, and decide about its dead letters."""

from __future__ import annotations

import click

from retryproof.cli import exits
from retryproof.cli.outbox_adopt import adopt
from retryproof.cli.outbox_drop import drop
from retryproof.cli.outbox_list import list_dead
from retryproof.cli.outbox_purge import purge
from retryproof.cli.outbox_requeue import requeue
from retryproof.cli.outbox_stats import stats


@click.group(epilog=exits.HELP)
def outbox() -> None:
    """How an outbox stands, and its dead letters: messages that were given up."""


for command in (list_dead, requeue, drop, purge, stats, adopt):
    outbox.add_command(command)
