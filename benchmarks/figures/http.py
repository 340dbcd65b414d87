"""HTTP: one app under no layer, the ceiling, ours and the peers, driven by one load generator."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Figure, OutOfTime, Pace, Run, Sample, interleave

ROOT = Path(__file__).parents[2]
REPEATED_KEYS = 512
READY_SECONDS = 20.0
# In the order of importance, should the run's limit cut it short.
CONNECTIONS = (32, 256, 1)
METHOD = (
    "uvicorn (uvloop, httptools, one process) on 127.0.0.1; load generator a process of its own (uvloop, keep-alive, "
    "one request in flight a connection); FastAPI POST with a validated JSON body; subjects in turn, ratio of each "
    "repetition, median (lowest–highest)"
)
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_prefixes = itertools.count()


@dataclass(frozen=True, slots=True)
class HttpSubject:
    """A name for the table, a subject of serve.py, its store, and the interpreter that runs it."""

    name: str
    serve: str
    store: str = ""
    python: str = sys.executable
    tuned: bool = False
    """The garbage collector set as docs/howto/fastapi.md advises."""


class ServerDied(RuntimeError):
    """The subject's server ended or never answered."""


class Server:
    """A running server process."""

    def __init__(self, subject: HttpSubject) -> None:
        command = [subject.python, "-m", "benchmarks.serve", "--subject", subject.serve, "--store", subject.store]
        command += ["--tuned-collector"] if subject.tuned else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServerDied(f"{subject.name} did not start")
        self.port = int(line)
        self.effects()

    def effects(self) -> int:
        """How often the handler ran."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/effects", timeout=READY_SECONDS) as answer:
            effects: int = json.load(answer)["effects"]
            return effects

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@asynccontextmanager
async def serving(subjects: list[HttpSubject]) -> AsyncIterator[Mapping[str, Server]]:
    """All servers at once: the idle ones cost nothing."""
    async with AsyncExitStack() as stack:
        servers = {}
        for subject in subjects:
            server = await asyncio.to_thread(Server, subject)
            stack.callback(server.stop)
            servers[subject.name] = server
        yield servers


async def load(server: Server, connections: int, seconds: float, prefix: str, **options: int) -> Sample:
    """One run of the load generator; errors are answers outside 2xx and requests that were never answered."""
    words = ["--port", str(server.port), "--connections", str(connections), "--seconds", str(seconds)]
    words += ["--prefix", prefix, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    effects, cpu = await asyncio.to_thread(server.effects), server.cpu_seconds()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load", *words, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise ServerDied(f"the load generator failed with {process.returncode}")
    cpu = server.cpu_seconds() - cpu
    effects = await asyncio.to_thread(server.effects) - effects
    answer = json.loads(output)
    good = sum(count for status, count in answer["statuses"].items() if status.startswith("2"))
    errors = sum(answer["statuses"].values()) - good + answer["broken"]
    details = {
        "effects": effects,
        "answers": good,
        **{k: answer[k] for k in ("statuses", "broken", "p50_ms", "p99_ms")},
    }
    return Sample(good, answer["seconds"], cpu, errors, details)


def new_keys(server: Server, connections: int) -> Run:
    """Every request has a key of its own: the handler must run each time."""

    async def run(seconds: float) -> Sample:
        sample = await load(server, connections, seconds, f"new-{os.getpid()}-{next(_prefixes)}")
        return flag(sample, "effects without an answer or answers without an effect", sample.operations)

    return run


async def replays(server: Server, connections: int) -> Run:
    """Every request repeats a stored one: the handler must not run."""
    prefix = f"replay-{os.getpid()}-{next(_prefixes)}"
    await load(server, 1, READY_SECONDS, prefix, count=REPEATED_KEYS)

    async def run(seconds: float) -> Sample:
        sample = await load(server, connections, seconds, prefix, distinct=REPEATED_KEYS)
        return flag(sample, "effects during replays", 0)

    return run


def flag(sample: Sample, fault: str, expected: int) -> Sample:
    """Count a wrong number of effects as errors, so that a fast but wrong layer cannot pass."""
    wrong = abs(sample.details["effects"] - expected)
    if not wrong or sample.errors:
        return sample
    details = {**sample.details, "fault": fault}
    return Sample(sample.operations, sample.seconds, sample.cpu_seconds, sample.errors + wrong, details)


async def collector_figures(subjects: list[HttpSubject], pace: Pace) -> list[Figure]:
    """New keys, under the collector as Python has it and under one that is tuned."""
    both = [*subjects, *(replace(subject, name=f"{subject.name}, tuned", tuned=True) for subject in subjects)]
    async with serving(both) as servers:
        runs = {name: new_keys(server, 32) for name, server in servers.items()}
        try:
            return [await interleave("http collector 32", METHOD, runs, pace)]
        except OutOfTime:
            return []


async def figures(subjects: list[HttpSubject], pace: Pace, connections: tuple[int, ...] = CONNECTIONS) -> list[Figure]:
    """New keys and replays at each number of connections; what the run's limit leaves no time for is left out."""
    taken: list[Figure] = []
    async with serving(subjects) as servers:
        for count in connections:
            for kind in ("new", "replay"):
                runs = {}
                for name, server in servers.items():
                    bare = name == "no layer"
                    runs[name] = new_keys(server, count) if kind == "new" or bare else await replays(server, count)
                try:
                    taken.append(await interleave(f"http {kind} {count}", METHOD, runs, pace))
                except OutOfTime:
                    return taken
                print(f"  {taken[-1].name}: done at {time.strftime('%H:%M:%S')}", file=sys.stderr)
    return taken
