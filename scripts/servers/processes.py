"""Processes by pid, told from a later process that got the same pid by the time they began."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid with its start time in clock ticks, as Linux numbers both (`/proc/<pid>/stat`)."""

    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        return cls(pid, _began(pid) or "")

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        return _began(self.pid) == self.began and bool(self.began)

    def send(self, number: signal.Signals) -> None:
        """Signals this process alone, and no other that took its pid."""
        if self.alive():
            _send(self.pid, number)

    def send_with_children(self, number: signal.Signals) -> None:
        """Signals this process, then its children: PostgreSQL's back ends each lead a session of their own."""
        if not self.alive():
            return
        children = _children(self.pid)
        _send(self.pid, number)
        for child in children:
            _send(child, number)

    def wait(self, seconds: float) -> bool:
        """Waits until the process has ended, at most so long."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the command's name, which may itself hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _began(pid: int) -> str | None:
    try:
        fields = _stat(pid)
    except OSError:
        return None
    state, began = fields[0], fields[19]
    return None if state in "ZX" else began


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(_stat(int(entry.name))[1]) == parent:
                found.append(int(entry.name))
        except OSError:  # ended while we looked
            continue
    return found
