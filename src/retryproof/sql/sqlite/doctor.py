"""What of a SQLite file, and of where it lies, silently breaks safety (O2)."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from retryproof.core.errors import StoreUnavailable
from retryproof.core.findings import Finding, Verdict
from retryproof.sql.sqlite.records import SCHEMA_VERSION
from retryproof.sql.sqlite.url import parse

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "ceph", "glusterfs", "lustre", "afs", "ncpfs")
"""File systems over a network, by the start of their names: WAL needs shared memory, and their locks are unreliable."""
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found. mode: the file's permission bits. version: 0 where there is no table of ours."""

    synchronous: str
    exists: bool
    writable: bool
    filesystem: str
    mode: int = 0
    journal: str = ""
    version: int = 0
    integrity: str = ""
    release: str = sqlite3.sqlite_version
    folder_exists: bool = True


def diagnose(url: str, *, timeout: float = 2.0) -> Sequence[Finding]:
    """Look at the file, without making or changing it."""
    target = parse(url, timeout)
    return verdicts(gather(Path(target.path), target.synchronous, timeout))


def gather(path: Path, synchronous: str, timeout: float) -> Facts:
    """Read the file's state; raises StoreUnavailable where it is no database."""
    folder = path.resolve().parent
    filesystem = filesystem_of(folder, _mounts())
    writable = os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not path.exists():
        return Facts(synchronous, False, writable, filesystem, folder_exists=folder.is_dir())
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=timeout)
        try:
            return Facts(
                synchronous,
                True,
                writable,
                filesystem,
                stat.S_IMODE(path.stat().st_mode),
                _first(connection, "PRAGMA journal_mode"),
                _version(connection),
                _first(connection, "PRAGMA quick_check(1)"),
            )
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise StoreUnavailable(f"The SQLite database {path} cannot be read: {error}") from error


def _first(connection: sqlite3.Connection, sql: str) -> str:
    return str(connection.execute(sql).fetchone()[0])


def _version(connection: sqlite3.Connection) -> int:
    tables = connection.execute(
        "SELECT count(*) FROM sqlite_schema WHERE name IN ('retryproof_operations', 'retryproof_markers')"
    ).fetchone()
    return int(_first(connection, "PRAGMA user_version")) if tables[0] == 2 else 0


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the file system that a folder lies on, from the text of /proc/self/mounts; "" where unknown."""
    found, longest = "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].encode().decode("unicode_escape"))  # blanks are written as \040
        if folder.is_relative_to(point) and len(point.parts) >= longest:  # what is mounted later hides what was before
            found, longest = fields[2], len(point.parts)
    return found


def verdicts(facts: Facts) -> Sequence[Finding]:
    """Judge what was found."""
    findings = [_version_of_sqlite(facts), _place(facts), _writable(facts), _durability(facts)]
    if not facts.exists:
        findings.append(Finding("file", WARN, "it does not exist", "It is made at the first call. Is the path right?"))
        return findings
    return [*findings, _privacy(facts), _integrity(facts), _journal(facts), _schema(facts)]


def _version_of_sqlite(facts: Facts) -> Finding:
    return Finding("version", OK, f"SQLite {facts.release}")


def _place(facts: Facts) -> Finding:
    if facts.filesystem.startswith(NETWORK):
        return Finding(
            "place",
            FAIL,
            f"on {facts.filesystem}, a network file system: two hosts can both win a claim, and files get corrupted",
            "Put it on a local disk, or use redis:// or postgresql:// for several hosts.",
        )
    if facts.filesystem in IN_MEMORY:
        return Finding("place", WARN, f"on {facts.filesystem}, which a reboot empties", "Put it on a disk.")
    return Finding("place", OK, f"on {facts.filesystem or 'a file system of unknown type'}")


def _writable(facts: Facts) -> Finding:
    if facts.writable:
        return Finding("permission", OK, "file and folder can be written")
    if not facts.folder_exists:
        return Finding("permission", FAIL, "its folder does not exist", "Make it, or mend the path.")
    return Finding(
        "permission", FAIL, "this user cannot write the file and its folder", "SQLite writes -wal and -shm beside it."
    )


def _durability(facts: Facts) -> Finding:
    if facts.synchronous in ("FULL", "EXTRA"):
        return Finding("durability", OK, f"synchronous {facts.synchronous}")
    return Finding(
        "durability",
        FAIL if facts.synchronous == "OFF" else WARN,
        f"synchronous {facts.synchronous}: a power cut loses what was answered last, and it runs again",
        "Leave ?synchronous= out of the URL: FULL is the default.",
    )


def _privacy(facts: Facts) -> Finding:
    if facts.mode & 0o007:
        return Finding(
            "privacy", WARN, f"mode {facts.mode:04o}: every user may open stored responses", "chmod o-rwx the file."
        )
    return Finding("privacy", OK, f"mode {facts.mode:04o}")


def _integrity(facts: Facts) -> Finding:
    if facts.integrity == "ok":
        return Finding("integrity", OK, "quick_check ok")
    return Finding("integrity", FAIL, f"quick_check: {facts.integrity}", "Restore it, or recover with `.recover`.")


def _journal(facts: Facts) -> Finding:
    if facts.journal == "wal":
        return Finding("journal", OK, "wal")
    return Finding("journal", WARN, f"{facts.journal}; the store turns WAL on", "Leave it: without WAL readers block.")


def _schema(facts: Facts) -> Finding:
    if facts.version == SCHEMA_VERSION:
        return Finding("schema", OK, f"version {facts.version}")
    if facts.version > SCHEMA_VERSION:
        return Finding(
            "schema", FAIL, f"version {facts.version}, of a later release; this one knows {SCHEMA_VERSION}", "Upgrade."
        )
    return Finding("schema", WARN, "no table yet, or an older one", "It is made at the first call.")
