"""`retryproof keys evict`."""

from __future__ import annotations

from typing import Any

import click

from retryproof.cli import exits
from retryproof.cli.audit import audit_of, audit_options
from retryproof.cli.command import Refused, json_option, opened
from retryproof.cli.find import find, lookup_options, named, sought
from retryproof.cli.output import Output
from retryproof.cli.shown import state_of
from retryproof.core.keys import short_digest
from retryproof.observe.events import Event, Kind, tell
from retryproof.observe.logging import log_event

LIVE = "it is running, or its row is locked. A live lease is never evicted; wait until it ends"


@click.command(epilog=exits.HELP)
@lookup_options
@audit_options
@json_option
def evict(output: Output, **options: Any) -> None:
    """Forget an operation, so that its key starts anew: a retry has its effect again.

    Refused while a lease is live. To end an operation whose attempt died, settle it instead.
    """
    audit = audit_of(options)
    wanted = sought(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
        if record.live(record.read_at):
            raise Refused(f"{named(record)} stays: {LIVE}.")
        audit.write("evicting", record)
        (gone,) = store.evict([record.id])
    if not gone:
        raise Refused(f"{named(record)} stays: {LIVE}.")
    note = f"was {state_of(record)}, by {audit.by}"
    tell(
        [log_event],
        Event(
            kind=Kind.EVICTED,
            digest=short_digest(record.id),
            attempt=record.attempt,
            trace=record.trace,
            note=note,
        ),
    )
    output.answer({"evicted": short_digest(record.id), "state": state_of(record)}, f"{named(record)} is forgotten.")
