"""Exit codes, the same for every command; `retryproof --help` and docs/howto/operate.md list them."""

from __future__ import annotations

DONE = 0
"""Done, without problems."""
FOUND = 1
"""A check failed, a record does not exist, or the action was refused; nothing was changed."""
USAGE = 2
"""Wrong usage or configuration: an option, a URL, a missing extra, a database that needs `migrate`."""
UNREACHABLE = 3
"""The store gave no answer; the action may have been done."""
INTERRUPTED = 130
"""Interrupted by Ctrl-C; finished passes stay done."""

HELP = (
    "Exit codes: 0 done · 1 a check failed, a record was not found or the action was refused · "
    "2 wrong usage or configuration · 3 the store gave no answer · 130 interrupted."
)
