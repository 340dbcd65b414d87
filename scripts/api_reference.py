"""Writes the reference of the public names from their docstrings: docs/reference/api.md.

.venv/bin/python scripts/api_reference.py            # prints it
.venv/bin/python scripts/api_reference.py --write    # after a docstring or a signature changed
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from enum import EnumType
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_overloads

from retryproof import Policy
from retryproof.client import RetryPolicy
from retryproof.clock import wall_clock
from retryproof.core.fingerprint import raw
from retryproof.observe.logging import log_event

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "api.md"

SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Engines": (
        "retryproof",
        ("Idempotency", "AsyncIdempotency", "Outcome", "Policy", "current_operation", "operation_key"),
    ),
    "The current operation": ("retryproof.operation", ("Operation", "Phase")),
    "Phased operations": ("retryproof.transaction", ("Phased", "BlockingPhased", "Completer")),
    "Messages that are received": ("retryproof.transaction", ("Inbox", "Received")),
    "Messages to send": ("retryproof.transaction", ("Outbox",)),
    "Messages, as a publisher gets them": ("retryproof.core.message", ("Message",)),
    "Relays": ("retryproof.transaction", ("Relay", "RelayPolicy")),
    "Rows whose id the client knows": (
        "retryproof.transaction",
        ("insert_once", "ainsert_once", "Inserted", "put_once", "aput_once", "Put"),
    ),
    "Errors": ("retryproof.errors", ()),
    "The HTTP layer": ("retryproof.http.asgi", ("IdempotencyMiddleware",)),
    "The HTTP layer for WSGI": ("retryproof.http.wsgi", ("IdempotencyMiddleware",)),
    "Scopes": ("retryproof.http", ("by_user", "by_header", "by_host", "single_tenant")),
    "Keys in the body": ("retryproof.http.key_source", ("json_field",)),
    "Fingerprints": ("retryproof.core.fingerprint", ("Raw", "CanonicalJson", "fields", "Request")),
    "OpenAPI": ("retryproof.http.openapi", ("document_idempotency",)),
    "Clients": ("retryproof.client.httpx", ("RetryTransport", "AsyncRetryTransport")),
    "What clients retry": ("retryproof.client", ("RetryPolicy", "RetryBudget")),
    "Stores": (
        "retryproof.stores",
        ("open_store", "aopen_store", "Store", "AsyncStore", "Capabilities", "Reaped", "MemoryStore", "InLoop"),
    ),
    "SQLite": ("retryproof.stores.sql.sqlite", ("SqliteStore",)),
    "Redis and Valkey": ("retryproof.stores.redis", ("RedisStore", "AsyncRedisStore")),
    "PostgreSQL, psycopg": ("retryproof.stores.sql.psycopg", ("PsycopgStore",)),
    "PostgreSQL, asyncpg": ("retryproof.stores.sql.asyncpg", ("AsyncpgStore",)),
    "Migrations": ("retryproof.stores.sql.migrate", ("migrate",)),
    "Reaping": ("retryproof.reaper", ("reap_all", "areap_all", "Totals")),
    "Codecs": ("retryproof.core.codec", ("Codec", "JsonCodec", "codec_for")),
    "Events": ("retryproof.observe", ("Event", "Kind", "Traces")),
    "Prometheus": ("retryproof.observe.prometheus", ("PrometheusListener",)),
    "OpenTelemetry": ("retryproof.observe.opentelemetry", ("OpenTelemetryListener",)),
    "For tests": ("retryproof.testing", ("StoreConformance", "AsyncStoreConformance", "ManualClock")),
    "Crashes in tests": ("retryproof.testing.crash", ("CrashPoints",)),
    "A bad network in tests": ("retryproof.testing.link", ("FaultLink",)),
}
"""Heading -> the module to import from, and its names. No names: the module's own docstring."""

HEAD = """# Reference
The public names: they may be added to, and none goes or moves. This page is made from the docstrings by
`scripts/api_reference.py`. Durations are seconds, sizes bytes, times UTC, unless a line says otherwise.
"""

MEMBERS: dict[str, tuple[str, ...]] = {
    "Idempotency": ("run", "id_of", "close"),
    "AsyncIdempotency": ("run", "id_of", "aclose"),
    "Outcome": ("first_seen",),
    "Operation": (
        "key_digest",
        "token",
        "attempt",
        "first_seen",
        "derive",
        "step",
        "astep",
        "transaction",
        "atransaction",
        "phase",
        "rollback",
        "arollback",
        "outcome_unknown",
        "principal",
    ),
    "Inbox": ("receive", "receive_many", "keep", "process", "dead", "drop", "purge", "purge_dead"),
    "Received": ("fresh",),
    "Outbox": ("message", "add", "add_many", "notify"),
    "Relay": ("run", "run_until_idle", "run_once", "stop", "stats", "aclose"),
    "CrashPoints": ("from_environment", "reach", "reached", "wrap"),
    "FaultLink": (
        "url",
        "start",
        "close",
        "refuse",
        "black_hole",
        "delay",
        "cut_after",
        "lose_reply",
        "reset",
        "duplicate",
        "reset_all",
        "heal",
        "stats",
        "wait_for",
    ),
    "IdempotencyMiddleware": ("aclose", "close"),
    "Store": ("claim", "complete", "release", "renew", "checkpoint", "get", "scan", "evict", "reap", "close"),
    "Codec": ("name", "encode", "decode"),
    "Traces": ("current_trace",),
    "ManualClock": ("seconds", "advance"),
    "InLoop": ("close",),
}
"""What of a class is for callers, where it has that; the rest is for adapters, or said once, at the protocol that it
follows."""

NOT_MADE = {"Operation", "Store", "AsyncStore", "Codec", "Kind", "Traces", "StoreConformance", "AsyncStoreConformance"}
"""Classes that nobody calls: protocols, suites to inherit from, and what a handler is given."""

NAMED: dict[str, object] = {
    "Policy()": Policy(),
    "RetryPolicy()": RetryPolicy(),
    "raw": raw,
    "log_event": log_event,
    "wall_clock": wall_clock,
}
"""Defaults that have a name."""

WIDTH = 100

_LABEL = re.compile(r"(?P<names>[a-z_]+(?:, [a-z_]+)*): ")
_SENTENCE_LABEL = re.compile(r"(?<=\.) (?=[a-z_]+(?:, [a-z_]+)*: )")
_SEPARATOR = re.compile(r", (?=\*|/|[a-z_]+[:=,)]|[a-z_]+$)")
_MODULE = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Z])")


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(_section(title, *where) for title, where in SECTIONS.items())


def _section(title: str, module: str, names: tuple[str, ...]) -> str:
    if not names:
        errors = import_module("retryproof").errors
        return f"\n## {title}\n`from retryproof import errors`\n\n```text\n{inspect.getdoc(errors)}\n```\n"
    found = import_module(module)
    parts = [_entry(name, getattr(found, name)) for name in names]
    return f"\n## {title}\n`from {module} import {', '.join(names)}`\n\n" + "\n".join(parts)


def _entry(name: str, thing: Any) -> str:
    text = f"### {name}\n"
    signatures = [] if name in NOT_MADE else _signatures(name, thing)
    if signatures:
        text += "```text\n" + "\n".join(signatures) + "\n```\n"
    text += f"{_prose(inspect.getdoc(thing) or '')}\n"
    if isinstance(thing, EnumType):
        text += _values(thing)
    return text + "".join(_member(thing, member) for member in MEMBERS.get(name, ()) if hasattr(thing, member))


def _values(thing: EnumType) -> str:
    """The values of an enumeration, each with the docstring that follows it in the source."""
    body = ast.parse(inspect.getsource(thing)).body[0]
    lines = ["\n| value | |\n|---|---|\n"]
    for node, after in pairwise(body.body if isinstance(body, ast.ClassDef) else ()):
        match node, after:
            case ast.Assign(value=ast.Constant(str(value))), ast.Expr(value=ast.Constant(str(meaning))):
                lines.append(f"| `{value}` | {meaning.rstrip('.')} |\n")
    return "".join(lines)


def _member(thing: type, name: str) -> str:
    member = inspect.getattr_static(thing, name)
    if isinstance(member, classmethod):
        member = getattr(thing, name)
    described = _prose(inspect.getdoc(member) or "")
    if isinstance(member, property):
        returned = _annotation(inspect.signature(member.fget).return_annotation) if member.fget else ""
        return f"\n**`{name}`**: `{returned}`. {described}\n"
    return f"\n**`{_prefix(member)}{name}{_signature(member)}`**\n\n{described}\n"


# Signatures, as a caller reads them: without self, and without quotes around annotations


def _signatures(name: str, thing: Any) -> list[str]:
    return [_wrapped(_prefix(thing) + name + _signature(form)) for form in get_overloads(thing) or [thing]]


def _prefix(function: Callable[..., Any]) -> str:
    if inspect.iscoroutinefunction(function):
        return "await "
    return "with " if inspect.isgeneratorfunction(inspect.unwrap(function)) else ""


def _signature(thing: Any) -> str:
    signature = inspect.signature(thing)
    parts: list[str] = []
    before = None
    for name, parameter in signature.parameters.items():
        if name == "self" or name.startswith("_"):  # of no use to a caller
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            parts.append("*")
        if before is parameter.POSITIONAL_ONLY and parameter.kind is not before:
            parts.append("/")
        parts.append(_parameter(parameter))
        before = parameter.kind
    returned = "" if inspect.isclass(thing) else _annotation(signature.return_annotation)
    return f"({', '.join(parts)})" + (f" -> {returned}" if returned else "")


def _wrapped(signature: str) -> str:
    """A long signature over several lines, one for each parameter."""
    if len(signature) <= WIDTH:
        return signature
    opening, closing = signature.index("("), signature.rindex(")")
    parts = _SEPARATOR.split(signature[opening + 1 : closing])
    return f"{signature[:opening]}(\n" + "".join(f"    {part},\n" for part in parts) + signature[closing:]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = (
        "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    )
    text = stars + parameter.name
    annotation = _annotation(parameter.annotation)
    text += f": {annotation}" if annotation else ""
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {_default(parameter.default)}" if annotation else f"{text}={_default(parameter.default)}"


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Signature.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _MODULE.sub("", text)


def _default(value: Any) -> str:
    """A default as it would be written; what has a long or changing repr by its name, or not at all."""
    named = [name for name, known in NAMED.items() if type(known) is type(value) and known == value]
    if named:
        return named[0]
    if isinstance(value, tuple):
        return f"({', '.join(map(_default, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(_default, value))) + "}"
    if value is None or isinstance(value, str | bytes | int | float):
        return repr(value)
    return "…"


# Docstrings as Markdown: lines that explain a parameter become a list


def _prose(docstring: str) -> str:
    return "\n\n".join(_paragraph(paragraph) for paragraph in docstring.split("\n\n"))


def _paragraph(paragraph: str) -> str:
    """A paragraph: text, then labelled items, then what follows them on a line of its own."""
    if paragraph.startswith("    "):
        return paragraph
    text: list[str] = []
    items: list[str] = []
    rest: list[str] = []
    for line in _SENTENCE_LABEL.sub("\n", paragraph).splitlines():
        if _LABEL.match(line):
            items.append(_LABEL.sub(_labelled, line, count=1))
        elif rest or (items and line[:1].isupper() and items[-1].endswith(".")):
            rest.append(line)
        elif items:
            items[-1] += f" {line.strip()}"
        else:
            text.append(line)
    groups = ["\n".join(text), "\n".join(f"- {item}" for item in items), "\n".join(rest)]
    return "\n\n".join(group for group in groups if group)


def _labelled(match: re.Match[str]) -> str:
    return ", ".join(f"`{name}`" for name in match["names"].split(", ")) + ": "


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(reference())
    else:
        sys.stdout.write(reference())
