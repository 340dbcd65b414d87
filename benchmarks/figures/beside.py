"""Beside the peers on PostgreSQL: outboxes, a queue and a workflow library, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.measure import Figure, Pace, Run, Sample, interleave
from benchmarks.peers import PeerMissing, peer_python
from benchmarks.services import Services
from retryproof.stores.sql.migrate import migrate

PROGRAM = Path(__file__).parents[1] / "peer_work.py"
LONGEST = 60.0
"""Seconds that a sample may take, opening included."""
ENDING = 5.0
KEYS = 500
GUARANTEES = (
    "ours: fenced by the relay's own row; order per key across retries and relays, by a number drawn at the insert",
    "txoutbox: fenced by lease and worker; order per key by sequence; rows are kept, marked",
    "pgqueuer: a job queue, no order per key; fenced by heartbeat; a notification for each enqueue; a log row a job",
    "faststream-outbox: on SQLAlchemy; no order per key; fenced by a token; a notification for each enqueue",
    "every one: at least once; the enqueue commits with the business row",
)
FLOWS = (
    "ours: two steps under a fenced lease, both kept; the claim and the completion are shared by all tasks",
    "dbos: steps kept under the execution's own token, without a lease: who is stuck is not noticed by the others",
)


class Worker:
    """A process of one subject."""

    def __init__(self, subject: str, url: str) -> None:
        self._subject = subject
        self._url = url

    async def __aenter__(self) -> Self:
        python = sys.executable if self._subject.startswith("ours") else peer_python(self._subject)
        self._process = await asyncio.create_subprocess_exec(
            python,
            str(PROGRAM),
            self._subject,
            self._url,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            await self._answer()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._input.close()  # it gives back what it holds, and ends
        try:
            async with asyncio.timeout(ENDING):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def sampling(self, task: str, keys: int = KEYS) -> Run:
        async def run(seconds: float) -> Sample:
            line = json.dumps({"task": task, "seconds": seconds, "keys": keys})
            self._input.write(line.encode() + b"\n")
            await self._input.drain()
            return Sample(**await self._answer())

        return run

    @property
    def _input(self) -> asyncio.StreamWriter:
        if self._process.stdin is None:
            raise RuntimeError("the process was started without an input")
        return self._process.stdin

    async def _answer(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("the process was started without an output")
        async with asyncio.timeout(LONGEST):
            line = await self._process.stdout.readline()
        if not line:
            raise PeerMissing(f"{self._subject} does not work here; its own words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


async def beside(
    name: str, method: str, url: str, subjects: Sequence[str], task: str, pace: Pace, notes: tuple[str, ...], keys: int
) -> Figure:
    """One figure; a peer that is not there is left out, and said so."""
    async with AsyncExitStack() as stack:
        runs: dict[str, Run] = {}
        for subject in subjects:
            try:
                worker = await stack.enter_async_context(Worker(subject, url))
            except (PeerMissing, TimeoutError) as error:
                notes += (str(error) or f"{subject} did not answer",)
                continue
            runs[subject] = worker.sampling(task, keys)
        return await interleave(name, method, runs, pace, notes)


async def figures(services: Services, pace: Pace) -> list[Figure]:
    url = services.url("postgres")
    await asyncio.to_thread(migrate, url)
    each = "each in a process of its own on uvloop, in turn; fsync and synchronous_commit on"
    outboxes = ("ours", "txoutbox", "pgqueuer", "faststream-outbox")
    return [
        await beside(
            "enqueue beside peers",
            f"16 tasks; a transaction of one business row and one message; {each}",
            url, ("ours", "txoutbox", "pgqueuer", "ours, SQLAlchemy", "faststream-outbox"), "enqueue", pace, (), KEYS,
        ),
        await beside(
            "relay beside peers", f"3,000 messages of {KEYS} keys, batch 100, a publisher that does nothing; {each}",
            url, outboxes, "relay", pace, GUARANTEES, KEYS,
        ),
        await beside(
            "relay beside peers, one key", f"3,000 messages of one key, batch 100; {each}",
            url, ("ours", "txoutbox"), "relay", pace, (), 1,
        ),
        await beside(
            "two steps beside dbos", f"32 tasks; an operation of two steps that do nothing; {each}",
            url, ("ours", "dbos"), "workflow", pace, FLOWS, 1,
        ),
    ]  # fmt: skip
