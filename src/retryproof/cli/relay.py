"""`retryproof relay`: send the messages of an outbox (T6)."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Literal

import click

from retryproof.cli import exits
from retryproof.cli.command import Function, Refused, Usage, find_modules_here, json_option, url_argument
from retryproof.cli.output import Output, Tell
from retryproof.core.address import FUNCTION, destination, redacted, scheme_of
from retryproof.core.message import PARTITIONS
from retryproof.outbox.policy import RelayPolicy, RelayTotals
from retryproof.outbox.relay import Relay
from retryproof.outbox.routes import EVERYTHING
from retryproof.publishers import open_publisher
from retryproof.sql.sqlite.url import parse as parse_file

DEFAULTS = RelayPolicy()
TO_VARIABLE = "RETRYPROOF_RELAY_TO"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _seconds(name: str, default: float, words: str) -> Callable[[Function], Function]:
    """An option in seconds, which must be more than zero."""
    return click.option(name, type=click.FloatRange(0.0, min_open=True), default=default, show_default=True, help=words)


@click.command(epilog=exits.HELP)
@url_argument
@click.option(
    "--to",
    "destinations",
    multiple=True,
    metavar="[TOPIC=]URL",
    envvar=TO_VARIABLE,
    help="https://…, smtp://…, redis://…/stream or module:function; with TOPIC= for that topic alone. Repeatable. "
    f"Or {TO_VARIABLE}, with spaces between several: what holds a password does not stand in the process list there.",
)
@click.option("--batch", type=click.IntRange(1, 1_000), default=DEFAULTS.batch, show_default=True)
@click.option(
    "--lease",
    type=click.FloatRange(0.1, 3_600.0),
    default=DEFAULTS.lease,
    show_default=True,
    help="Seconds until others take over from a relay that died.",
)
@_seconds(
    "--give-up-after",
    DEFAULTS.give_up_after,
    "Seconds since a message failed first until it is given up; receivers may forget it after a day.",
)
@click.option(
    "--max-attempts",
    type=click.IntRange(1),
    default=DEFAULTS.max_attempts,
    show_default=True,
    help="Answers about the message itself (4xx, 500) until it is given up.",
)
@click.option(
    "--max-deaths",
    type=click.IntRange(1),
    default=DEFAULTS.max_deaths,
    show_default=True,
    help="Relays that died while they sent the message alone until it is given up.",
)
@_seconds("--backoff", DEFAULTS.backoff, "Longest pause after a first failure, in seconds; doubled after each.")
@click.option(
    "--on-failure",
    type=click.Choice(["block", "pass"]),
    default="block",
    show_default=True,
    help="Whether a failing message holds later ones of its key back.",
)
@click.option("--strict-order", is_flag=True, help="Order all messages, not only those of a key; one relay works.")
@_seconds("--patience", DEFAULTS.patience, "Seconds that slow messages may keep other keys waiting.")
@_seconds("--timeout", DEFAULTS.timeout, "Seconds for one message, where they are sent one by one.")
@_seconds("--poll", DEFAULTS.max_poll, "Longest pause, in seconds, between two looks at an idle outbox.")
@click.option("--no-listen", is_flag=True, help="Do not try to be woken by notifications (PostgreSQL).")
@click.option("--partitions", type=click.IntRange(1), default=PARTITIONS, show_default=True)
@click.option("--public-only", is_flag=True, help="Refuse webhooks at addresses that are not public.")
@click.option("--once", is_flag=True, help="End when nothing is due, instead of waiting for more.")
@click.option("--drain", type=click.FloatRange(0.0), default=DEFAULTS.drain, show_default=True, help="Seconds at most.")
@json_option
def relay(
    url: str,
    destinations: Sequence[str],
    batch: int,
    lease: float,
    give_up_after: float,
    max_attempts: int,
    max_deaths: int,
    backoff: float,
    on_failure: Literal["block", "pass"],
    strict_order: bool,
    patience: float,
    timeout: float,
    poll: float,
    no_listen: bool,
    partitions: int,
    public_only: bool,
    once: bool,
    drain: float,
    output: Output,
) -> None:
    """Send the messages of the outbox in the database at URL, until SIGTERM or Ctrl-C.

    Before it ends, it finishes the messages in flight. Run as many relays as you like: messages of one key stay in
    order, none is lost, and a message that is sent twice has the same id. All relays on one outbox need the same
    destinations. A relay with other destinations stands by until the others have left. Webhooks are signed with the
    secrets in RETRYPROOF_WEBHOOK_SECRET.
    """
    routes = _routes(destinations)
    policy = RelayPolicy(
        batch=batch,
        lease=lease,
        give_up_after=give_up_after,
        max_attempts=max_attempts,
        max_deaths=max_deaths,
        backoff=backoff,
        max_backoff=max(DEFAULTS.max_backoff, backoff),
        on_failure=on_failure,
        order="strict" if strict_order else "key",
        poll=min(DEFAULTS.poll, poll),
        max_poll=poll,
        patience=patience,
        timeout=timeout,
        listen=not no_listen,
        drain=drain,
        partitions=partitions,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise there is a line for each message
    with output.progress("relaying") as tell:
        totals = asyncio.run(_run(url, routes, policy, public_only=public_only, once=once, tell=tell))
    to = {topic or "*": destination(to) for topic, to in routes.items()}
    document = {"store": redacted(url), "to": to, **asdict(totals)}
    output.answer(document, f"Sent {totals.delivered}, failed {totals.failed}, dead letters {totals.dead}.")


def _routes(destinations: Sequence[str]) -> dict[str, str]:
    """URLs by topic."""
    routes: dict[str, str] = {}
    for given in destinations:
        topic, to = _apart(given)
        if topic in routes:
            raise click.UsageError(f"--to names two destinations for {f'the topic {topic!r}' if topic else 'all'}.")
        routes[topic] = to
    if not routes:
        raise click.UsageError(f"Give where to send: --to [TOPIC=]URL, or set {TO_VARIABLE}.")
    return routes


def _apart(given: str) -> tuple[str, str]:
    """Topic and URL. A URL has "=" only in its query, so an earlier "=" ends the topic."""
    for place in (place for place, character in enumerate(given) if character == "="):
        topic, to = given[:place], given[place + 1 :]
        if "://" in topic:
            break
        if FUNCTION.fullmatch(to) or _URL.match(to):
            return topic, to
    return EVERYTHING, given


async def _run(
    url: str, routes: dict[str, str], policy: RelayPolicy, *, public_only: bool, once: bool, tell: Tell
) -> RelayTotals:
    find_modules_here()
    options = {"public_only": True} if public_only else {}
    opened = {to: open_publisher(to, **options) for to in routes.values()}
    if not once:
        _check_file(url)
    working = Relay(url, routes={topic: opened[to] for topic, to in routes.items()}, policy=policy)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, working.stop)
    showing = asyncio.create_task(_show(working, tell))
    try:
        totals = await (working.run_until_idle() if once else working.run())
        if once and working.standing_by:
            raise Refused("Relays with other destinations are working on this outbox; nothing was sent.")
        return totals
    finally:
        showing.cancel()


def _check_file(url: str) -> None:
    """Refuse a SQLite file that does not exist: the relay would create it, and wait there for nothing."""
    if scheme_of(url) == "sqlite" and not os.path.exists(path := parse_file(url).path):
        raise Usage(f"There is no file {path}. Is the path right? The app makes it with its first message.")


async def _show(working: Relay, tell: Tell) -> None:
    while True:
        totals = working.totals
        how_far = f"{totals.delivered} sent, {totals.failed} failed, {totals.dead} dead letters"
        tell("standing by for relays with other destinations" if working.standing_by else how_far)
        await asyncio.sleep(0.5)
