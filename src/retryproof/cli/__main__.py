"""The entry point of the command: `retryproof`, or `python -m retryproof.cli`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from retryproof.cli.exits import USAGE


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        commands = import_module("retryproof.cli.commands")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("click", "rich"):
            raise
        print(f"The command line needs {library}: pip install 'retryproof[cli]'", file=sys.stderr)
        sys.exit(USAGE)
    commands.retryproof(prog_name="retryproof")
    sys.exit(0)


if __name__ == "__main__":
    main()
