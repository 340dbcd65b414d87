"""All commands under one name."""

from __future__ import annotations

import logging

import click

import retryproof as package
from retryproof.cli.completer import completer
from retryproof.cli.demo import demo
from retryproof.cli.doctor import doctor
from retryproof.cli.exits import HELP
from retryproof.cli.inbox import inbox
from retryproof.cli.keys import keys
from retryproof.cli.migrate import migrate
from retryproof.cli.outbox import outbox
from retryproof.cli.reap import reap
from retryproof.cli.relay import relay


@click.group(epilog=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, prog_name="retryproof")
def retryproof() -> None:
    """Send it twice. It happens once.

    Commands on a store take its URL as an argument, or from RETRYPROOF_STORE. They never print the URL's password.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)


for command in (completer, demo, doctor, inbox, keys, migrate, outbox, reap, relay):
    retryproof.add_command(command)
