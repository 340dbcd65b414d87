"""`retryproof keys settle`."""

from __future__ import annotations

from typing import Any

import click

from retryproof.cli import exits, given_result
from retryproof.cli.audit import audit_of, audit_options
from retryproof.cli.command import json_option, opened
from retryproof.cli.find import find, lookup_options, named, sought
from retryproof.cli.output import Output
from retryproof.cli.settlement import Settlement, check_settleable
from retryproof.cli.settlement import settle as settle_record
from retryproof.core.keys import short_digest
from retryproof.observe.events import Event, Kind, tell
from retryproof.observe.logging import log_event
from retryproof.stores import Store

AUDIT_FAILED = "It is settled, but the end of it could not be added to the audit, whose first line stands"


@click.command(epilog=exits.HELP)
@lookup_options
@click.option(
    "--as",
    "outcome",
    type=click.Choice(("done", "never-happened")),
    help="done: a replay says that the result was omitted. never-happened: a retry runs.",
)
@click.option(
    "--response",
    type=click.File("r"),
    help="Done, with this response (a JSON file, '-' is standard input): " + given_result.SHAPE + ".",
)
@click.option("--status", type=click.IntRange(200, 599), help="Done, with a response of this status and no body.")
@click.option("--value", help="Done, with this value (JSON), for a function.")
@audit_options
@json_option
def settle(output: Output, **options: Any) -> None:
    """Settle an operation whose attempt died: with a result, as done without one, or as never happened.

    Find out first, where the effect would be. Refused where the operation is settled, or its lease is live. The
    decision is written to the audit, and synced, before the record is changed.
    """
    settlement = _settlement(options)
    audit = audit_of(options)
    wanted = sought(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
        check_settleable(record)
        _check_size(store, settlement)
        how = _how(settlement)
        entry = audit.write("settling", record, how=how)
        settle_record(store, record, settlement, entry)
    tell(
        [log_event],
        Event(
            kind=Kind.SETTLED,
            digest=short_digest(record.id),
            attempt=record.attempt,
            trace=record.trace,
            note=f"{how}, by {audit.by}",
        ),
    )
    try:
        audit.write("settled", record, how=how)
    except click.ClickException as error:
        output.note(f"{AUDIT_FAILED}: {error.format_message()}")
    output.answer({"settled": short_digest(record.id), "how": how}, f"{named(record)} is settled: {how}.")


def _settlement(options: dict[str, Any]) -> Settlement:
    outcome, response, status, value = (options.pop(name) for name in ("outcome", "response", "status", "value"))
    given = [name for name in (outcome, response, status, value) if name is not None]
    if len(given) != 1:
        raise click.UsageError("Say how: --as done, --as never-happened, --response, --status or --value.")
    if outcome is not None:
        return Settlement(outcome == "done")
    if response is not None:
        return Settlement(True, given_result.response(response.read()))
    return Settlement(True, given_result.status_only(status) if status is not None else given_result.value(value))


def _check_size(store: Store, settlement: Settlement) -> None:
    most = store.capabilities.max_result
    if most is not None and settlement.result is not None and len(settlement.result) > most:
        raise click.UsageError(f"The result has {len(settlement.result)} bytes; this store keeps at most {most}.")


def _how(settlement: Settlement) -> str:
    if not settlement.happened:
        return "never happened"
    return (
        "done, result omitted"
        if settlement.result is None
        else f"done, with a result of {len(settlement.result)} bytes"
    )
