"""Private servers for one run, by way of scripts/servers: Redis without persistence, PostgreSQL with fsync on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from servers import Instance, RunDirectory, start_private

_OPTIONS = {
    # The script's cost is to be seen, not the append-only file's.
    "redis": ("--appendonly", "no"),
    "postgres": ("-c", "max_connections=400", "-c", "synchronous_commit=on"),
}


class Services:
    """Starts a server at its first use, and stops what it started at the end."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}

    def __enter__(self) -> Self:
        self._run = RunDirectory.of_session()
        return self

    def __exit__(self, *_: object) -> None:
        self._run.clear()

    def url(self, name: str) -> str:
        """Of `redis` or `postgres`; servers.Missing, with what to install, where there is none."""
        if name not in self._instances:
            self._instances[name] = start_private(name, *_OPTIONS[name], run=self._run)
        return self._instances[name].url

    def pid(self, name: str) -> int:
        """The process of a server that was started, whose children serve."""
        return self._instances[name].pid

    def versions(self) -> dict[str, str]:
        return {name: instance.version for name, instance in self._instances.items()}

    def sqlite_path(self, name: str) -> str:
        return str(self._run.path / name)
