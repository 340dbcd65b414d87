"""`retryproof keys`: the records of operations, by key and scope, or by digest (O1)."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import click

from retryproof.cli import exits, given_result
from retryproof.cli.audit import audit_of, audit_options
from retryproof.cli.command import Refused, json_option, opened, url_argument
from retryproof.cli.find import PEPPER_VARIABLE, find, lookup_of, lookup_options, named, pages
from retryproof.cli.output import Output, add_row, duration, facts, table
from retryproof.cli.settlement import Decision, check_settleable
from retryproof.cli.settlement import settle as settle_record
from retryproof.cli.shown import abandoned, as_document, moment, pretty, result_of, state_of
from retryproof.core.address import redacted
from retryproof.core.keys import short_digest, tenant_digest
from retryproof.core.record import MICROSECONDS, SETTLED_BY_HAND, Record, State
from retryproof.observe.events import Event, Kind, tell
from retryproof.observe.logging import log_event
from retryproof.stores import Store

STATES = ("in_progress", "abandoned", "released", "completed", "tombstone")
AUDIT_FAILED = "It is settled, but the end of it could not be added to the audit, whose first line stands"
LIVE = "it is running, or its row is locked. A live lease is never evicted; wait until it ends"


@click.group(epilog=exits.HELP)
def keys() -> None:
    """List, show, settle and evict operations.

    Stores do not contain keys. Name a record by its digest (16 hexadecimal digits, as in logs and responses; the first
    few are enough), or by its key and scope. If the app has a pepper, set RETRYPROOF_PEPPER.
    """


@keys.command("list", epilog=exits.HELP)
@url_argument
@click.option(
    "--state",
    type=click.Choice(STATES),
    help="Only these; abandoned: unknown whether it happened, and nobody is at it.",
)
@click.option("--tenant", help="Only those of this tenant: its name, or its digest as `keys show` gives it.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@click.option("--all", "everything", is_flag=True, help="Without a limit.")
@json_option
def list_keys(url: str, state: str | None, tenant: str | None, limit: int, everything: bool, output: Output) -> None:
    """List operations of the store at URL in the order of their digests."""
    wanted = None if state in (None, "abandoned") else State[state.upper()]
    with opened(url) as store, output.progress("reading") as tell:
        found: list[Record] = []
        records = pages(store, state=wanted, tenant=_tenant(tenant))
        if state == "abandoned":
            records = (record for record in records if abandoned(record))
        for record in islice(records, None if everything else limit + 1):
            found.append(record)
            if len(found) % 100 == 0:
                tell(f"{len(found)} records")
    more = not everything and len(found) > limit
    shown = found if everything else found[:limit]
    document = {"store": redacted(url), "records": [as_document(record) for record in shown], "more": more}
    rows = table("digest", "state", "attempt", "first seen", "lease left", "expires")
    for record in shown:
        add_row(rows, _cells(record), "yellow" if abandoned(record) else "")
    output.answer(document, rows if shown else "No records.", *(["… and more: --all, or --limit."] if more else []))


def _cells(record: Record) -> tuple[object, ...]:
    left = (record.lease_until - record.read_at) / MICROSECONDS
    return (
        short_digest(record.id),
        state_of(record),
        record.attempt,
        moment(record.first_seen),
        duration(left) if not record.settled and left > 0 else "-",
        moment(record.expires_at),
    )


def _tenant(given: str | None) -> bytes | None:
    if given is None:
        return None
    try:
        digest = bytes.fromhex(given)
    except ValueError:
        digest = b""
    if len(digest) == 16:
        return digest
    return tenant_digest(given, pepper=os.environ.get(PEPPER_VARIABLE, "").encode())


@keys.command(epilog=exits.HELP)
@lookup_options
@click.option("--result", is_flag=True, help="Decode and show the stored response or value: it may be confidential.")
@json_option
def show(result: bool, output: Output, **options: Any) -> None:
    """Show one operation: its state, attempts, times, and the names of its checkpoints; never its key."""
    wanted = lookup_of(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
    document = {**as_document(record), "checkpoints": sorted(record.checkpoints)}
    document["token"] = record.token
    document["result_bytes"] = None if record.result is None else len(record.result)
    if record.committed:
        document["committed"] = "its work was, in a transaction of the caller's, without its result"
    if SETTLED_BY_HAND in record.checkpoints:
        document["settled"] = record.checkpoints[SETTLED_BY_HAND].decode(errors="replace")
    if result:
        document["result"] = result_of(record)
    cells = [(name.replace("_", " "), _cell(name, value)) for name, value in document.items() if name != "result"]
    output.answer(document, facts(*cells), *([pretty(document["result"])] if result else []))


def _cell(name: str, value: Any) -> str:
    if name in ("lease_left", "retention"):
        return duration(value)
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value in (None, "") else str(value)


@keys.command(epilog=exits.HELP)
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

    First find out whether the effect happened. An operation that is settled, or that has a live lease, is refused. The
    decision is written to the audit, and synced, before the record changes.
    """
    settlement = _settlement(options)
    audit = audit_of(options)
    wanted = lookup_of(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
        check_settleable(record)
        _check_size(store, settlement)
        how = _how(settlement)
        entry = audit.write("settling", record, how=how)
        settle_record(store, record, settlement, entry)
    _log(Kind.SETTLED, record, f"{how}, by {audit.by}")
    try:
        audit.write("settled", record, how=how)
    except click.ClickException as error:
        output.note(f"{AUDIT_FAILED}: {error.format_message()}")
    output.answer({"settled": short_digest(record.id), "how": how}, f"{named(record)} is settled: {how}.")


def _settlement(options: dict[str, Any]) -> Decision:
    outcome, response, status, value = (options.pop(name) for name in ("outcome", "response", "status", "value"))
    given = [name for name in (outcome, response, status, value) if name is not None]
    if len(given) != 1:
        raise click.UsageError("Say how: --as done, --as never-happened, --response, --status or --value.")
    if outcome is not None:
        return Decision(outcome == "done")
    if response is not None:
        return Decision(True, given_result.response(response.read()))
    return Decision(True, given_result.status_only(status) if status is not None else given_result.value(value))


def _check_size(store: Store, settlement: Decision) -> None:
    most = store.capabilities.max_result
    if most is not None and settlement.result is not None and len(settlement.result) > most:
        raise click.UsageError(f"The result has {len(settlement.result)} bytes; this store keeps at most {most}.")


def _how(settlement: Decision) -> str:
    if not settlement.happened:
        return "never happened"
    return (
        "done, result omitted"
        if settlement.result is None
        else f"done, with a result of {len(settlement.result)} bytes"
    )


@keys.command(epilog=exits.HELP)
@lookup_options
@audit_options
@json_option
def evict(output: Output, **options: Any) -> None:
    """Delete an operation's record, so that its key is new: a retry has its effect again.

    An operation with a live lease is refused. To end an operation whose attempt died, settle it instead.
    """
    audit = audit_of(options)
    wanted = lookup_of(options)
    with opened(wanted.url) as store:
        record = find(store, wanted)
        if record.live(record.read_at):
            raise Refused(f"{named(record)} stays: {LIVE}.")
        audit.write("evicting", record)
        (gone,) = store.evict([record.id])
    if not gone:
        raise Refused(f"{named(record)} stays: {LIVE}.")
    _log(Kind.EVICTED, record, f"was {state_of(record)}, by {audit.by}")
    output.answer({"evicted": short_digest(record.id), "state": state_of(record)}, f"{named(record)} is forgotten.")


def _log(kind: Kind, record: Record, note: str) -> None:
    """Send an event about an operator's action, as for attempts."""
    tell(
        [log_event],
        Event(kind=kind, digest=short_digest(record.id), attempt=record.attempt, trace=record.trace, note=note),
    )
