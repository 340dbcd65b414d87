"""Exit codes, the same for every command; `retryproof --help` and docs/howto/operate.md list them."""

from __future__ import annotations

DONE = 0
"""Done, and nothing was found."""
FOUND = 1
"""A check failed, a record is not there, or what was asked was refused; nothing was changed."""
USAGE = 2
"""What was asked makes no sense: an unknown option or URL, a missing extra, a database that needs `migrate`."""
UNREACHABLE = 3
"""The store gave no answer; what was asked may have been done."""
INTERRUPTED = 130
"""Ended by Ctrl-C; every pass that was done stays done."""

HELP = (
    "Exit codes: 0 done · 1 a check failed, a record was not found or the action was refused · "
    "2 wrong usage or configuration · 3 the store gave no answer · 130 interrupted."
)
