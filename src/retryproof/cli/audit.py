"""The audit of what operators do to records: one JSON line for each fact, on disk before a record changes (O1).

A completed record has no room for the name of the operator. So the audit is separate from the store: lines are appended
to a file and synced, or written to standard error for a log collector.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import click

from retryproof.cli.command import Function, Refused
from retryproof.cli.shown import moment, state_of
from retryproof.core.record import Record

AUDIT_VARIABLE = "RETRYPROOF_AUDIT_FILE"


@dataclass(frozen=True, slots=True)
class Audit:
    """Who acts, why, and where to write that: a file's path, or "-" for standard error."""

    file: str
    by: str
    why: str

    def write(self, what: str, record: Record, **more: Any) -> dict[str, Any]:
        """Append one line, sync it, and return the entry. Raises Refused if the line cannot be written."""
        entry = {
            "what": what,
            "digest": record.id.hex()[:16],
            "id": record.id.hex(),
            "by": self.by,
            "host": socket.gethostname(),
            "why": self.why,
            "at": moment(record.read_at),
            "state": state_of(record),
            "attempt": record.attempt,
            **more,
        }
        line = json.dumps(entry) + "\n"
        try:
            self._append(line)
        except OSError as error:
            raise Refused(f"The audit cannot be written to {self.file}: {error.strerror}.") from error
        return entry

    def _append(self, line: str) -> None:
        if self.file == "-":
            sys.stderr.write(line)
            sys.stderr.flush()
            return
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            data = line.encode()
            if os.write(descriptor, data) != len(data):
                raise OSError(0, "the disk took only a part of it")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def audit_options(function: Function) -> Function:
    """`--why`, `--by` and `--audit-file`; read by `audit_of`."""
    for option in reversed(
        (
            click.option("--why", required=True, help="How you know; kept in the audit."),
            click.option("--by", default=_user, help="Who decides; by default the user of this system."),
            click.option(
                "--audit-file",
                envvar=AUDIT_VARIABLE,
                required=True,
                help=f"Where the audit is appended, before anything changes; '-': standard error. Or {AUDIT_VARIABLE}.",
            ),
        )
    ):
        function = option(function)
    return function


def audit_of(options: dict[str, Any]) -> Audit:
    """Take the audit's options out of a command's."""
    why = options.pop("why").strip()
    if not why:
        raise click.UsageError("--why must say how you know.")
    return Audit(options.pop("audit_file"), options.pop("by"), why)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user's number has no name, as in some containers
        return f"uid {os.getuid()}"
