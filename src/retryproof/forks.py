"""What a child inherits by a fork: files that were open, and clients whose connections belong to the parent.

SQLite keeps a table of its locks, by file, in the process's memory. A child inherits this table, but not the locks of
the operating system. If SQLite had a file open during the fork, all connections of the child to this file, new ones
too, exclude nobody. Other processes do not notice the child, and delete the log that it writes. So the store closes its
file before a fork (`stores.sql.sqlite`). If a file was open all the same, in a connection of the application or in a
store that was busy for too long, the child refuses it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import weakref

from retryproof.core.errors import ConfigurationError

MOST_DESCRIPTORS = 65_536
"""How many file descriptors are checked if the system does not list the open ones."""

_inherited: set[tuple[int, int]] = set()
"""Device and inode of each file that was open when an ancestor of this process forked."""

_clients: weakref.WeakSet[object] = weakref.WeakSet()
_abandoned: list[object] = []


def has_inherited_files() -> bool:
    """Whether an ancestor forked with open files, so that `check_not_inherited` has to check."""
    return bool(_inherited)


def check_not_inherited(path: str) -> None:
    """Raise ConfigurationError for a SQLite file that was open when this process was forked."""
    if not _inherited:
        return
    try:
        found = os.stat(path)
    except OSError:  # it has no file, or a new one
        return
    if (found.st_dev, found.st_ino) in _inherited:
        raise ConfigurationError(
            f"The SQLite database {path} was open when this process was forked, by a connection of the application or "
            "in mid-transaction, and SQLite excludes nobody from such a file: two processes could do the same work. "
            "Close the connections before the fork and open them afterwards, or start the process by 'spawn'. "
            "Nothing was read or written."
        )


def keep_from_children(client: object) -> None:
    """Abandon this client in every child that inherits it."""
    _clients.add(client)


def abandon(client: object) -> None:
    """Never close this client, whose connections belong to the parent, not even at garbage collection or exit.

    asyncpg, say, would take its socket from the event loop's epoll, which is the parent's as well.
    """
    _abandoned.append(client)
    with contextlib.suppress(ImportError):  # without it the interpreter clears the list at its end
        import ctypes  # a child alone needs it

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


def _disinherit() -> None:
    for descriptor in _open_descriptors():
        try:
            found = os.fstat(descriptor)
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            _inherited.add((found.st_dev, found.st_ino))
    for client in list(_clients):
        abandon(client)
    _clients.clear()


def _open_descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return list(range(min(os.sysconf("SC_OPEN_MAX"), MOST_DESCRIPTORS)))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disinherit)
