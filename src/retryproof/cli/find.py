"""Find a record by its digest, or by its key and scope."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from retryproof.cli.command import STORE_VARIABLE, Function, Refused, no_url, split_targets
from retryproof.cli.output import printable
from retryproof.core.keys import check_key, record_id, short_digest
from retryproof.core.record import Record, State
from retryproof.stores import Store

PEPPER_VARIABLE = "RETRYPROOF_PEPPER"
PAGE = 500
CANDIDATES = 10
"""How many records a message lists for an ambiguous digest."""

_DIGEST = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the options name. ids: possible ids, one of which has to exist; or the start of a digest."""

    url: str
    digest: str = ""
    ids: Sequence[bytes] = ()


def lookup_options(function: Function) -> Function:
    """The arguments [URL] [DIGEST] and the options that name a key; read by `lookup_of`."""
    options: Sequence[Callable[[Function], Function]] = (
        click.argument("targets", metavar="[URL] [DIGEST]", nargs=-1),
        click.option(
            "--key", help="The idempotency key; '-' reads it from standard input, out of the shell's history."
        ),
        click.option(
            "--scope",
            "scopes",
            multiple=True,
            help="A part of the key's scope, from the tenant down; again for each.",
        ),
        click.option("--http", metavar="'METHOD /path'", help="The key came with this request, instead of --scope."),
        click.option("--endpoint", help="The endpoint's pinned name, instead of --http."),
        click.option(
            "--caller",
            help="Who sent it, as the layer's scope= identifies callers; '-' as for --key, on the line after it.",
        ),
        click.option("--single-tenant", is_flag=True, help="The layer has scope=single_tenant."),
        click.option("--anonymous", is_flag=True, help="The caller had no identity."),
        click.option("--app", default="", help="The layer's name=, where it has one."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def lookup_of(options: dict[str, Any]) -> Lookup:
    """Take the lookup options out of a command's; raises UsageError unless they name one record."""
    taken = {name: options.pop(name) for name in ("targets", "key", "scopes", "http", "endpoint", "caller")}
    taken |= {name: options.pop(name) for name in ("single_tenant", "anonymous", "app")}
    url, digest = _targets(taken["targets"])
    if bool(digest) == (taken["key"] is not None):
        raise click.UsageError("Name the record by its digest, or by --key with its scope.")
    if digest:
        return Lookup(url, digest=digest)
    key = check_key(_read(taken["key"]))
    scopes = _scopes(taken)
    pepper = os.environ.get(PEPPER_VARIABLE, "").encode()
    return Lookup(url, ids=[record_id(scope, key, pepper=pepper) for scope in scopes])


def _targets(targets: Sequence[str]) -> tuple[str, str]:
    urls, names = split_targets(targets)
    digests = [name.lower() for name in names]
    if len(urls) > 1 or len(digests) > 1:
        raise click.UsageError("Give one URL and one digest at most.")
    if digests and not _DIGEST.fullmatch(digests[0]):
        raise click.UsageError(
            f"{printable(names[0])!r} is neither a digest, which is 4 to 64 hexadecimal digits as logs and `keys list` "
            "show it, nor the URL of a store, such as sqlite:///keys.db."
        )
    url = urls[0] if urls else os.environ.get(STORE_VARIABLE) or no_url()
    return url, digests[0] if digests else ""


def _scopes(taken: dict[str, Any]) -> Sequence[Sequence[str | bytes]]:
    """The scopes that the options may mean: an identity from a header is bytes, most others are strings."""
    if taken["scopes"]:
        return [taken["scopes"]]
    what = _what(taken)
    if what is None:
        raise click.UsageError("Give the key's scope: --scope for functions, --http 'POST /path' for requests.")
    caller = "single tenant" if taken["single_tenant"] else taken["caller"] and _read(taken["caller"])
    if taken["anonymous"] == (caller is not None):
        raise click.UsageError("Say whose key it is: --caller, --single-tenant or --anonymous.")
    if caller is None:
        return [(taken["app"], "anonymous", "", *what)]
    return [(taken["app"], "caller", identity, *what) for identity in (caller, caller.encode("latin-1", "replace"))]


def _what(taken: dict[str, Any]) -> tuple[str | bytes, ...] | None:
    if taken["endpoint"]:
        return (taken["endpoint"],)
    if not taken["http"]:
        return None
    method, blank, path = taken["http"].partition(" ")
    if not blank or not path.startswith("/"):
        raise click.UsageError("--http takes a method and a raw path, such as 'POST /charges'.")
    return method.upper(), path.partition("?")[0].encode()


def _read(given: str) -> str:
    """The value, or for "-" a line of standard input."""
    return sys.stdin.readline().rstrip("\r\n") if given == "-" else given


def find(store: Store, wanted: Lookup) -> Record:
    """The record that the options name, complete; raises Refused if there is none, or more than one."""
    ids = wanted.ids or [_by_digest(store, wanted.digest)]
    found = [record for record in store.get(ids) if record is not None]
    if len(found) == 1:
        return found[0]
    if found:
        digests = " and ".join(short_digest(record.id) for record in found)
        raise Refused(f"Two records match, since a caller may be text or bytes: {digests}. Name one by its digest.")
    raise Refused(
        "There is no such record: it was never made, its retention is over, or the scope is different. "
        f"With a pepper, set {PEPPER_VARIABLE}."
    )


def _by_digest(store: Store, digest: str) -> bytes:
    found: list[Record] = []
    prefix = bytes.fromhex(digest[: len(digest) // 2 * 2])
    for record in pages(store, prefix=prefix):
        if record.id.hex().startswith(digest):
            found.append(record)
        if len(found) > CANDIDATES:
            break
    if len(found) > 1:
        more = " and more" if len(found) > CANDIDATES else ""
        names = ", ".join(record.id.hex()[: max(16, len(digest) + 4)] for record in found[:CANDIDATES])
        raise Refused(f"{digest} is the start of several digests: {names}{more}. Give more digits.")
    if not found:
        raise Refused(f"There is no record with the digest {digest}: its retention is over, or it was never made.")
    return found[0].id


def pages(
    store: Store, *, prefix: bytes = b"", state: State | None = None, tenant: bytes | None = None
) -> Iterator[Record]:
    """Records in the order of their ids, page by page."""
    after = b""
    while page := store.scan(prefix=prefix, state=state, tenant=tenant, after=after, limit=PAGE):
        yield from page
        after = page[-1].id


def named(record: Record) -> str:
    """The name of a record in messages."""
    return f"operation {short_digest(record.id)}"
