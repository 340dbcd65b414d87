"""`retryproof keys`: the records of operations, found by key with its scope or by digest (O1)."""

from __future__ import annotations

import click

from retryproof.cli.exits import HELP
from retryproof.cli.keys_evict import evict
from retryproof.cli.keys_list import list_keys
from retryproof.cli.keys_settle import settle
from retryproof.cli.keys_show import show


@click.group(epilog=HELP)
def keys() -> None:
    """List, show, settle and evict operations.

    No store holds a key: a record is found by its digest (16 hexadecimal digits in logs and answers; a shorter start
    will do) or by the key together with its scope. Where the app has a pepper, set RETRYPROOF_PEPPER.
    """


for command in (evict, list_keys, settle, show):
    keys.add_command(command)
