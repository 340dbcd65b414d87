"""What a `sqlite:///` URL means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from retryproof.core.errors import ConfigurationError

SYNCHRONOUS = ("OFF", "NORMAL", "FULL", "EXTRA")
TIMEOUT = 2.0
PATIENCE = 0.25
"""Seconds to wait for one writer that stays: many times a commit, and still a prompt answer."""


@dataclass(frozen=True, slots=True)
class SqliteTarget:
    """A file and how it is written: see `SqliteStore`."""

    path: str
    timeout: float = TIMEOUT
    patience: float = PATIENCE
    synchronous: str = "FULL"

    def __post_init__(self) -> None:
        if self.synchronous not in SYNCHRONOUS:
            raise ConfigurationError(f"synchronous={self.synchronous!r} must be one of {', '.join(SYNCHRONOUS)}.")


def parse(url: str, timeout: float = TIMEOUT) -> SqliteTarget:
    """Read `sqlite:///relative.db`, `sqlite:////absolute.db`, with `?synchronous=NORMAL&timeout=5&…`."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    path = unquote(parts.path).removeprefix("/")
    if parts.netloc or not path:
        raise ConfigurationError(
            "A SQLite URL is sqlite:/// and a path: sqlite:///keys.db, or sqlite:////var/lib/app/keys.db."
        )
    synchronous = options.pop("synchronous", "FULL").upper()
    timeout = _seconds(options, "timeout", timeout)
    patience = _seconds(options, "patience", PATIENCE)
    if options:
        raise ConfigurationError(
            f"Unknown options in the SQLite URL: {', '.join(options)}; known: synchronous, timeout, patience."
        )
    return SqliteTarget(path, timeout, patience, synchronous)


def file_named(name: str) -> str:
    """The path of the file that a database's name in another library means: itself, or `file:` and a path.

    Raises ConfigurationError for a database in memory, and for one that is opened in an unusual way.
    """
    path, unusual = name, set[str]()
    options: dict[str, str] = {}
    if name.startswith("file:"):
        parts = urlsplit(name)
        path, options = unquote(parts.path), dict(parse_qsl(parts.query))
        unusual = {option for option, value in options.items() if (option, value) not in _USUAL and option != "cache"}
    if path in ("", ":memory:") or options.get("mode") == "memory":
        raise ConfigurationError(
            "A SQLite database in memory belongs to its own connection alone and cannot be a store's too. Name a file, "
            "or use memory:// as the store."
        )
    if unusual:
        raise ConfigurationError(
            f"The store opens a SQLite file by its path, to write; this database has {', '.join(sorted(unusual))}. "
            "Give the store a URL of its own: sqlite:///file.db."
        )
    return path


_USUAL = {("mode", "rw"), ("mode", "rwc")}


def _seconds(options: dict[str, str], name: str, default: float) -> float:
    try:
        seconds = float(options.pop(name, default))
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"The {name} of a SQLite URL is a number of seconds: ?{name}=1.5.")
    return seconds
