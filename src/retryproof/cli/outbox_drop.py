"""`retryproof outbox drop`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from retryproof.cli import exits
from retryproof.cli.command import json_option
from retryproof.cli.outbox_command import act, letters_argument
from retryproof.cli.output import Output


@click.command(epilog=exits.HELP)
@letters_argument
@json_option
def drop(targets: Sequence[str], everything: bool, topic: str | None, output: Output) -> None:
    """Forget dead letters: they are never sent."""
    act(targets, everything, topic, output, lambda operator, ids: operator.drop(ids), "dropped")
